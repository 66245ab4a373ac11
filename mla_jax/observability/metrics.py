"""Training metrics: sums over a window of steps, and the line or bar a person watches."""

import sys
import time
from dataclasses import dataclass

from tqdm import tqdm


@dataclass
class Window:
    """Sums over the steps since the last report; saved with checkpoints, so resuming continues them exactly."""

    steps: int = 0
    loss: float = 0.0
    weight: float = 0.0
    correct: float = 0.0
    answers: float = 0.0
    grad_norm: float = 0.0
    skipped: float = 0.0
    """Steps that changed nothing, their loss or gradient not being finite; in no other sum but `steps`."""

    def add(self, step: dict[str, float]) -> None:
        """Adds one step's sums."""
        self.steps += 1
        for name, value in step.items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def accuracy(self) -> float:
        """Share of answer tokens predicted right, teacher-forced."""
        return self.correct / max(self.answers, 1.0)

    def means(self) -> dict[str, float]:
        """Loss in nats per weighted token, answer-token accuracy, gradient norm before clipping."""
        return {
            "loss": self.loss / max(self.weight, 1e-9),
            "answer_accuracy": self.accuracy,
            "grad_norm": self.grad_norm / max(self.steps - self.skipped, 1),
            "skipped_steps": self.skipped,
        }


class ProgressDisplay:
    """A progress bar on a terminal, a line every few seconds elsewhere, nothing if not `shown`."""

    def __init__(self, total_steps: int, first_step: int, shown: bool = True, seconds_between_lines: float = 10.0):
        self._total = total_steps
        self._bar = tqdm(total=total_steps, initial=first_step, unit="step") if shown and sys.stderr.isatty() else None
        self._shown = shown
        self._between = seconds_between_lines
        self._printed = float("-inf")

    def show(self, step: int, text: str) -> None:
        """Moves to `step` (of the planned steps) with `text` beside it."""
        if self._bar is not None:
            self._bar.n = step
            self._bar.set_postfix_str(text)
        elif self._shown and (time.monotonic() - self._printed >= self._between or step >= self._total):
            self._printed = time.monotonic()
            print(f"step {step}/{self._total}  {text}", flush=True)

    def close(self) -> None:
        """Ends the bar's line."""
        if self._bar is not None:
            self._bar.close()
