"""Progress of a training run, as checkpoints keep it."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from mla_jax.config import TrainConfig
from mla_jax.observability.metrics import Window


@dataclass
class LoopState:
    """Progress of a run: steps finished in all and in the current stage, and the open metrics window.

    `reported` holds the means of the window before, and the stage that it was in; `best` the best validation in this
    stage, and `waited` how many there were since. A checkpoint keeps all of it.
    """

    step: int = 0
    stage: int = 0
    stage_step: int = 0
    window: Window = field(default_factory=Window)
    reported: dict[str, float] = field(default_factory=dict)
    best: float | None = None
    waited: int = 0

    def planned(self, train: TrainConfig) -> int:
        """Finished steps as the schedule counts them: a stage that ended early counts in full."""
        return sum(stage.steps for stage in train.stages[: self.stage]) + self.stage_step

    def to_json(self) -> dict:
        """Every field by name."""
        return {**vars(self), "window": self.window.to_json()}

    @classmethod
    def from_json(cls, saved: dict) -> "LoopState":
        """The state that `to_json` gave; what else is in `saved` is left out."""
        fields: dict[str, Any] = {f.name: saved[f.name] for f in dataclasses.fields(cls) if f.name in saved}
        fields["window"] = Window.from_json(saved["window"])
        return cls(**fields)

    def validated(self, value: float) -> None:
        """Counts a validation; of `value` higher is better."""
        improved = self.best is None or value > self.best
        self.best, self.waited = (value, 0) if improved else (self.best, self.waited + 1)
