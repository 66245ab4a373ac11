"""The objectives of fine-tuning and of preference optimisation."""

from typing import Optional

from omegaconf import MISSING

from mla_jax.config.schema import require, require_at_least, require_choice, schema

PREFERENCE_LOSSES = ("sigmoid", "hinge", "ipo", "robust", "cdpo", "sigmoid_norm", "dpop")
SMOOTHED = ("robust", "cdpo")
"""Losses that know how often the preferences are wrong."""


@schema
class PreferenceLossConfig:
    """The loss of a pair of answers; docs/dpo.md has the formulas."""

    name: str = MISSING
    """`sigmoid` (DPO), `hinge`, `ipo`, `robust`, `cdpo`, `sigmoid_norm` (by length) or `dpop`."""
    beta: float = MISSING
    """Scale of log-probability ratios to the reference: the smaller, the further the model may go from it."""
    sft_weight: float = 0.0
    """Weight of the chosen answer's mean negative log-likelihood a token, which is added to the loss (RPO)."""
    label_smoothing: float = 0.0
    """Under `robust` and `cdpo`: the share of pairs whose preference is wrong."""
    dpop_lambda: float = 50.0
    """Under `dpop`: weight of a chosen answer that is less likely than under the reference."""

    def __post_init__(self):
        require_choice("loss.name", self.name, PREFERENCE_LOSSES)
        require(self.beta > 0, f"loss.beta must be positive, got {self.beta}")
        require_at_least(0, **{"loss.sft_weight": self.sft_weight, "loss.dpop_lambda": self.dpop_lambda})
        require(
            0 <= self.label_smoothing < 0.5, f"loss.label_smoothing must be in [0, 0.5), got {self.label_smoothing}"
        )
        require(
            self.label_smoothing == 0 or self.name in SMOOTHED,
            f"loss.label_smoothing is of the losses {' and '.join(SMOOTHED)}; loss.name={self.name} ignores it, "
            "so leave it at 0",
        )


SFT_LOSSES = ("cross_entropy", "distill")


@schema
class SftLossConfig:
    """The loss of supervised fine-tuning."""

    name: str = "cross_entropy"
    """`cross_entropy`, or `distill`: cross-entropy mixed with the divergence from another model's predictions."""
    source: Optional[str] = None
    """Under `distill`: the Hugging Face folder of the Llama, Mistral or Qwen that the run was converted from."""
    kl_weight: float = 0.9
    """Under `distill`: share of KL(source || model) in the loss; the rest is cross-entropy."""

    def __post_init__(self):
        require_choice("loss.name", self.name, SFT_LOSSES)
        require(0 <= self.kl_weight <= 1, f"loss.kl_weight must be from 0 to 1, got {self.kl_weight}")
        if self.name == "distill":
            require(bool(self.source), "loss=distill needs loss.source=HF_FOLDER, the model to learn from")
        else:
            require(self.source is None, "loss.source is of loss=distill; cross-entropy has no use for it")
