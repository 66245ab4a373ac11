"""Orbax checkpoints of a run: saved while training goes on, checked before they are read.

RUN/checkpoints/STEP/params/         parameters, which is all that evaluation, export and another run's start read
RUN/checkpoints/STEP/optimizer/      optimizer state
RUN/checkpoints/STEP/position/       stage, data order, open metrics: where the loop goes on
RUN/checkpoints/STEP/metrics/        what `train.best_metric` is compared by
RUN/checkpoints/STEP/manifest.json   sizes and checksums of all of these
RUN/checkpoints/STEP.corrupt/        a checkpoint that was found damaged when training was resumed
"""

import contextlib
import itertools
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from mla_jax.checkpoint.manifest import damage, write_manifest
from mla_jax.checkpoint.streaming import open_params, params_save
from mla_jax.config import ModelConfig, TrainConfig
from mla_jax.distributed.decisions import decide_together
from mla_jax.errors import InputError, first_line
from mla_jax.mesh import placed
from mla_jax.model.transformer import abstract_params
from mla_jax.state import TrainState

CHECKPOINTS = "checkpoints"


class Checkpoints:
    """The checkpoints in RUN/checkpoints; a step's folder appears only when it is complete.

    All processes of a job call each method at the same point. Each writes and reads its own shards; what is said of a
    step (which to read, which is damaged, whether there is room for another) is decided by the first process.
    """

    def __init__(self, run_dir: Path, train: TrainConfig | None = None):
        """Opens the folder; with `train`, to train on from its newest checkpoint and keep what that config says.

        Then the newest checkpoint is checked. If it is damaged, it is renamed to STEP.corrupt with a warning, and so
        on until one is sound, which is then `latest_step`; what a killed save left is removed.

        Raises:
            InputError: there are checkpoints, and all are damaged; nothing is renamed then.
        """
        self.folder = (run_dir / CHECKPOINTS).resolve()
        self._saving = 0
        policy, rank = None, None
        if train is not None:
            decide_together(self._set_damaged_aside)
            rank = _Rank(train.best_metric)
            policy = ocp.checkpoint_managers.AnyPreservationPolicy(
                [
                    ocp.checkpoint_managers.LatestN(train.keep_last),
                    ocp.checkpoint_managers.BestN(
                        get_metric_fn=rank, n=train.keep_best, keep_checkpoints_without_metrics=False
                    ),
                ]
            )
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy,
                best_fn=rank,
                cleanup_tmp_directories=train is not None,  # a reader may meet one that is being written
                async_options=ocp.AsyncOptions(post_finalization_callback=self._before_it_gets_its_name),
            ),
        )

    @property
    def latest_step(self) -> int | None:
        """The newest step that is saved or being saved, None without any."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, position: dict, metrics: dict[str, float] | None = None) -> None:
        """Starts saving; arrays may be donated right after.

        Args:
            step: the folder's name, more than that of every checkpoint before.
            state: arrays, each process writing its shards; or parameters that are `Unwritten`, on one process.
            position: JSON-able.
            metrics: `stage` and the metrics of the last window of steps; without them no best checkpoint.

        Raises:
            InputError: this or the previous save failed, on a full disk for instance.
        """
        self.wait()
        decide_together(lambda: self._check_space(state))
        self._saving = step
        items: dict[str, Any] = {
            "params": params_save(state.params),
            "optimizer": ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
            "position": ocp.args.JsonSave(position),
        }
        with self._save_errors():
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)

    def wait(self) -> None:
        """Returns when what `save` started is on disk. Raises InputError as `save` does."""
        with self._save_errors():
            self._manager.wait_until_finished()

    def choose(self, which: str, best_metric: str) -> int:
        """The step to read the parameters of.

        Args:
            which: `latest` or `best`, which pass over damaged checkpoints with a warning, or a step.
            best_metric: what `best` goes by: `answer_accuracy` or `loss`.

        Raises:
            InputError: there is no such checkpoint, or none that can be used.
        """
        step = decide_together(lambda: self._choose(which, best_metric))
        assert step is not None
        return step

    def restore_state(self, step: int, abstract: TrainState) -> tuple[TrainState, dict]:
        """State and position of `step`, placed as `abstract` says. Raises InputError if they cannot be read."""
        optimizer = {"step": abstract.step, "opt_state": abstract.opt_state}
        items: dict[str, Any] = {
            "params": ocp.args.StandardRestore(abstract.params),
            "optimizer": ocp.args.StandardRestore(optimizer),
            "position": ocp.args.JsonRestore(),
        }
        restored = self._restore(step, items)
        optimizer = restored["optimizer"]
        return TrainState(optimizer["step"], restored["params"], optimizer["opt_state"]), restored["position"]

    def restore_position(self, step: int) -> dict:
        """The position of `step` alone. Raises InputError if it cannot be read."""
        return self._restore(step, {"position": ocp.args.JsonRestore()})["position"]

    def restore_params(self, step: int, model: ModelConfig) -> dict:
        """The parameters of `step` alone, on the current mesh or the first device. Raises InputError as above."""
        return self._restore(step, {"params": ocp.args.StandardRestore(placed(abstract_params(model)))})["params"]

    def open_params(self, step: int, model: ModelConfig) -> dict:
        """The parameters of `step` as arrays that stay on disk, of TensorStore. Raises InputError as above."""
        with self._read_errors(step):
            return open_params(self.folder / str(step) / "params", abstract_params(model))

    def close(self) -> None:
        """Waits for saves and releases Orbax's threads."""
        with contextlib.suppress(Exception):  # a failed save was reported by `save` or `wait`
            self._manager.close()

    def complete_steps(self) -> list[int]:
        """Steps of the complete checkpoints on disk, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdigit())

    def _before_it_gets_its_name(self) -> None:
        """Orbax calls this on the first process, in the background, when the files of all processes are written."""
        write_manifest(self.folder / f"{self._saving}{ocp.path.step.TMP_DIR_SUFFIX}")

    def _damage(self, step: int, items: tuple[str, ...] | None = None) -> str | None:
        return damage(self.folder / str(step), items)

    def _set_damaged_aside(self) -> None:
        steps = self.complete_steps()[::-1]
        damaged = {}
        for step in steps:
            reason = self._damage(step)
            if reason is None:
                break
            damaged[step] = reason
        if not steps:
            return
        if len(damaged) == len(steps):
            raise self._none_usable(damaged)
        newest = steps[len(damaged)]
        for step in steps[len(damaged) + 1 :]:  # only what Orbax reads of them at its start
            if reason := self._damage(step, ("metrics",)):
                damaged[step] = reason
        for step, reason in damaged.items():
            aside = self._set_aside(step)
            _warn(f"checkpoint {self.folder / str(step)} is damaged ({reason}), now {aside.name}; using step {newest}")

    def _set_aside(self, step: int) -> Path:
        names = (f"{step}.corrupt" + (f".{i}" if i else "") for i in itertools.count())
        aside = next(self.folder / name for name in names if not (self.folder / name).exists())
        return (self.folder / str(step)).rename(aside)

    def _choose(self, which: str, best_metric: str) -> int:
        steps = self.complete_steps()
        if not steps:
            raise InputError(f"{self.folder} has no complete checkpoint yet")
        if which == "best":
            steps.sort(key=lambda step: self._rank(step, best_metric))
        elif which != "latest":
            if which not in map(str, steps):
                raise InputError(f"{self.folder} has no checkpoint {which}, but {', '.join(map(str, steps))}")
            steps = [int(which)]
        damaged = {}
        for step in steps[::-1]:
            reason = self._damage(step, ("params", "position", "metrics"))
            if reason is None:
                for bad, why in damaged.items():
                    _warn(f"checkpoint {self.folder / str(bad)} is damaged ({why}); using step {step}")
                return step
            damaged[step] = reason
        raise self._none_usable(damaged)

    def _rank(self, step: int, best_metric: str) -> tuple[float, float]:
        """Higher is better; a checkpoint whose metrics cannot be read, or were not saved, comes last."""
        try:
            return _Rank(best_metric)(json.loads((self.folder / str(step) / "metrics" / "metrics").read_bytes()))
        except (OSError, ValueError, KeyError, TypeError):
            return (-1.0, 0.0)

    def _none_usable(self, damaged: dict[int, str]) -> InputError:
        names = "; ".join(f"step {step}: {reason}" for step, reason in sorted(damaged.items()))
        return InputError(
            f"damaged checkpoints in {self.folder} and none to use instead ({names}); put a copy of one back, "
            "ask for another step, or train anew with another name="
        )

    def _check_space(self, state: Any) -> None:
        """A disk that is too small is better noticed before anything is written to it."""
        needed = sum(x.nbytes for x in jax.tree.leaves(state))
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise self._save_error(f"{needed / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are free")

    def _save_error(self, reason: str) -> InputError:
        complete = self.complete_steps()
        kept = f"the last complete checkpoint is step {complete[-1]}" if complete else "none was complete before"
        return InputError(
            f"could not save a checkpoint in {self.folder} ({reason}); {kept}; make room if that disk is full and run "
            "the same command to go on"
        )

    @contextlib.contextmanager
    def _save_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as e:
            raise self._save_error(first_line(e)) from e

    def _restore(self, step: int, items: dict[str, Any]) -> Any:
        with self._read_errors(step):
            return self._manager.restore(step, args=ocp.args.Composite(**items))

    @contextlib.contextmanager
    def _read_errors(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as e:
            raise InputError(
                f"checkpoint {self.folder / str(step)} cannot be read ({first_line(e)}), though its files are as they "
                "were written; use the model, the optim and the version that it was saved with"
            ) from e


class _Rank:
    """Orders metrics: a later stage of the curriculum, which is harder, before a better value; higher is better."""

    def __init__(self, metric: str):
        self._metric = metric

    def __call__(self, metrics: dict[str, float]) -> Any:
        value = metrics[self._metric]
        return metrics["stage"], -value if self._metric == "loss" else value


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)
