"""Optimizers and the learning rate.

The rate is a plain function of where the run is in its curriculum, passed to the jitted step as a number; the
optimizers therefore run at rate 1.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from mla_jax.config import OptimConfig, StageConfig
from mla_jax.mesh import with_auto_sharding
from mla_jax.model.layers import is_norm


def _muon_axes(params: Any) -> Any:
    """Muon's axes of each matrix of the stacked layers [L, in, out]; None (AdamW) for norms, embedding and head."""
    return jax.tree.map_with_path(
        lambda path, _: MuonDimensionNumbers(1, 2) if path[0].key == "layers" and not is_norm(path) else None, params
    )


def _decays(params: dict) -> dict:
    """Weight decay for matrices, embedding and head, not for norms."""
    return jax.tree.map_with_path(lambda path, _: not is_norm(path), params)


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """Clipping, then AdamW or Muon, at learning rate 1 (multiply its updates by the rate)."""
    if config.name == "adamw":
        rule = optax.adamw(
            1.0, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=_decays
        )
    else:
        rule = muon(
            1.0,
            beta=0.95,
            weight_decay=config.weight_decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            eps=config.eps,
            adam_learning_rate=config.adam_lr_ratio,
            muon_weight_dimension_numbers=_muon_axes,
        )
    rule = optax.chain(optax.clip_by_global_norm(config.clip_norm), rule)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return with_auto_sharding(rule.update, (updates, state))(updates, state, params)

    return optax.GradientTransformation(rule.init, update)


def apply_updates(params: dict, updates: Any, learning_rate: jax.Array) -> dict:
    """Parameters moved by learning_rate x updates, computed in float32 and kept in each parameter's type."""
    return jax.tree.map(
        lambda p, u: (p.astype(jnp.float32) + learning_rate * u.astype(jnp.float32)).astype(p.dtype), params, updates
    )


def learning_rate(config: OptimConfig, stages: list[StageConfig], stage: int, stage_step: int) -> float:
    """The rate of step `stage_step` (from 0) of stage `stage`: the stage's rate x warm-up x schedule.

    Progress is counted in planned steps: a stage that ends early moves it to the next stage's start, so that the
    decay at the end is always complete.
    """
    planned = [s.steps for s in stages]
    step, total = sum(planned[:stage]) + stage_step, sum(planned)
    factor = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "cosine":
        span = max(total - config.warmup_steps, 1)
        done = min(max(step - config.warmup_steps, 0) / span, 1.0)
        factor *= config.final_ratio + (1 - config.final_ratio) * (1 + math.cos(math.pi * done)) / 2
    elif config.schedule == "wsd" and config.decay_fraction > 0:
        left = min((total - step) / (config.decay_fraction * total), 1.0)
        factor *= config.final_ratio + (1 - config.final_ratio) * left
    return stages[stage].learning_rate * factor
