"""Where metrics go besides the terminal."""

from pathlib import Path
from typing import Protocol

from mla_jax.config import TrackerConfig


class Tracker(Protocol):
    """Takes scalar metrics by optimizer step."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Records `metrics` at `step`."""
        ...

    def close(self) -> None:
        """Writes what is buffered."""
        ...


class NoTracker:
    """Keeps nothing."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class TensorBoardTracker:
    """Event files in `folder`; a resumed run hides what the interrupted one logged after its last checkpoint."""

    def __init__(self, folder: Path, first_step: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Writes one event for each metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what is buffered."""
        self._writer.close()


def make_tracker(config: TrackerConfig, run_dir: Path, first_step: int) -> Tracker:
    """The tracker that `config` names; `first_step` is the first step that will be logged."""
    if config.name == "tensorboard":
        return TensorBoardTracker(run_dir / "tensorboard", first_step)
    return NoTracker()
