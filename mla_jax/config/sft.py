"""Configuration of `experiments.sft`."""

from typing import ClassVar

from mla_jax.config.run import RunConfig
from mla_jax.config.schema import schema


@schema
class SftConfig(RunConfig):
    """Configuration of `python -m experiments.sft`."""

    METRICS: ClassVar[tuple[str, ...]] = ("answer_accuracy", "loss")
