"""Orbax checkpoints of a run: saved while training goes on, checked before they are read.

RUN/checkpoints/STEP/params/         parameters, which is all that evaluation, export and another run's start read
RUN/checkpoints/STEP/optimizer/      optimizer state
RUN/checkpoints/STEP/position/       loop state: step, stage, data position, open metrics
RUN/checkpoints/STEP/metrics/        metrics of the last window, by which `best` is chosen
RUN/checkpoints/STEP/manifest.json   sizes and checksums of all of these
RUN/checkpoints/STEP.corrupt/        quarantined: found corrupt when training was resumed
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from mla_jax.checkpoint.intact import choose_intact, complete_steps, folder_errors, quarantine_corrupt
from mla_jax.checkpoint.manifest import entries_of, write_manifest
from mla_jax.checkpoint.ranking import Rank
from mla_jax.checkpoint.restoring import restore_arrays, restore_json
from mla_jax.checkpoint.streaming import open_params, params_save
from mla_jax.config import ModelConfig, TrainConfig
from mla_jax.distributed.barrier import FailFastBarrier
from mla_jax.distributed.decisions import broadcast_decision, wait_until_visible
from mla_jax.errors import InputError, first_line
from mla_jax.mesh import with_concrete_shardings
from mla_jax.model.transformer import abstract_params
from mla_jax.state import TrainState

CHECKPOINTS = "checkpoints"
SAVE_TIMEOUT_S = 3600
"""The longest that the background part of a save may take; a process that fails ends it at once."""


class Checkpoints:
    """The checkpoints in RUN/checkpoints; a step's folder appears only when it is complete.

    All processes of a job call each method at the same point. Each writes and reads its own shards; the first process
    decides for all which step to read, which is corrupt, and whether there is room for another.
    """

    def __init__(self, run_dir: Path, train: TrainConfig | None = None):
        """Opens the folder; with `train`, to train on from its newest checkpoint and keep what that config says.

        Then the newest checkpoint is checked. If it is corrupt, it is quarantined (renamed to STEP.corrupt) with a
        warning, and so on until one is intact, which is then `latest_step`; what a killed save left is removed.

        Raises:
            InputError: there are checkpoints, and all are corrupt; nothing is renamed then.
        """
        self.folder = (run_dir / CHECKPOINTS).resolve()
        self._saving = 0
        self._failed: Exception | None = None
        self._barrier = FailFastBarrier()
        policy, rank = None, None
        broadcast_decision(self._make_folder)
        wait_until_visible(self.folder)
        if train is not None:
            quarantine_corrupt(self.folder)
            rank = Rank(train.best_metric)
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
                single_host_load_and_broadcast=True,  # each listing may be another, on a network file system
                cleanup_tmp_directories=train is not None,  # a reader may meet one that is being written
                async_options=ocp.AsyncOptions(
                    post_finalization_callback=self._write_manifest,
                    barrier_sync_fn=self._synchronize,
                    timeout_secs=SAVE_TIMEOUT_S,
                ),
            ),
        )

    @property
    def latest_step(self) -> int | None:
        """The newest step that is saved or being saved, None without any."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, loop_state: dict, metrics: dict[str, float] | None = None) -> None:
        """Starts saving; arrays may be donated right after.

        Args:
            step: the folder's name, more than that of every checkpoint before.
            state: arrays, each process writing its shards; or parameters that are `LazyArray`, on one process.
            loop_state: JSON-able.
            metrics: `stage` and the metrics of the last window of steps; without them no best checkpoint.

        Raises:
            InputError: this or the previous save failed, on a full disk for instance.
        """
        self.wait()
        broadcast_decision(lambda: self._check_space(state))
        self._saving = step
        items: dict[str, Any] = {
            "params": params_save(state.params),
            "optimizer": ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
            "position": ocp.args.JsonSave(loop_state),
        }
        with self._save_errors():
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)

    def wait(self) -> None:
        """Returns when what `save` started is on disk. Raises InputError as `save` does."""
        with self._save_errors():
            if self._failed:
                raise self._failed
            self._manager.wait_until_finished()

    def check(self) -> None:
        """Raises InputError as `save` does if what that started has failed by now; waits for nothing."""
        if broadcast_decision(lambda: int(self._has_failed())):
            self.wait()

    def _has_failed(self) -> bool:
        if not self._manager.is_saving_in_progress():
            try:
                self._manager.wait_until_finished()
            except Exception as e:  # which Orbax raises once
                self._failed = e
        return self._failed is not None

    def choose(self, which: str, best_metric: str) -> int:
        """Returns the step whose parameters are to be read.

        Args:
            which: `latest` or `best`, which pass over corrupt checkpoints with a warning, or a step.
            best_metric: the metric that `best` compares; lower is better for `loss`, higher for all others.

        Raises:
            InputError: there is no such checkpoint, or none that can be used.
        """
        return choose_intact(self.folder, which, best_metric)

    def restore_state(self, step: int, abstract: TrainState) -> tuple[TrainState, dict]:
        """State and loop state of `step`, placed as `abstract` says. Raises InputError if they cannot be read."""
        folder, optimizer = self.folder / str(step), {"step": abstract.step, "opt_state": abstract.opt_state}
        with self._read_errors(step):
            params = restore_arrays(folder / "params", abstract.params)
            optimizer = restore_arrays(folder / "optimizer", optimizer)
            return TrainState(optimizer["step"], params, optimizer["opt_state"]), restore_json(folder / "position")

    def restore_loop_state(self, step: int) -> dict:
        """The loop state of `step` alone. Raises InputError if it cannot be read."""
        with self._read_errors(step):
            return restore_json(self.folder / str(step) / "position")

    def restore_params(self, step: int, model: ModelConfig) -> dict:
        """The parameters of `step` alone, on the current mesh or the first device. Raises InputError as above."""
        abstract = with_concrete_shardings(abstract_params(model))
        with self._read_errors(step):
            return restore_arrays(self.folder / str(step) / "params", abstract)

    def open_params(self, step: int, model: ModelConfig) -> dict:
        """The parameters of `step` as arrays that stay on disk, of TensorStore. Raises InputError as above."""
        with self._read_errors(step):
            return open_params(self.folder / str(step) / "params", abstract_params(model))

    def close(self) -> None:
        """Waits for saves and releases Orbax's threads."""
        with contextlib.suppress(Exception):  # a failed save was reported by `save` or `wait`
            self._manager.close()

    def _synchronize(self, *, key: str, timeout_ms: int) -> None:
        """The barrier of Orbax's threads; each process posts the checksums of what it wrote where all have written."""
        if "async_write_complete" in key:  # under another name, the first process would read all files
            mine = entries_of(self._unfinished, f"*/ocdbt.process_{jax.process_index()}/**/*")
            self._barrier.post(str(self._saving), json.dumps(mine).replace(ocp.path.step.TMP_DIR_SUFFIX, ""))
        self._barrier(key=key, timeout_ms=timeout_ms)

    def _write_manifest(self) -> None:
        """Orbax calls this on the first process, in the background, when the files of all processes are written."""
        known = {}
        for text in self._barrier.collect(str(self._saving)):
            known |= json.loads(text)
        write_manifest(self._unfinished, known)

    @property
    def _unfinished(self) -> Path:
        return self.folder / f"{self._saving}{ocp.path.step.TMP_DIR_SUFFIX}"

    def _make_folder(self) -> None:
        with folder_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)

    def _check_space(self, state: Any) -> None:
        """Raises InputError if the disk is too small, before anything is written to it."""
        needed = sum(x.nbytes for x in jax.tree.leaves(state))
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise self._save_error(f"{needed / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are free")

    def _save_error(self, reason: str) -> InputError:
        complete = complete_steps(self.folder)
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

    @contextlib.contextmanager
    def _read_errors(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as e:
            raise InputError(
                f"checkpoint {self.folder / str(step)} cannot be read ({first_line(e)}), though its files are as they "
                "were written; use the model, the optim and the version that it was saved with"
            ) from e
