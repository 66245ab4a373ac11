"""Training state: a plain pytree of arrays."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mla_jax.config import ModelConfig
from mla_jax.mesh import with_concrete_shardings
from mla_jax.model.transformer import init_params


class TrainState(NamedTuple):
    """Parameters and optimizer state are sharded alike; `step` counts finished optimizer steps."""

    step: jax.Array
    params: dict
    opt_state: optax.OptState


def init_state(model: ModelConfig, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """A fresh state, created where it is sharded."""
    return with_params(init_params(model, seed), optimizer)


def with_params(params: dict, optimizer: optax.GradientTransformation) -> TrainState:
    """Step 0 with given parameters."""
    return TrainState(jnp.zeros((), jnp.int32), params, jax.jit(optimizer.init)(params))


def abstract_state(model: ModelConfig, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes, types and placement of `init_state`'s result; nothing is allocated."""
    return with_concrete_shardings(jax.eval_shape(lambda: init_state(model, optimizer, 0)))
