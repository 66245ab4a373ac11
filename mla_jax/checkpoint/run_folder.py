"""Run folders: the config, the tokenizer and the checkpoints of one training run.

RUN/config.yaml            everything that was configured
RUN/tokenizer/             Hugging Face files
RUN/conf/model/imported.yaml  an imported model, for `experiments.sft --config-dir RUN/conf model=imported`
RUN/checkpoints/STEP/      see `checkpoint.manager`
RUN/train.lock, trainer.json  while it is being trained: see `checkpoint.run_lock`
RUN/trackers.json, goodput.json, tensorboard/, wandb/, profile/, eval/
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from omegaconf import DictConfig, OmegaConf

from mla_jax.checkpoint.manager import CHECKPOINTS, Checkpoints
from mla_jax.checkpoint.streaming import deferred_write_errors
from mla_jax.config import NUMERICALLY_NEUTRAL_KEYS, WEIGHT_KEYS, ModelConfig, RunConfig, TrainConfig
from mla_jax.config.command_line import override
from mla_jax.data.tokenizer import Tokenizer, load_tokenizer
from mla_jax.distributed.decisions import broadcast_decision, on_all
from mla_jax.errors import InputError, first_line
from mla_jax.files import atomic_file, atomic_folder
from mla_jax.state import TrainState

CONFIG = "config.yaml"
TOKENIZER = "tokenizer"

_MISREAD = "*?[\\"
"""Characters that Orbax takes for a pattern when they are in a path; TensorStore turns a backslash into a slash."""


@dataclass(frozen=True)
class Run:
    """A trained or imported model, ready to evaluate, export or train further."""

    path: Path
    model: ModelConfig
    params: dict
    """Arrays; of TensorStore, which leaves them on disk, if `load_run` was asked for these."""
    tokenizer: Tokenizer
    step: int
    trained_lengths: tuple[int, ...]
    """Sequence lengths of the training stages that this step has behind it, in tokens; empty for an imported model."""


def check_run(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Checks that a run of `config` can begin in RUN, or that the one which is there can be resumed; writes nothing.

    The first process of a job does it for all.

    Raises:
        InputError: the folder holds another model or tokenizer, or something that is no run at all.
    """
    broadcast_decision(lambda: _check_run(config, tokenizer))


def _check_run(config: RunConfig, tokenizer: Tokenizer) -> None:
    run_dir = Path(config.run_dir)
    if not (run_dir / CONFIG).exists():
        if (run_dir / CHECKPOINTS).is_dir() and any((run_dir / CHECKPOINTS).iterdir()):
            raise InputError(f"{run_dir} has checkpoints but no {CONFIG}; choose another name= or remove it")
        return
    existing, wanted = _read_config(run_dir), OmegaConf.create(dataclasses.asdict(config))
    start = override("init_from", str(run_dir))
    if "train" not in existing:
        raise InputError(f"{run_dir} holds an imported model; train in a new run with {start} name=NEW")
    keys = [str(k) for k in wanted.model if existing.model.get(k) != wanted.model.get(k)]
    differ = sorted(k for k in keys if k not in NUMERICALLY_NEUTRAL_KEYS)
    if differ:
        instead = "" if set(differ) & set(WEIGHT_KEYS) else f", from which {start} starts with these changed"
        raise InputError(f"{run_dir} holds another model ({', '.join(differ)} differ); choose another name={instead}")
    if load_tokenizer(str(run_dir / TOKENIZER)).fingerprint != tokenizer.fingerprint:
        raise InputError(f"{run_dir} was trained with another tokenizer than data.tokenizer={config.data.tokenizer}")


def record_run(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Writes config and tokenizer into RUN, which `check_run` found fit; the first process of a job does it for all.

    Raises:
        InputError: they cannot be written.
    """
    broadcast_decision(lambda: _record_run(config, tokenizer))


def _record_run(config: RunConfig, tokenizer: Tokenizer) -> None:
    run_dir = Path(config.run_dir)
    if not (run_dir / CONFIG).exists():
        tokenizer.save(run_dir / TOKENIZER)
    _write_config(run_dir, OmegaConf.create(dataclasses.asdict(config)))


def load_run(run_dir: str | Path, step: str = "latest", *, on_disk: bool = False) -> Run:
    """Parameters of a run with their config and tokenizer; nothing of the optimizer's state is read.

    Args:
        run_dir: the folder.
        step: `latest`, `best` by the run's `train.best_metric`, or a number. The first two pass over checkpoints
            that are corrupt, with a warning.
        on_disk: do not read the parameters but open them, for callers that read one slice at a time.

    Raises:
        InputError: not a run, no such checkpoint, none that can be read, or a tokenizer that does not fit it.
    """
    run_dir = Path(run_dir)
    config, model, tokenizer = on_all(lambda: _read_run(run_dir))
    checkpoints = Checkpoints(run_dir)
    try:
        metric = OmegaConf.select(config, "train.best_metric", default=TrainConfig.best_metric)
        chosen = checkpoints.choose(step, metric)
        saved = checkpoints.restore_loop_state(chosen)
        if saved["tokenizer"] != tokenizer.fingerprint:
            raise InputError(f"{run_dir / TOKENIZER} is not the tokenizer that checkpoint {chosen} was trained with")
        params = (checkpoints.open_params if on_disk else checkpoints.restore_params)(chosen, model)
    finally:
        checkpoints.close()
    stages = config.train.stages[: saved["stage"] + (saved["stage_step"] > 0)] if "train" in config else []
    return Run(run_dir, model, params, tokenizer, chosen, tuple(stage.seq_len for stage in stages))


def newest_checkpoint(run_dir: str | Path) -> Path:
    """The folder of a run's newest intact checkpoint. Raises InputError as `load_run`."""
    run_dir = Path(run_dir)
    on_all(lambda: _read_run(run_dir))
    checkpoints = Checkpoints(run_dir)
    try:
        return checkpoints.folder / str(checkpoints.choose("latest", TrainConfig.best_metric))
    finally:
        checkpoints.close()


def load_params(key: str, run_dir: str, model: ModelConfig, tokenizer: Tokenizer, step: str = "latest") -> dict:
    """Parameters of another run, in the type that `model` says, to compute as `model` with them.

    Everything that does not say which weights there are may differ, positions above all: that is how a context is
    extended.

    Args:
        key: the config key whose value is `run_dir`, for errors.
        run_dir: the other run.
        model: of this run.
        tokenizer: of this run.
        step: see `load_run`.

    Raises:
        InputError: its weights or its tokenizer are not ours; see `load_run`.
    """
    on_all(lambda: check_fits(key, run_dir, model, tokenizer))
    return jax.tree.map(lambda array: array.astype(model.param_dtype), load_run(run_dir, step).params)


def check_fits(key: str, run_dir: str, model: ModelConfig, tokenizer: Tokenizer) -> None:
    """Raises InputError as `load_params`, by the other run's config and tokenizer alone; each process for itself."""
    _, theirs, other = _read_run(Path(run_dir))
    differ = [name for name in WEIGHT_KEYS if getattr(theirs, name) != getattr(model, name)]
    if differ:
        raise InputError(f"{key}={run_dir} holds another model: {', '.join(differ)} differ")
    if other.fingerprint != tokenizer.fingerprint:
        ours = override("data.tokenizer", f"{run_dir}/tokenizer")
        raise InputError(f"{key}={run_dir} has another tokenizer; set {ours}")


def _read_run(run_dir: Path) -> tuple[DictConfig, ModelConfig, Tokenizer]:
    config = _read_config(run_dir)
    model = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), config.model))
    assert isinstance(model, ModelConfig)
    if not (run_dir / CHECKPOINTS).is_dir():
        raise InputError(f"{run_dir} has no checkpoint yet")
    tokenizer = load_tokenizer(str(run_dir / TOKENIZER))
    check_tokenizer(tokenizer, model)
    return config, model, tokenizer


def save_imported(run_dir: str | Path, model: ModelConfig, params: dict, tokenizer: Tokenizer) -> Path:
    """Writes RUN for parameters that come from elsewhere; nothing is left behind if that fails.

    Args:
        run_dir: the folder to create.
        model: the config.
        params: arrays, as `init_params` lays them out, or `LazyArray` leaves, which are in memory one slice at a time.
        tokenizer: its tokenizer.

    Raises:
        InputError: RUN exists, the tokenizer does not fit the model, parameters cannot be read, the disk is full, or no
            checkpoint can be kept at that path.
    """
    run_dir = Path(run_dir)
    check_path(run_dir)
    if run_dir.exists():
        raise InputError(f"{run_dir} exists; choose another folder")
    check_tokenizer(tokenizer, model)
    with atomic_folder(run_dir, replace=False) as folder:
        tokenizer.save(folder / TOKENIZER)
        with deferred_write_errors(params) as params:
            checkpoints = Checkpoints(folder)
            try:
                state = TrainState(jnp.zeros((), jnp.int32), params, ())
                checkpoints.save(0, state, {"tokenizer": tokenizer.fingerprint})
                checkpoints.wait()
            finally:
                checkpoints.close()
        _write_model(folder, model)
        _write_config(folder, OmegaConf.create({"name": run_dir.name, "model": dataclasses.asdict(model)}))
    return run_dir


def _write_model(run_dir: Path, model: ModelConfig) -> None:
    """The model as a file of Hydra's group `model`, so that training on needs no key of it typed."""
    path = run_dir / "conf" / "model" / "imported.yaml"
    path.parent.mkdir(parents=True)
    OmegaConf.save({"defaults": ["schema", "_self_"], **dataclasses.asdict(model)}, path)


def check_tokenizer(tokenizer: Tokenizer, model: ModelConfig) -> None:
    """Raises InputError if the tokenizer has ids that the model does not know."""
    if tokenizer.vocab_size > model.vocab_size:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but model.vocab_size is {model.vocab_size}; "
            f"set model.vocab_size={-(-tokenizer.vocab_size // 64) * 64} or use another tokenizer"
        )


def check_path(run_dir: Path) -> None:
    """Raises InputError if checkpoints written there could not be read again."""
    path = str(run_dir.resolve())
    misread = sorted(set(path) & set(_MISREAD))
    if misread or path.encode(errors="ignore").decode() != path:
        reason = f"the storage library misreads {' and '.join(misread)}" if misread else "it is not UTF-8"
        shown = path.encode(errors="replace").decode()
        raise InputError(f"checkpoints cannot be kept in {shown}: {reason}; choose another name= or folder")


def _read_config(run_dir: Path) -> DictConfig:
    path = run_dir / CONFIG
    if not path.is_file():
        raise InputError(f"{run_dir} is not a run folder: it has no {CONFIG}")
    try:
        config = OmegaConf.load(path)
        assert isinstance(config, DictConfig) and "model" in config
    except Exception as e:
        raise InputError(f"{path} cannot be read ({first_line(e)})") from e
    return config


def _write_config(run_dir: Path, config: DictConfig) -> None:
    with atomic_file(run_dir / CONFIG) as partial:
        OmegaConf.save(config, partial)
