"""Run folders: the config, the tokenizer and Orbax checkpoints of one training run.

RUN/config.yaml            everything that was configured
RUN/tokenizer/             Hugging Face files
RUN/checkpoints/STEP/      state (parameters, optimizer) and position (stage, data order) at that step
RUN/trackers.json, goodput.json, tensorboard/, wandb/, profile/, eval/
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from omegaconf import DictConfig, OmegaConf

from mla_jax.config import HOW_IT_IS_COMPUTED, ModelConfig, SftConfig
from mla_jax.data.tokenizer import Tokenizer, load_tokenizer
from mla_jax.errors import InputError
from mla_jax.mesh import placed
from mla_jax.model.transformer import abstract_params
from mla_jax.state import TrainState

CONFIG = "config.yaml"
TOKENIZER = "tokenizer"
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Run:
    """A trained or imported model, ready to evaluate, export or train further."""

    path: Path
    model: ModelConfig
    params: dict
    tokenizer: Tokenizer
    step: int
    trained_lengths: tuple[int, ...]
    """Sequence lengths of the training stages, in tokens; empty for an imported model."""


class Checkpoints:
    """Asynchronous checkpoints in RUN/checkpoints; a step's folder appears only when it is complete."""

    def __init__(self, run_dir: Path, keep_last: int | None = None):
        self.folder = (run_dir / CHECKPOINTS).resolve()
        self._manager = ocp.CheckpointManager(
            self.folder, options=ocp.CheckpointManagerOptions(max_to_keep=keep_last, enable_async_checkpointing=True)
        )

    @property
    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step, None without any."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, position: dict) -> None:
        """Starts saving a pytree of arrays and a JSON-able position; arrays may be donated right after.

        Raises:
            InputError: this or the previous save failed, on a full disk for instance.
        """
        self._check_space(state)
        with self._save_errors():
            self._manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position)),
                force=True,
            )

    def wait(self) -> None:
        """Returns when what `save` started is on disk. Raises InputError as `save` does."""
        with self._save_errors():
            self._manager.wait_until_finished()

    def restore_state(self, step: int, abstract: TrainState) -> tuple[TrainState, dict]:
        """State and position of `step`, placed as `abstract` says. Raises InputError if they cannot be read."""
        with self._restore_errors(step):
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), position=ocp.args.JsonRestore()),
            )
        return restored["state"], restored["position"]

    def restore_position(self, step: int) -> dict:
        """The position of `step` alone. Raises InputError if it cannot be read."""
        with self._restore_errors(step):
            return self._manager.restore(step, args=ocp.args.Composite(position=ocp.args.JsonRestore()))["position"]

    def restore_params(self, step: int, model: ModelConfig) -> dict:
        """The parameters of `step` alone, on the current mesh or the first device."""
        abstract = {"params": placed(abstract_params(model))}
        with self._restore_errors(step):
            args = ocp.args.PyTreeRestore(
                item=abstract,
                restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
                partial_restore=True,
            )
            return self._manager.restore(step, args=ocp.args.Composite(state=args))["state"]["params"]

    def close(self) -> None:
        """Waits for saves and releases Orbax's threads."""
        with contextlib.suppress(Exception):  # a failed save was reported by `save` or `wait`
            self._manager.close()

    def _check_space(self, state: Any) -> None:
        """A disk that is too small is better noticed before anything is written to it."""
        needed = sum(x.nbytes for x in jax.tree.leaves(state))
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise self._save_error(f"{needed / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are free; make room")

    def _save_error(self, reason: str) -> InputError:
        complete = self.complete_steps()
        kept = f"the last complete checkpoint is step {complete[-1]}" if complete else "none was complete before"
        return InputError(f"could not save a checkpoint in {self.folder} ({reason}); {kept}")

    @contextlib.contextmanager
    def _save_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as e:
            raise self._save_error(_reason(e)) from e

    @contextlib.contextmanager
    def _restore_errors(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as e:
            others = [s for s in self.complete_steps() if s != step]
            advice = f"delete that folder to go on from step {others[-1]}" if others else "there is no other checkpoint"
            raise InputError(f"checkpoint {self.folder / str(step)} cannot be read ({_reason(e)}); {advice}") from e

    def complete_steps(self) -> list[int]:
        """Steps of the complete checkpoints on disk, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdigit())


def _reason(e: BaseException) -> str:
    """The first informative line of an exception, at most 200 characters."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return (lines[0] if lines else type(e).__name__)[:200]


def start_run(config: SftConfig, tokenizer: Tokenizer) -> Path:
    """Creates RUN with its config and tokenizer, or checks that an existing one can be resumed by `config`.

    Raises:
        InputError: the folder holds another model or tokenizer, or something that is no run at all.
    """
    run_dir = Path(config.run_dir)
    wanted = OmegaConf.create(dataclasses.asdict(config))
    if (run_dir / CONFIG).exists():
        existing = _read_config(run_dir)
        if "train" not in existing:
            raise InputError(f"{run_dir} holds an imported model; train in a new run with init_from={run_dir} name=NEW")
        keys = [str(k) for k in wanted.model if existing.model.get(k) != wanted.model.get(k)]
        differ = sorted(k for k in keys if k not in HOW_IT_IS_COMPUTED)
        if differ:
            raise InputError(f"{run_dir} holds another model ({', '.join(differ)} differ); choose another name=")
        if load_tokenizer(str(run_dir / TOKENIZER)).fingerprint != tokenizer.fingerprint:
            raise InputError(
                f"{run_dir} was trained with another tokenizer than data.tokenizer={config.data.tokenizer}"
            )
    else:
        if (run_dir / CHECKPOINTS).exists():
            raise InputError(f"{run_dir} has checkpoints but no {CONFIG}; choose another name= or remove it")
        tokenizer.save(run_dir / TOKENIZER)
    _write_config(run_dir, wanted)
    return run_dir


def load_run(run_dir: str | Path) -> Run:
    """The newest parameters of a run with their config and tokenizer.

    Raises:
        InputError: not a run, no complete checkpoint, one that cannot be read, or a tokenizer that does not fit it.
    """
    run_dir = Path(run_dir)
    config = _read_config(run_dir)
    model = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), config.model))
    assert isinstance(model, ModelConfig)
    if not (run_dir / CHECKPOINTS).is_dir():
        raise InputError(f"{run_dir} has no checkpoint yet")
    tokenizer = load_tokenizer(str(run_dir / TOKENIZER))
    check_tokenizer(tokenizer, model)
    checkpoints = Checkpoints(run_dir)
    try:
        step = checkpoints.latest_step
        if step is None:
            raise InputError(f"{run_dir} has no complete checkpoint yet")
        trained_with = checkpoints.restore_position(step)["tokenizer"]
        if trained_with != tokenizer.fingerprint:
            raise InputError(f"{run_dir / TOKENIZER} is not the tokenizer that checkpoint {step} was trained with")
        params = checkpoints.restore_params(step, model)
    finally:
        checkpoints.close()
    lengths = tuple(stage.seq_len for stage in config.train.stages) if "train" in config else ()
    return Run(run_dir, model, params, tokenizer, step, lengths)


def save_imported(run_dir: str | Path, model: ModelConfig, params: dict, tokenizer: Tokenizer) -> Path:
    """Writes RUN for parameters that come from elsewhere; nothing is left behind if that fails.

    Raises:
        InputError: RUN exists, the tokenizer does not fit the model, or the disk is full.
    """
    run_dir = Path(run_dir)
    if run_dir.exists():
        raise InputError(f"{run_dir} exists; choose another folder")
    check_tokenizer(tokenizer, model)
    partial = run_dir.with_name(run_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        tokenizer.save(partial / TOKENIZER)
        checkpoints = Checkpoints(partial)
        checkpoints.save(0, {"params": params}, {"tokenizer": tokenizer.fingerprint})
        checkpoints.wait()
        checkpoints.close()
        _write_config(partial, OmegaConf.create({"name": run_dir.name, "model": dataclasses.asdict(model)}))
        partial.rename(run_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return run_dir


def check_tokenizer(tokenizer: Tokenizer, model: ModelConfig) -> None:
    """Raises InputError if the tokenizer has ids that the model does not know."""
    if tokenizer.vocab_size > model.vocab_size:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but model.vocab_size is {model.vocab_size}; "
            f"set model.vocab_size={-(-tokenizer.vocab_size // 64) * 64} or use another tokenizer"
        )


def _read_config(run_dir: Path) -> DictConfig:
    path = run_dir / CONFIG
    if not path.is_file():
        raise InputError(f"{run_dir} is not a run folder: it has no {CONFIG}")
    try:
        config = OmegaConf.load(path)
        assert isinstance(config, DictConfig) and "model" in config
    except Exception as e:
        raise InputError(f"{path} cannot be read ({_reason(e)})") from e
    return config


def _write_config(run_dir: Path, config: DictConfig) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    partial = run_dir / (CONFIG + ".partial")
    OmegaConf.save(config, partial)
    partial.replace(run_dir / CONFIG)
