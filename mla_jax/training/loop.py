"""The training loop: a model, a loss and a pipeline, from scratch or from given parameters.

What a run does at a step depends only on the config and the step, and every checkpoint holds the data position, so a
run interrupted anywhere and resumed is bit for bit the run that was not interrupted.
"""

import contextlib
import dataclasses
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from mla_jax.checkpoint.manager import Checkpoints
from mla_jax.checkpoint.run_folder import check_run, check_tokenizer, load_params, record_run
from mla_jax.checkpoint.run_lock import RunLock, lock_run
from mla_jax.config import RunConfig, require, require_choice
from mla_jax.data.pipeline import MakePipeline, Pipeline
from mla_jax.data.tokenizer import load_tokenizer
from mla_jax.distributed.decisions import on_all
from mla_jax.distributed.join import is_main, print_on_main
from mla_jax.distributed.preemption import Stopped, StopRequest
from mla_jax.errors import InputError
from mla_jax.losses.loss import VALIDATION, Loss, goodness
from mla_jax.mesh import check_batch, make_mesh, place_batch, replicate, rows_here
from mla_jax.observability.metrics import ProgressDisplay
from mla_jax.observability.telemetry import Telemetry
from mla_jax.observability.trackers import check_installed
from mla_jax.optim import learning_rate, make_optimizer
from mla_jax.state import TrainState, abstract_state, init_state, with_params
from mla_jax.training.ahead import Ahead
from mla_jax.training.loop_state import LoopState
from mla_jax.training.resume import data_settings, describe_changes
from mla_jax.training.step import make_train_step
from mla_jax.training.validation import Validation

MAX_STEPS_IN_FLIGHT = 2
"""The most steps that are dispatched to the device before the result of an earlier one is there."""


@dataclass(frozen=True)
class TrainResult:
    """Outcome of a run: not `finished` after Ctrl-C or SIGTERM, which makes it `terminated` too."""

    run_dir: Path
    step: int
    finished: bool
    terminated: bool
    metrics: dict[str, float] | None
    """Means of the last metrics window and its tokens_per_second; None if no window ended in this process."""
    accuracy_metric: str
    """The loss's, a name in `metrics`, on held-out data if the run has some."""


def train(config: RunConfig, loss: Loss, make_pipeline: MakePipeline, stop: StopRequest | None = None) -> TrainResult:
    """Trains until the last stage ends or Ctrl-C / SIGTERM, resuming what `config.run_dir` holds.

    Precedence: a checkpoint of this run, then `init_from`, then random initialisation.

    Args:
        config: the run's configuration.
        loss: what is minimised, and what is reported of it.
        make_pipeline: makes the batches of a stage; called with `config.data` again for each.
        stop: what tells of Ctrl-C and SIGTERM, if a pipeline whose batches take long wants to ask too: told to stop, it
            raises Stopped in place of a batch.

    Raises:
        InputError: bad data, tokenizer or checkpoint, a failed save, a loss that is no longer finite, or a run that
            another process trains.
        UsageError: parameters in 16 bits.
    """
    with jax.set_mesh(make_mesh(config.mesh)), lock_run(Path(config.run_dir)) as lock:
        return _Trainer(config, loss, make_pipeline, lock, stop or StopRequest()).run()


class _Trainer:
    def __init__(self, config: RunConfig, loss: Loss, make_pipeline: MakePipeline, lock: RunLock, stop: StopRequest):
        self.config, self.loss, self.make_pipeline, self.lock, self.stop = config, loss, make_pipeline, lock, stop
        # Half a unit in the last place of a bfloat16 1.0 is 0.002: no update of a usual size would change a norm.
        require(
            config.model.param_dtype == "float32",
            f"model.param_dtype={config.model.param_dtype} is for inference: in training most updates would be rounded "
            "away; leave it at float32 (model.dtype=bfloat16 computes in 16 bits); to train on from such a run, start "
            "a new one with init_from=RUN",
        )
        check_installed(config.tracker)
        require_choice("train.best_metric", config.train.best_metric, tuple(loss.means({})))
        tokenizer = on_all(lambda: load_tokenizer(config.data.tokenizer))
        check_tokenizer(tokenizer, config.model)
        self.tokenizer = tokenizer
        optimizer = make_optimizer(config.optim)
        self.train_step = Ahead(make_train_step(config.model, optimizer, loss, config.train.nonfinite == "skip"))
        self.prepared = 0  # the last stage that was made ready before its first step
        self.shared = replicate(loss.shared)
        for stage in config.train.stages:
            check_batch(stage.batch_size, stage.seq_len, config.train.grad_accumulation, loss.branch_tokens)
        self.loop = LoopState()
        self.data = on_all(lambda: self._pipeline(0))  # bad data ends here, before anything is in the run folder
        self.validation: Validation | None = None
        if config.train.validate_every:
            held_out = functools.partial(self._pipeline, validation=True)
            self.validation = on_all(lambda: Validation(config, loss, held_out, 0, self.shared))
        self.held_out: dict[str, float] = {}  # the means of the last validation
        check_run(config, tokenizer)
        self.run_dir = Path(config.run_dir)
        self.checkpoints = Checkpoints(self.run_dir, config.train)
        self.state = self._restore_or_init(optimizer)
        self.last_metrics: dict[str, float] | None = None
        self.warned = False
        self.pending: list[dict] = []  # metrics of steps that have not been read from the device
        self.telemetry = Telemetry(config, self.run_dir, self.loop.step, loss.branch_tokens or None)
        record_run(config, tokenizer)  # last, so that a command that is refused leaves the run as it was

    def _pipeline(self, stage: int, validation: bool = False) -> Pipeline:
        c = self.config
        # Processes would be started anew for each validation.
        data = dataclasses.replace(c.data, workers=0) if validation else c.data
        return self.make_pipeline(
            data, self.tokenizer, c.train.stages, stage, c.seed,
            rows_of=lambda batch_size: rows_here(batch_size, c.train.grad_accumulation), validation=validation,
        )  # fmt: skip

    def _restore_or_init(self, optimizer: optax.GradientTransformation) -> TrainState:
        step = self.checkpoints.latest_step
        if step is None:
            if self.config.init_from is None:
                return init_state(self.config.model, optimizer, self.config.seed)
            params = load_params("init_from", self.config.init_from, self.config.model, self.tokenizer)
            return with_params(params, optimizer)
        state, saved = self.checkpoints.restore_state(step, abstract_state(self.config.model, optimizer))
        self.loop = LoopState.from_json(saved)
        if self.loop.stage >= len(self.config.train.stages):
            raise InputError(f"{self.run_dir} is in stage {self.loop.stage + 1}, but train.stages has fewer")
        self.data = on_all(lambda: self._pipeline(self.loop.stage))
        self.data.set_state(saved["data"], restart=self.config.train.on_data_change == "restart")
        now = data_settings(self.config, self.loop.stage)
        changes = describe_changes(saved.get("data_settings", now), now)  # which earlier versions did not keep
        if self._stage_over() and not self._finished():  # the run had ended, and a stage was added since
            self._next_stage()
        print_on_main(f"Resuming {self.run_dir} at step {step}{changes}")
        return state

    def run(self) -> TrainResult:
        train, loop = self.config.train, self.loop
        display = ProgressDisplay(sum(s.steps for s in train.stages), loop.planned(train), is_main())
        try:
            with self.stop:
                with contextlib.suppress(Stopped):
                    while not self._finished() and not self.stop.reached(f"step {loop.step}"):
                        self._step()
                        if loop.step % train.log_every == 0 or self._stage_over():
                            self._read_pending()
                            self.checkpoints.check()
                            reached = self._report(display, self._validate())
                            if (reached or self._stage_over()) and not self._finished():
                                with self.telemetry.clock.spend("other"):
                                    self._next_stage()
                        if loop.step % train.checkpoint_every == 0:
                            self._save()
                if self.checkpoints.latest_step != loop.step:
                    self._save()
                with self.telemetry.clock.spend("checkpoint"):
                    self.checkpoints.wait()
        finally:
            self.data.close()
            self.train_step.close()
            display.close()
            self.telemetry.close(self._finished())
            self.checkpoints.close()
        accuracy = self.loss.accuracy_metric
        if VALIDATION + accuracy in (self.last_metrics or {}):
            accuracy = VALIDATION + accuracy
        return TrainResult(self.run_dir, loop.step, self._finished(), self.stop.terminated, self.last_metrics, accuracy)

    def _stage_over(self) -> bool:
        train, loop = self.config.train, self.loop
        return loop.stage_step >= train.stages[loop.stage].steps or 0 < train.early_stopping <= loop.waited

    def _finished(self) -> bool:
        return self.loop.stage == len(self.config.train.stages) - 1 and self._stage_over()

    def _step(self) -> None:
        """One optimizer step."""
        loop, c = self.loop, self.config
        with self.telemetry.clock.wait_for_data(self.pending):
            rows = next(self.data)
        batch = place_batch(rows, c.train.grad_accumulation, self.loss.branch_tokens)
        rate = jnp.float32(learning_rate(c.optim, c.train.stages, loop.stage, loop.stage_step))
        with self.telemetry.dispatch(batch["tokens"].shape, self.pending):
            self.state, metrics = self.train_step(self.state, batch, rate, self.shared)
            self.pending.append(metrics)
        self._prepare_next_stage(batch, rate)
        # Steps that are queued must run before a checkpoint can be saved.
        jax.block_until_ready(self.pending[:-MAX_STEPS_IN_FLIGHT][-1:])
        loop.step += 1
        loop.stage_step += 1

    def _prepare_next_stage(self, batch: dict, rate: jax.Array) -> None:
        stages, number = self.config.train.stages, self.loop.stage + 1
        if self.prepared < number < len(stages):
            self.prepared, stage = number, stages[number]
            # Other pipelines do more at their beginning: a reference model reads all of the stage, for instance.
            plain = type(self.data) is Pipeline and self.config.data.workers > 0
            make_data = functools.partial(self._pipeline, number) if plain else None
            arguments = self.state, batch, rate, self.shared
            self.train_step.prepare(arguments, stage.batch_size, stage.seq_len, make_data)

    def _next_stage(self) -> None:
        self.loop.stage += 1
        self.loop.stage_step = 0
        self.loop.best, self.loop.waited = None, 0
        self.data.close()
        self.data = self.train_step.take_data() or self._pipeline(self.loop.stage)

    def _read_pending(self) -> None:
        """Moves the metrics of finished steps into the window; a loss that is not finite ends the run."""
        first = self.loop.step - len(self.pending) + 1
        for step, metrics in enumerate(jax.device_get(self.pending), first):
            metrics = {name: float(value) for name, value in metrics.items()}
            if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
                raise self._not_finite(
                    f"loss is {metrics['loss']} (gradient norm {metrics['grad_norm']}) at step {step}"
                )
            self.loop.window.add(metrics)
        self.pending = []
        window = self.loop.window
        if window.skipped == window.steps >= self.config.train.log_every:
            raise self._not_finite(
                f"all of the last {window.steps} steps were skipped, their gradients not being finite"
            )

    def _not_finite(self, what: str) -> InputError:
        self.checkpoints.wait()
        good = self.checkpoints.latest_step
        kept = "no checkpoint was saved before"
        if good is not None:
            kept = f"the last good checkpoint is step {good} in {self.checkpoints.folder}"
        return InputError(
            f"{what}; {kept}; lower learning_rate in train.stages or optim.clip_norm and run the same command to go on "
            "from it"
        )

    def _validate(self) -> dict[str, float]:
        """The metrics on held-out data by their whole names, empty if none are due at this step."""
        train, loop = self.config.train, self.loop
        if self.validation is None or not (loop.step % train.validate_every == 0 or self._stage_over()):
            return {}
        with self.telemetry.clock.spend("other"):
            self.held_out = self.validation.means(self.state.params, loop.stage)
        loop.validated(goodness(train.best_metric, self.held_out[train.best_metric]))
        if 0 < train.early_stopping <= loop.waited:
            what = f"{VALIDATION}{train.best_metric} was no better in {loop.waited} validations"
            print_on_main(f"\nStage {loop.stage + 1} ends at step {loop.step}: {what}")
        return {VALIDATION + name: value for name, value in self.held_out.items()}

    def _report(self, display: ProgressDisplay, validation: dict[str, float]) -> bool:
        """Logs the window and starts a new one; returns whether it reached the stage's accuracy threshold."""
        loop, train = self.loop, self.config.train
        stage = train.stages[loop.stage]
        means = loop.window.means(self.loss)
        reached = stage.accuracy is not None and means[self.loss.accuracy_metric] >= stage.accuracy
        rate = learning_rate(self.config.optim, train.stages, loop.stage, loop.stage_step)
        speed = self.telemetry.report(loop.step, means | {"learning_rate": rate, "stage": loop.stage}, validation)
        self.last_metrics = {**means, **validation, "tokens_per_second": self.telemetry.tokens_per_second}
        self._warn(means)
        loop.window, loop.reported = loop.window.next(self.loss), {"stage": loop.stage, **means, **validation}
        held_out = f"  validation: {self.loss.progress(self.held_out)}" if self.held_out else ""
        display.show(
            loop.planned(train),
            f"stage {loop.stage + 1}/{len(train.stages)} ({stage.seq_len} tokens)  "
            f"{self.loss.progress(means)}{held_out}  {speed}",
        )
        return reached

    def _warn(self, means: dict[str, float]) -> None:
        """Prints what the loss finds wrong with a window, where that of the window before was right."""
        before, warning = self.loop.reported, None
        if before.get("stage") == self.loop.stage:
            warning = self.loss.warning(before, means)
        if warning and not self.warned:
            print_on_main(f"\nwarning: step {self.loop.step}: {warning}")
        self.warned = warning is not None

    def _save(self) -> None:
        self._read_pending()
        self.lock.check()
        loop = self.loop
        saved = {
            **loop.to_json(),
            "data": self.data.get_state(),
            "data_settings": data_settings(self.config, loop.stage),
            "tokenizer": self.tokenizer.fingerprint,
        }
        metrics = loop.reported or {"stage": loop.stage, **loop.window.means(self.loss)}
        with self.telemetry.saving(loop.step):
            self.checkpoints.save(loop.step, self.state, saved, metrics)
