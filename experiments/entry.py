"""From the command line to a typed config: Hydra composes, the schemas validate, errors end as one line."""

import contextlib
import dataclasses
import os
import re
import shutil
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mla_jax.config import SftConfig, register_schemas
from mla_jax.config.command_line import quote_text
from mla_jax.config.register import text_keys
from mla_jax.errors import InputError, UsageError, check_text, one_line_errors

_HERE = Path(__file__).resolve().parent
CONF = _HERE / "conf" if (_HERE / "conf").is_dir() else _HERE.parent / "conf"
"""The Hydra configs: beside this file in an installed package (setup.py), beside `experiments/` in the repository."""

_LONGEST_NAME = 200


def run(config_name: str, main: Callable[[Any], None]) -> None:
    """Calls `main` with the config object that `conf/<config_name>.yaml` and the command line compose.

    Each job of a sweep has a run folder of its own in that of the sweep, named by what is swept. A wrong key, type or
    value ends with one line and exit code 2, bad input (InputError) with one line and exit code 1.
    """
    register_schemas()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing, so that one place prints
    with one_line_errors():
        check_text(*sys.argv)
    sys.argv[1:] = map(quote_text, _from_here(sys.argv[1:]))
    given = _overrides(sys.argv[1:])  # of the process that submits: a job on a cluster gets `task` pickled

    def task(composed: DictConfig) -> None:
        multirun = HydraConfig.get().mode == RunMode.MULTIRUN
        submitted = "SUBMITIT_EXECUTOR" in os.environ
        with _job_errors() if submitted else contextlib.nullcontext() if multirun else one_line_errors():
            with as_usage_errors():
                _check_text(composed)
                config = _typed(composed, config_name)
            swept = [override for override in HydraConfig.get().overrides.task if override not in given]
            if multirun and swept and hasattr(config, "run_dir"):
                config = dataclasses.replace(config, run_dir=str(Path(config.run_dir) / _folder_name(swept)))
            main(config)

    with one_line_errors(), as_usage_errors(), _slurm_errors():
        hydra.main(version_base=None, config_path=str(CONF), config_name=config_name)(task)()


def compose_config(overrides: list[str]) -> SftConfig:
    """The config that experiments.sft would run with these overrides."""
    register_schemas()
    check_text(*overrides)
    with initialize_config_dir(str(CONF), version_base=None), as_usage_errors():
        config: Any = OmegaConf.to_object(compose("sft", overrides=overrides))
    return config


def _from_here(arguments: list[str]) -> list[str]:
    """The arguments with a folder after --config-path made absolute: Hydra would look for it beside this file."""
    found = []
    for argument in arguments:
        option, equals, folder = argument.rpartition("=")
        if (option if equals else "".join(found[-1:])) in ("--config-path", "-cp") and Path(folder).is_dir():
            argument = f"{option}{equals}{Path(folder).absolute()}"
        found.append(argument)
    return found


def _check_text(composed: DictConfig) -> None:
    """Raises UsageError for a text that a YAML file has as a number beyond all, a commit of digits and one e."""
    for key in sorted(text_keys()):
        value = OmegaConf.select(composed, key, default=None)
        if value in ("inf", "-inf", "nan"):
            raise UsageError(f"{key} is {value}, as YAML reads a bare 12e4567 and the like; put it in quotes")


def _typed(composed: DictConfig, config_name: str) -> Any:
    """The config object; a RUN/config.yaml (`--config-path RUN --config-name config`) gets the schema that it lacks."""
    if OmegaConf.get_type(composed) is dict:
        store = ConfigStore.instance()
        schema = OmegaConf.structured(store.load(f"{config_name}_schema.yaml").node)
        kind = OmegaConf.select(composed, "data.kind")
        if kind is not None:
            schema.data = store.load(f"data/{kind}_schema.yaml").node
        return OmegaConf.to_object(OmegaConf.merge(schema, composed))
    return OmegaConf.to_object(composed)


def _folder_name(swept: list[str]) -> str:
    """The overrides as a name of letters, digits and `.,=+-_`, short enough for any file system.

    Where that leaves out more than slashes and quotes, a checksum keeps the names of different overrides apart.
    """
    text = ",".join(swept).replace("'", "")
    plain = re.sub(r"[^\w.,=+-]+", "_", text, flags=re.ASCII)
    if plain == text.replace("/", "_") and len(plain) <= _LONGEST_NAME:
        return plain
    return f"{plain[:_LONGEST_NAME]}-{zlib.crc32(text.encode()):08x}"


def _overrides(arguments: list[str]) -> set[str]:
    """The overrides among command-line arguments, spelled as Hydra hands them to the jobs of a sweep."""
    found = set()
    for argument in arguments:
        with contextlib.suppress(HydraException):  # no override, or one that Hydra is about to refuse
            (override,) = OverridesParser.create().parse_overrides([argument])
            if not override.is_sweep_override():
                found.add(f"{override.get_key_element()}={override.get_value_element_as_str()}")
    return found


@contextlib.contextmanager
def _job_errors() -> Iterator[None]:
    """Errors in a submitted job end its process, so that SLURM sees that it failed; Hydra would call it a success."""
    with one_line_errors():
        try:
            yield
        except InputError:
            raise
        except Exception:
            traceback.print_exc()
            sys.exit(1)


@contextlib.contextmanager
def _slurm_errors() -> Iterator[None]:
    """Turns what `+cluster=...` lacks on this machine into UsageErrors."""
    try:
        yield
    except HydraException as e:
        if "hydra/launcher/submitit" in str(e):
            raise UsageError("submitting to SLURM needs an extra: pip install '.[slurm]'") from e
        raise
    except RuntimeError as e:
        if shutil.which("sbatch") is None and "srun" in str(e):
            raise UsageError(
                "there is no SLURM on this machine (no sbatch, no srun): run the command on a login node of the "
                "cluster, or without +cluster=..., or start a local SLURM by `make slurm`"
            ) from e
        raise


@contextlib.contextmanager
def as_usage_errors() -> Iterator[None]:
    """Turns Hydra's and OmegaConf's errors into UsageErrors that state their cause."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as e:
        reasons = [str(x) for x in (e, e.__cause__) if x is not None]
        raise UsageError(". ".join(reasons)) from e
