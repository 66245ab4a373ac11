"""Experiment trackers."""

from typing import Optional

from omegaconf import MISSING

from mla_jax.config.schema import require, require_choice, schema


@schema
class TrackerConfig:
    """Experiment trackers that get the metrics."""

    names: list[str] = MISSING
    """Any of `tensorboard`, `wandb`, `mlflow`; empty for none."""
    project: str = "infinitecontext"
    """W&B's project, MLflow's experiment."""
    wandb_mode: Optional[str] = None
    """`online`, or `offline` for files that `wandb sync` uploads; null for what WANDB_MODE says, else online."""
    mlflow_uri: Optional[str] = None
    """MLflow's store; null for MLFLOW_TRACKING_URI, else mlflow.db in the folder that holds the run folder."""

    def __post_init__(self):
        for name in self.names:
            require_choice("tracker.names", name, ("tensorboard", "wandb", "mlflow"))
        require(len(set(self.names)) == len(self.names), f"tracker.names has a name twice: {', '.join(self.names)}")
        if self.wandb_mode is not None:
            require_choice("tracker.wandb_mode", self.wandb_mode, ("online", "offline"))
