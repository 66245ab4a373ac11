"""Log-probabilities of the tokens of branches; see `model.branches`. No other tokens get logits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mla_jax import mesh
from mla_jax.losses.log_probs import target_log_probs
from mla_jax.losses.loss import Arrays
from mla_jax.model.branches import Branches, branch_region
from mla_jax.model.layers import join_chunks, matmul, split_tokens
from mla_jax.model.transformer import Transformer


class TokenStatistics(NamedTuple):
    """The log-probability of each target of the branch region and the like, [B, R], in the order of `branch_region`."""

    log_probs_BR: jax.Array
    """float32, nats; the only one that has gradients."""
    is_greedy_BR: jax.Array
    """bool, see `target_log_probs`."""
    entropy_BR: jax.Array
    """float32, nats, of the distribution that the target is drawn from."""
    mean_logit_BR: jax.Array
    """float32, over the vocabulary."""


def branch_log_probs(transformer: Transformer, rows: Arrays, size: int, packed: bool, chunk: int) -> TokenStatistics:
    """Log-probabilities of the targets of the branch region, and statistics of the logits that they come from.

    The logits of a chunk are made when it is its turn, and again in the backward pass.

    Args:
        transformer: the model bound to parameters.
        rows: int32 arrays [B, T] `tokens`, `positions`, `targets`, `prompts` and `branches`.
        size: R, the tokens of the branch region.
        packed: True if a row may hold several prompts.
        chunk: tokens of a row whose logits exist at one time.
    """
    branches = Branches(rows["prompts"], rows["branches"], size, packed)
    h_BTD = transformer(rows["tokens"], rows["positions"], branches=branches)
    h_BRD, targets_BR = branch_region((h_BTD, rows["targets"]), size)
    return token_statistics(transformer.head(), h_BRD, targets_BR, chunk)


def token_statistics(head_DX: jax.Array, h_BRD: jax.Array, targets_BR: jax.Array, chunk: int) -> TokenStatistics:
    """The statistics of `branch_log_probs` for given hidden states; see there."""

    def in_chunks(h_BRD, targets_BR, head_DX) -> TokenStatistics:
        @jax.checkpoint
        def body(_, xs):
            h_BtD, targets_Bt = xs
            return None, _statistics(h_BtD, targets_Bt, head_DX)

        here = h_BRD.shape[1]
        chunks = tuple(split_tokens(x, min(chunk, here)) for x in (h_BRD, targets_BR))
        return jax.tree.map(lambda x_nBt: join_chunks(x_nBt, here), jax.lax.scan(body, None, chunks)[1])

    return mesh.per_device(in_chunks, h_BRD, targets_BR, mesh.all_gather(head_DX))


def _statistics(h_BtD: jax.Array, targets_Bt: jax.Array, head_DX: jax.Array) -> TokenStatistics:
    logits_BtX = matmul(h_BtD, head_DX, jnp.float32)
    log_probs_Bt, lse_Bt, is_greedy_Bt = target_log_probs(logits_BtX, targets_Bt)
    fixed_BtX, lse_Bt = jax.lax.stop_gradient((logits_BtX, lse_Bt))
    probs_BtX = jnp.exp(fixed_BtX - lse_Bt[..., None])
    entropy_Bt = lse_Bt - jnp.sum(probs_BtX * fixed_BtX, axis=-1)
    return TokenStatistics(log_probs_Bt, is_greedy_Bt, entropy_Bt, jnp.mean(fixed_BtX, axis=-1))
