"""Chunked cross-entropy: the logits of a whole sequence never exist."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mla_jax import mesh
from mla_jax.model.layers import product, split_tokens


class LossSums(NamedTuple):
    """Sums over tokens, float32 scalars; divide by what the caller averages over."""

    loss: jax.Array
    """Weighted negative log-likelihood in nats."""
    weight: jax.Array
    correct: jax.Array
    """Answer tokens (weight 1) whose most likely token is the target."""
    answers: jax.Array


def chunked_cross_entropy(
    head_DX: jax.Array, h_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, chunk: int
) -> LossSums:
    """Cross-entropy of next-token targets, `chunk` tokens of each sequence at a time.

    Args:
        head_DX: makes logits of the model's output; see `Transformer.head`.
        h_BTD: the model's output.
        targets_BT: int32 token ids.
        weights_BT: float32 loss weight of each target, 0 to leave it out.
        chunk: tokens of a sequence whose logits exist at one time; they are computed again in the backward pass.
    """

    def sums(h_BtD, targets_Bt, weights_Bt, head_DX) -> LossSums:
        logits_BtX = product(h_BtD, head_DX, jnp.float32)
        target_logit_Bt = jnp.take_along_axis(logits_BtX, targets_Bt[..., None], axis=-1)[..., 0]
        nll_Bt = jax.nn.logsumexp(logits_BtX, axis=-1) - target_logit_Bt
        answer_Bt = (weights_Bt >= 1.0).astype(jnp.float32)
        correct_Bt = answer_Bt * (jnp.argmax(logits_BtX, axis=-1) == targets_Bt)
        return LossSums(jnp.sum(nll_Bt * weights_Bt), jnp.sum(weights_Bt), jnp.sum(correct_Bt), jnp.sum(answer_Bt))

    def of_device(h_BTD, targets_BT, weights_BT, head_DX) -> LossSums:
        """Sums [1, 1] of the tokens that are here."""

        def body(total: LossSums, xs) -> tuple[LossSums, None]:
            return jax.tree.map(jnp.add, total, sums(*xs, head_DX)), None

        # Padding has weight 0.
        chunks = tuple(split_tokens(x, min(chunk, h_BTD.shape[1])) for x in (h_BTD, targets_BT, weights_BT))
        zero = LossSums(*(jnp.zeros((), jnp.float32) for _ in LossSums._fields))
        return jax.tree.map(lambda x: x[None, None], jax.lax.scan(jax.checkpoint(body), zero, chunks)[0])

    parts = mesh.per_device(of_device, h_BTD, targets_BT, weights_BT, mesh.gather(head_DX))
    return jax.tree.map(jnp.sum, parts)
