"""Log-probabilities of given tokens, from the logits of a chunk of them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class TargetLogProbs(NamedTuple):
    """The likelihood of each target of a chunk, [B, t]."""

    log_probs_Bt: jax.Array
    """float32, nats."""
    log_sum_exp_Bt: jax.Array
    """float32, of each token's logits."""
    is_greedy_Bt: jax.Array
    """bool, no token is more likely than the target; where several are the most likely, each of them counts."""


def target_log_probs(logits_BtX: jax.Array, targets_Bt: jax.Array) -> TargetLogProbs:
    """Log-softmax at the targets only.

    Args:
        logits_BtX: float32, for every token of the vocabulary.
        targets_Bt: int32 token ids.
    """
    highest_Bt = jax.lax.stop_gradient(jnp.max(logits_BtX, axis=-1))  # what is subtracted has no part in the result
    lse_Bt = highest_Bt + jnp.log(jnp.sum(jnp.exp(logits_BtX - highest_Bt[..., None]), axis=-1))
    target_logit_Bt = jnp.take_along_axis(logits_BtX, targets_Bt[..., None], axis=-1)[..., 0]
    return TargetLogProbs(target_logit_Bt - lse_Bt, lse_Bt, target_logit_Bt >= highest_Bt)
