"""Training metrics: sums over a window of steps, and the progress line or bar."""

import sys
import time
from dataclasses import dataclass, field

from tqdm import tqdm

from mla_jax.losses.loss import Loss, mean


@dataclass
class Window:
    """Sums over the steps since the last report; saved with checkpoints, so resuming continues them exactly."""

    steps: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    """Results of the training steps, added up by name: the sums of the loss, grad_norm and skipped."""

    @property
    def skipped(self) -> float:
        """Steps that changed nothing, their loss or gradient not being finite; in no other sum but `steps`."""
        return self.sums.get("skipped", 0.0)

    def add(self, step: dict[str, float]) -> None:
        """Adds one step's sums."""
        self.steps += 1
        for name, value in step.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def means(self, loss: Loss) -> dict[str, float]:
        """The metrics of `loss`, gradient norm before clipping (mean over steps not skipped), skipped steps."""
        return loss.means(self.sums) | {
            "grad_norm": mean(self.sums.get("grad_norm", 0.0), self.steps - self.skipped),
            "skipped_steps": self.skipped,
        }

    def next(self, loss: Loss) -> "Window":
        """The window after this one: empty, but for the totals of `loss`."""
        return Window(sums={name: self.sums[name] for name in loss.totals if name in self.sums})

    def to_json(self) -> dict[str, float]:
        """`steps` and every sum by name, flat."""
        return {"steps": self.steps, **self.sums}

    @classmethod
    def from_json(cls, saved: dict[str, float]) -> "Window":
        """The window that `to_json` gave."""
        return cls(int(saved["steps"]), {name: value for name, value in saved.items() if name != "steps"})


_SECONDS_BETWEEN_LINES = 10.0


class ProgressDisplay:
    """A progress bar on a terminal, a line every few seconds elsewhere, nothing if not `shown`."""

    def __init__(self, total_steps: int, first_step: int, shown: bool = True, unit: str = "step"):
        self._total = total_steps
        self._bar = tqdm(total=total_steps, initial=first_step, unit=unit) if shown and sys.stderr.isatty() else None
        self._shown, self._unit = shown, unit
        self._printed = float("-inf")

    def show(self, step: int, text: str) -> None:
        """Moves to `step` (of the planned steps) with `text` beside it."""
        if self._bar is not None:
            self._bar.n = step
            self._bar.set_postfix_str(text)
        elif self._shown and (time.monotonic() - self._printed >= _SECONDS_BETWEEN_LINES or step >= self._total):
            self._printed = time.monotonic()
            print(f"{self._unit} {step}/{self._total}  {text}", flush=True)

    def close(self) -> None:
        """Ends the bar's line."""
        if self._bar is not None:
            self._bar.close()
