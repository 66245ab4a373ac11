"""One optimizer step, jitted: loss, gradients, update; and a forward pass alone."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from mla_jax.config import ModelConfig
from mla_jax.losses.loss import Loss
from mla_jax.model.transformer import bind
from mla_jax.optim import apply_updates
from mla_jax.state import TrainState


def make_forward_step(model: ModelConfig, loss: Loss) -> Callable[..., dict[str, jax.Array]]:
    """The jitted forward pass: (parameters, batch [A, B / A, T], `Loss.shared`) -> sums of the loss over the batch."""

    @jax.jit
    def forward_step(params: dict, batch: dict, shared: dict | None = None) -> dict[str, jax.Array]:
        by_micro_batch = jax.lax.map(lambda rows: loss.sums(bind(model, params), {**rows, **(shared or {})}), batch)
        return jax.tree.map(lambda x: x.sum(axis=0), by_micro_batch)

    return forward_step


def make_train_step(
    model: ModelConfig, optimizer: optax.GradientTransformation, loss: Loss, skip_nonfinite: bool = False
) -> Callable[..., tuple[TrainState, dict]]:
    """The jitted step: (state, batch, learning_rate, `Loss.shared`) -> (state, sums).

    The sums are those of the loss, with grad_norm and skipped.

    Batch arrays are [A, B / A, T] with A gradient accumulation steps. The loss is normalised over the whole batch, so A
    does not change it. The state is donated.
    The backward pass is that of the sum, and its float32 gradients are divided afterwards. Divided before, gradients of
    activations would be below what float16 holds if the batch is large; those of the sum are each token's own, so that
    they need no loss scale.
    With `skip_nonfinite`, a step whose loss or gradient is not finite changes nothing but `step`: its sums are 0, and
    `skipped` is 1.
    """

    def objective(params: dict, rows: dict, shared: dict) -> tuple[jax.Array, dict[str, jax.Array]]:
        sums = loss.sums(bind(model, params), {**rows, **shared})
        return sums["loss"], sums

    grad = jax.grad(objective, has_aux=True)

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(
        state: TrainState, batch: dict, rate: jax.Array, shared: dict | None = None
    ) -> tuple[TrainState, dict]:
        shared = shared or {}
        normalizer = loss.normalizer(batch)

        def first() -> tuple[dict, dict[str, jax.Array]]:
            return grad(state.params, jax.tree.map(lambda x: x[0], batch), shared)

        def accumulate(total, rows):
            new = grad(state.params, rows, shared)
            return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, new), None

        if batch["tokens"].shape[0] == 1:
            grads, sums = first()
        else:
            zeros = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), state.params)
            no_sums = dict.fromkeys(jax.eval_shape(first)[1], jnp.zeros((), jnp.float32))
            (grads, sums), _ = jax.lax.scan(accumulate, (zeros, no_sums), batch)
        grads = jax.tree.map(lambda g: (g.astype(jnp.float32) / normalizer).astype(g.dtype), grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = apply_updates(state.params, updates, rate)
        new = TrainState(state.step + 1, params, opt_state)
        metrics = {**sums, "grad_norm": optax.tree.norm(grads), "skipped": jnp.zeros(())}
        if skip_nonfinite:
            finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
            old = state._replace(step=new.step), jax.tree.map(jnp.zeros_like, metrics) | {"skipped": jnp.ones(())}
            return jax.tree.map(functools.partial(jnp.where, finite), (new, metrics), old)
        return new, metrics

    return train_step
