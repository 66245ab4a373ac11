"""Metrics in Weights & Biases."""

import uuid
from pathlib import Path
from typing import Any

from mla_jax.config import RunConfig, TrackerConfig
from mla_jax.observability.trackers.tracker import CLOSE_SECONDS


class WandbTracker:
    """A run on a W&B server, or files in RUN/wandb for `wandb sync`. Account and key are W&B's own business.

    `known["id"]` is the run's id, chosen here the first time.
    """

    def __init__(self, config: RunConfig, run_dir: Path, known: dict, start: dict):
        known.setdefault("id", uuid.uuid4().hex[:12])
        self._run = _open_run(
            config.tracker,
            run_dir,
            known["id"],
            name=config.name,
            config=start["config"] | {"environment": start["environment"]},
            allow_val_change=True,  # a resumed run may have another config
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Hands the metrics to W&B's own process."""
        self._run.log(metrics, step=step, commit=True)

    def close(self, finished: bool) -> None:
        """Waits for uploads; a run that was stopped counts as failed until it is resumed."""
        self._run.finish(exit_code=0 if finished else 1)


def add_metrics(config: TrackerConfig, run_dir: Path, run_id: str, step: int, metrics: dict[str, float]) -> None:
    """Adds metrics to a run; W&B's own steps only grow, so charts of these get `eval/step` for their axis."""
    run = _open_run(config, run_dir, run_id)
    try:
        run.define_metric("eval/*", step_metric="eval/step")
        run.log({"eval/step": step, **metrics})
    finally:
        run.finish()


def _open_run(tracker: TrackerConfig, run_dir: Path, run_id: str, **options: Any) -> Any:
    import wandb

    mode: Any = tracker.wandb_mode  # None: WANDB_MODE decides
    return wandb.init(
        project=tracker.project,
        id=run_id,
        resume="allow",
        mode=mode,
        dir=str(run_dir),
        settings=wandb.Settings(
            console="off",
            finish_timeout=CLOSE_SECONDS,
            x_transaction_log_flush_interval=1.0,  # a killed process loses metrics of so many seconds, not of 15
        ),
        **options,
    )
