"""The optimizer and the learning-rate schedule."""

from omegaconf import MISSING

from mla_jax.config.schema import require, require_at_least, require_choice, schema


@schema
class OptimConfig:
    """Optimizer and learning-rate shape; the peak rate belongs to the training stages."""

    name: str = MISSING
    """`adamw`, or `muon` (matrices by Muon, the rest by AdamW)."""
    weight_decay: float = 0.01
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8
    adam_lr_ratio: float = 1.0
    """Under `muon`: AdamW's learning rate as a share of the stage's rate."""
    clip_norm: float = 1.0
    """Largest global gradient norm."""
    schedule: str = "wsd"
    """`constant`, `cosine`, or `wsd` (warm-up, stable, decay)."""
    warmup_steps: int = 0
    decay_fraction: float = 0.2
    """Under `wsd`: the share of all steps over which the rate falls linearly."""
    final_ratio: float = 0.0
    """The last step's rate as a share of the stage's rate."""

    def __post_init__(self):
        require_choice("optim.name", self.name, ("adamw", "muon"))
        require_choice("optim.schedule", self.schedule, ("constant", "cosine", "wsd"))
        require_at_least(0, **{"optim.weight_decay": self.weight_decay, "optim.warmup_steps": self.warmup_steps})
        require(self.clip_norm > 0, f"optim.clip_norm must be positive, got {self.clip_norm}")
        for name in ("decay_fraction", "final_ratio"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"optim.{name} must be in [0, 1], got {value}")
