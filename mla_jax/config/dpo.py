"""Configuration of `experiments.dpo`."""

from typing import ClassVar, Optional

from omegaconf import MISSING

from mla_jax.config.loss import PreferenceLossConfig
from mla_jax.config.preference import PreferenceDataConfig
from mla_jax.config.run import RunConfig
from mla_jax.config.schema import require, schema


@schema
class DpoConfig(RunConfig):
    """Configuration of `python -m experiments.dpo`."""

    METRICS: ClassVar[tuple[str, ...]] = ("rewards/accuracies", "rewards/margins", "rewards/chosen", "loss")

    data: PreferenceDataConfig = MISSING
    loss: PreferenceLossConfig = MISSING
    reference: Optional[str] = None
    """The run whose newest parameters are the reference; None for `init_from`."""

    def __post_init__(self):
        super().__post_init__()
        require(
            self.init_from is not None,
            "init_from is not set: preference optimisation starts from a run, such as init_from=runs/nano-needle, "
            "which is the reference too unless reference= names another",
        )
