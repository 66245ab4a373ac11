"""Experiment trackers."""

from typing import Optional

from omegaconf import MISSING

from mla_jax.config.schema import require, require_choice, schema


@schema
class TrackerConfig:
    """Experiment trackers that get the metrics."""

    names: list[str] = MISSING
    """Any of `tensorboard`, `wandb`, `mlflow`, `prometheus`; empty for none."""
    project: str = "infinitecontext"
    """W&B's project, MLflow's experiment."""
    wandb_mode: Optional[str] = None
    """`online`, or `offline` for files that `wandb sync` uploads; null for what WANDB_MODE says, else online."""
    mlflow_uri: Optional[str] = None
    """MLflow's store; null for MLFLOW_TRACKING_URI, else mlflow.db in the folder that holds the run folder."""
    prometheus_host: str = "127.0.0.1"
    """Address of this machine on which the first process answers Prometheus; `0.0.0.0` for every one."""
    prometheus_port: int = 0
    """Its port; 0 for any that is free."""
    prometheus_targets: Optional[str] = None
    """Folder of the file that tells Prometheus of the run; null for prometheus_targets beside the run folder."""

    def __post_init__(self):
        for name in self.names:
            require_choice("tracker.names", name, ("tensorboard", "wandb", "mlflow", "prometheus"))
        require(len(set(self.names)) == len(self.names), f"tracker.names has a name twice: {', '.join(self.names)}")
        require(
            0 <= self.prometheus_port < 2**16, f"tracker.prometheus_port={self.prometheus_port} is no port (0 to 65535)"
        )
        if self.wandb_mode is not None:
            require_choice("tracker.wandb_mode", self.wandb_mode, ("online", "offline"))
