"""From the command line to a typed config: Hydra composes, the schemas check, errors end as one line."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mla_jax.config import register_schemas
from mla_jax.errors import UsageError, one_line_errors

CONF = Path(__file__).resolve().parent.parent / "conf"


def run(config_name: str, main: Callable[[Any], None]) -> None:
    """Calls `main` with the config object that `conf/<config_name>.yaml` and the command line compose.

    In a multirun every job keeps its files in its own folder of the sweep. A wrong key, type or value ends with one
    line and exit code 2, bad input (InputError) with one line and exit code 1.
    """
    register_schemas()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing, so that one place prints

    def task(composed: DictConfig) -> None:
        multirun = HydraConfig.get().mode == RunMode.MULTIRUN
        with contextlib.nullcontext() if multirun else one_line_errors():
            with as_usage_errors():
                config: Any = OmegaConf.to_object(composed)
            if multirun and hasattr(config, "run_dir"):
                config = dataclasses.replace(config, run_dir=HydraConfig.get().runtime.output_dir)
            main(config)

    with one_line_errors(), as_usage_errors():
        hydra.main(version_base=None, config_path=str(CONF), config_name=config_name)(task)()


@contextlib.contextmanager
def as_usage_errors() -> Iterator[None]:
    """Hydra's and OmegaConf's errors as UsageErrors, with their cause."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as e:
        reasons = [str(x) for x in (e, e.__cause__) if x is not None]
        raise UsageError(". ".join(reasons)) from e
