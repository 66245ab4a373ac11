"""One optimizer step, jitted: loss, gradients, update."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from mla_jax.config import ModelConfig
from mla_jax.losses import LossSums, chunked_cross_entropy
from mla_jax.model.transformer import bind
from mla_jax.optim import apply_updates
from mla_jax.state import TrainState


def make_train_step(
    model: ModelConfig, optimizer: optax.GradientTransformation, loss_chunk: int
) -> Callable[[TrainState, dict, jax.Array], tuple[TrainState, dict]]:
    """The jitted step: (state, batch, learning_rate) -> (state, sums of LossSums' fields and grad_norm).

    Batch arrays are [A, B / A, T] with A gradient accumulation steps. The loss is the weighted mean over the whole
    batch, so A does not change it. The state is donated.
    """

    def loss(params: dict, rows: dict, weight: jax.Array) -> tuple[jax.Array, LossSums]:
        transformer = bind(model, params)
        h_BTD = transformer(rows["tokens"], rows["positions"], rows.get("segments"))
        sums = chunked_cross_entropy(transformer.head(), h_BTD, rows["targets"], rows["weights"], loss_chunk)
        return sums.loss / weight, sums

    grad = jax.grad(loss, has_aux=True)

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, batch: dict, rate: jax.Array) -> tuple[TrainState, dict]:
        weight = jnp.maximum(batch["weights"].sum(), 1e-9)

        def accumulate(total, rows):
            new = grad(state.params, rows, weight)
            return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, new), None

        if batch["tokens"].shape[0] == 1:
            grads, sums = grad(state.params, jax.tree.map(lambda x: x[0], batch), weight)
        else:
            zeros = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), state.params)
            no_sums = LossSums(*(jnp.zeros((), jnp.float32) for _ in LossSums._fields))
            (grads, sums), _ = jax.lax.scan(accumulate, (zeros, no_sums), batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = apply_updates(state.params, updates, rate)
        return TrainState(state.step + 1, params, opt_state), {**sums._asdict(), "grad_norm": optax.tree.norm(grads)}

    return train_step
