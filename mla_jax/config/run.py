"""Configuration of a training run, whatever its objective."""

from typing import ClassVar, Optional

from omegaconf import MISSING

from mla_jax.config.data import DataConfig
from mla_jax.config.mesh import MeshConfig
from mla_jax.config.model import ModelConfig
from mla_jax.config.optim import OptimConfig
from mla_jax.config.schema import require, require_choice, schema
from mla_jax.config.tracker import TrackerConfig
from mla_jax.config.train import TrainConfig


@schema
class RunConfig:
    """Everything that a training run is made of; each objective has a class of its own."""

    METRICS: ClassVar[tuple[str, ...]]
    """Metrics of the loss, which `train.best_metric` can name."""

    name: str = MISSING
    run_dir: str = MISSING
    """The run folder: config, tokenizer, checkpoints, metrics, evaluations."""
    seed: int = 0
    init_from: Optional[str] = None
    """A run whose newest parameters to start from; a checkpoint of this run itself takes precedence."""
    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    optim: OptimConfig = MISSING
    mesh: MeshConfig = MISSING
    tracker: TrackerConfig = MISSING
    train: TrainConfig = MISSING

    def __post_init__(self):
        for key in ("name", "run_dir"):
            require(bool(getattr(self, key).strip()), f"{key} is empty; a run needs a name")
        require_choice("train.best_metric", self.train.best_metric, self.METRICS)
        longest = max(stage.seq_len for stage in self.train.stages)
        require(
            longest <= self.model.max_position_embeddings,
            f"train.stages has seq_len {longest}, beyond model.max_position_embeddings "
            f"{self.model.max_position_embeddings}",
        )
        for stage in self.train.stages:
            require(
                stage.seq_len + stage.position_skip_max <= self.model.max_position_embeddings,
                f"train.stages: seq_len {stage.seq_len} + position_skip_max {stage.position_skip_max} is beyond "
                f"model.max_position_embeddings {self.model.max_position_embeddings}",
            )
