"""The length curriculum and the training loop."""

from dataclasses import field
from typing import Optional

from omegaconf import MISSING

from mla_jax.config.schema import require, require_at_least, require_choice, schema


@schema
class StageConfig:
    """One stage of the length curriculum."""

    seq_len: int = MISSING
    """Tokens per sequence."""
    batch_size: int = MISSING
    """Sequences per optimizer step, over all devices and accumulation steps."""
    steps: int = MISSING
    """The most optimizer steps in this stage."""
    learning_rate: float = MISSING
    accuracy: Optional[float] = None
    """Go on to the next stage as soon as the accuracy over `train.log_every` steps (of answer tokens) reaches this."""
    previous_fraction: float = 0.0
    """Share of steps taken at the previous stage's length and batch size."""
    position_skip_fraction: float = 0.0
    """Share of steps whose positions jump 1 to 3 times, to train positions beyond `seq_len`."""
    position_skip_max: int = 0
    """The largest total jump, log-uniform; 0 for none."""

    def __post_init__(self):
        require_at_least(2, **{"train.stages.seq_len": self.seq_len})
        require_at_least(1, **{"train.stages.batch_size": self.batch_size, "train.stages.steps": self.steps})
        require(self.learning_rate > 0, f"train.stages.learning_rate must be positive, got {self.learning_rate}")
        for name in ("previous_fraction", "position_skip_fraction", "accuracy"):
            value = getattr(self, name)
            require(value is None or 0 <= value <= 1, f"train.stages.{name} must be in [0, 1], got {value}")
        require_at_least(0, **{"train.stages.position_skip_max": self.position_skip_max})


@schema
class TrainConfig:
    """The training loop."""

    stages: list[StageConfig] = field(default_factory=list)
    grad_accumulation: int = 1
    """Micro-batches a step; gradients are summed in float32."""
    loss_chunk: int = 1024
    """Tokens of a sequence whose logits exist at one time."""
    log_every: int = 10
    checkpoint_every: int = 200
    """Steps between checkpoints; one is also saved at the end and on Ctrl-C."""
    keep_last: int = 2
    """The newest checkpoints that are kept."""
    keep_best: int = 1
    """The best checkpoints that are kept besides; 0 for none."""
    best_metric: str = "answer_accuracy"
    """The metric of the loss that ranks checkpoints, on held-out data if they have it, else over the last `log_every`
    steps; a later stage ranks higher."""
    validate_every: int = 0
    """Steps between validations, on data that is never trained on, 0 for none; one is also made when a stage has had
    all its steps. A multiple of `log_every`; `checkpoint_every` is a multiple of it, or it of `checkpoint_every`."""
    validation_batches: int = 8
    """The most held-out batches of a validation, the same ones at every time in a stage."""
    early_stopping: int = 0
    """End a stage after so many validations in a row in which `best_metric` was no better than before; 0 for never."""
    nonfinite: str = "stop"
    """At a step whose loss or gradient is not finite: `stop`, or `skip` it and leave parameters and moments alone."""
    on_data_change: str = "stop"
    """Resuming where the rows of a data set come in another order: `stop`, or `restart` the stage's data."""
    compilation_cache: Optional[str] = "auto"
    """Folder in which compiled programs are kept for later processes; `auto` is the user's cache folder, null none."""
    profile: list[int] = field(default_factory=list)
    """[FIRST, LAST]: write a trace of these steps, counted from 1 in each process, to RUN/profile; empty for none."""
    measure_peak: bool = True
    """On a GPU, time a matrix product at the start, to state MFU against the measured peak too."""

    def __post_init__(self):
        require_choice("train.nonfinite", self.nonfinite, ("stop", "skip"))
        require_choice("train.on_data_change", self.on_data_change, ("stop", "restart"))
        require(
            self.profile == [] or (len(self.profile) == 2 and 1 <= self.profile[0] <= self.profile[1]),
            f"train.profile must be [FIRST, LAST] with 1 <= FIRST <= LAST, got {self.profile}",
        )
        require(len(self.stages) > 0, "train.stages needs at least one stage")
        for name in ("grad_accumulation", "loss_chunk", "log_every", "checkpoint_every", "keep_last"):
            require_at_least(1, **{f"train.{name}": getattr(self, name)})
        require_at_least(1, **{"train.validation_batches": self.validation_batches})
        for name in ("keep_best", "validate_every", "early_stopping"):
            require_at_least(0, **{f"train.{name}": getattr(self, name)})
        self._check_validation()
        for stage in self.stages:
            require(
                stage.batch_size % self.grad_accumulation == 0,
                f"train.grad_accumulation={self.grad_accumulation} must divide batch_size={stage.batch_size}",
            )
        require(self.stages[0].previous_fraction == 0, "the first of train.stages has no previous stage to mix in")
        require(
            self.stages[-1].accuracy is None,
            "the last of train.stages must not end early (accuracy): the learning rate would never decay",
        )

    def _check_validation(self) -> None:
        every = self.validate_every
        require(not self.early_stopping or every > 0, "train.early_stopping needs train.validate_every=STEPS")
        require(
            every % self.log_every == 0,
            f"train.validate_every={every} must be a multiple of train.log_every={self.log_every}",
        )
        require(
            every == 0 or 0 in (self.checkpoint_every % every, every % self.checkpoint_every),
            f"one of train.validate_every={every} and train.checkpoint_every={self.checkpoint_every} must be a "
            "multiple of the other, so that checkpoints are ranked by what was measured at their step",
        )
