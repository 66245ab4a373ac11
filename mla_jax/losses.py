"""Chunked cross-entropy: the logits of a whole sequence never exist."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mla_jax.model.transformer import Transformer


class LossSums(NamedTuple):
    """Sums over tokens, float32 scalars; divide by what the caller averages over."""

    loss: jax.Array
    """Weighted negative log-likelihood in nats."""
    weight: jax.Array
    correct: jax.Array
    """Answer tokens (weight 1) whose most likely token is the target."""
    answers: jax.Array


def chunked_cross_entropy(
    model: Transformer, h_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, chunk: int
) -> LossSums:
    """Cross-entropy of next-token targets, `chunk` tokens of each sequence at a time.

    Args:
        model: gives the logits.
        h_BTD: the model's output.
        targets_BT: int32 token ids.
        weights_BT: float32 loss weight of each target, 0 to leave it out.
        chunk: tokens of a sequence whose logits exist at one time; they are computed again in the backward pass.
    """

    def sums(h_BtD, targets_Bt, weights_Bt) -> LossSums:
        logits_BtX = model.logits(h_BtD)
        target_logit_Bt = jnp.take_along_axis(logits_BtX, targets_Bt[..., None], axis=-1)[..., 0]
        nll_Bt = jax.nn.logsumexp(logits_BtX, axis=-1) - target_logit_Bt
        answer_Bt = (weights_Bt >= 1.0).astype(jnp.float32)
        correct_Bt = answer_Bt * (jnp.argmax(logits_BtX, axis=-1) == targets_Bt)
        return LossSums(jnp.sum(nll_Bt * weights_Bt), jnp.sum(weights_Bt), jnp.sum(correct_Bt), jnp.sum(answer_Bt))

    length = h_BTD.shape[1]
    if length <= chunk:
        return sums(h_BTD, targets_BT, weights_BT)

    def split(x):
        """[B, T, ...] -> [T / chunk, B, chunk, ...], zero-padded (zero weight) to a whole number of chunks."""
        x = jnp.pad(x, [(0, 0), (0, -length % chunk)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    def body(total: LossSums, xs) -> tuple[LossSums, None]:
        return jax.tree.map(jnp.add, total, sums(*xs)), None

    zero = LossSums(*(jnp.zeros((), jnp.float32) for _ in LossSums._fields))
    return jax.lax.scan(jax.checkpoint(body), zero, (split(h_BTD), split(targets_BT), split(weights_BT)))[0]
