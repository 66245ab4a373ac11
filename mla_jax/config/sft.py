"""Configuration of `experiments.sft`."""

from dataclasses import field
from typing import ClassVar

from mla_jax.config.data import JsonlDataConfig, ValidationConfig
from mla_jax.config.loss import SftLossConfig
from mla_jax.config.run import RunConfig
from mla_jax.config.schema import require, schema


@schema
class SftConfig(RunConfig):
    """Configuration of `python -m experiments.sft`."""

    METRICS: ClassVar[tuple[str, ...]] = ("answer_accuracy", "loss")

    loss: SftLossConfig = field(default_factory=SftLossConfig)

    def __post_init__(self):
        super().__post_init__()
        validation = self.data.validation if isinstance(self.data, JsonlDataConfig) else ValidationConfig()
        require(
            self.train.validate_every > 0 or validation == ValidationConfig(),
            "data.validation is never evaluated; set train.validate_every=STEPS",
        )
        require(
            self.loss.name != "distill" or self.mesh.context == 1,
            f"loss=distill needs mesh.context=1, got {self.mesh.context}: the other model reads whole sequences",
        )
