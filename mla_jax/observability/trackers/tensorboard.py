"""Metrics as TensorBoard event files."""

from pathlib import Path
from uuid import uuid4

import yaml


class TensorBoardTracker:
    """Event files in RUN/tensorboard; what was logged after step `step` by an interrupted process is hidden."""

    def __init__(self, run_dir: Path, step: int, start: dict):
        from tensorboardX import SummaryWriter

        # Files are named by the second: the suffix keeps apart processes that start within one.
        suffix = f".from{step + 1}"
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1, filename_suffix=suffix)
        self._writer.add_text("start", f"```yaml\n{yaml.safe_dump(start, sort_keys=False)}```", step + 1)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Writes one event for each metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self, finished: bool) -> None:
        """Writes what is buffered."""
        self._writer.close()


def add_metrics(run_dir: Path, step: int, metrics: dict[str, float]) -> None:
    """Adds event files in RUN/tensorboard/eval.

    Beside those of training TensorBoard would take a new file for their continuation, and read on from there only.
    """
    from tensorboardX import SummaryWriter

    suffix = f".{uuid4().hex}"  # evaluations that end within a second each have a file
    with SummaryWriter(str(run_dir / "tensorboard" / "eval"), filename_suffix=suffix) as writer:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
