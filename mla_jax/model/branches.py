"""Branches: several continuations of a prompt, which share one pass over it.

A row [T] is a *prompt region*, P = T - R tokens, and behind it a *branch region*, the last R. The prompt region holds
prompts, padded at the end; the branch region holds continuations, each of which goes on where its prompt's part of the
prompt region ends, in positions too, and sees that part and itself. So nothing is computed twice that two continuations
of a prompt have in common, and what is computed is what ordinary rows, prompt and continuation, would give.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

import latent_attention
from mla_jax import mesh

OutLse = tuple[jax.Array, jax.Array]
"""Attention's output [B, T, H, V] and the log-sum-exp [B, T, H] of its scores."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Branches:
    """The prompt and the branch of each token, in a batch of rows with two regions."""

    prompts_BT: jax.Array
    """int32, the prompt (1, 2, ...) that a token is of or continues; 0 on padding."""
    branches_BT: jax.Array
    """int32, the branch (1, 2, ...) that a token is of; 0 in the prompt region and on padding."""
    size: int = field(metadata={"static": True})
    """R, the tokens of the branch region."""
    packed: bool = field(metadata={"static": True})
    """True if a row may hold several prompts; with one, attention over it needs no mask but the causal one."""


def branch_region(arrays: Any, size: int) -> Any:
    """The last `size` tokens of each row of a pytree of arrays [B, T, ...], sharded as those are."""

    def last(x_BTX: jax.Array) -> jax.Array:
        here = size // mesh.num_sequence_shards(x_BTX)
        return mesh.per_device(lambda x: x[:, x.shape[1] - here :], x_BTX)

    return jax.tree.map(last, arrays)


def attend(
    branches: Branches,
    shards: int,
    q_BTHK: jax.Array,
    latents: Any,
    causal: Callable[[jax.Array, Any, jax.Array | None], jax.Array],
    partial: Callable[..., OutLse],
) -> jax.Array:
    """Attention of both regions of each row; out_BTHV. Inside `mesh.per_device`.

    Devices that share a sequence send each other queries and latents of the branch region, which is small. Each attends
    with all of these queries to the part of the prompt region that it holds.

    Args:
        branches: who sees what.
        shards: devices that share a sequence.
        q_BTHK: queries.
        latents: a pytree of arrays [B, T, ...], what keys and values are made of.
        causal: the output of (queries, latents, segments or None) of a whole region.
        partial: the output and log-sum-exp of (queries, latents, offset of the first query, segments of the queries,
            segments of the latents), all on this device.
    """

    def gather(arrays: Any) -> Any:
        return arrays if shards == 1 else jax.tree.map(mesh.all_gather_tokens, arrays)

    arrays = q_BTHK, latents, branches.prompts_BT, branches.branches_BT
    split = q_BTHK.shape[1] - branches.size // shards
    prompt, branch = (jax.tree.map(lambda x, cut=cut: x[:, cut], arrays) for cut in (slice(split), slice(split, None)))
    q, own_latents, prompts, own = branch
    prompt_q, prompt_latents, prompt_numbers, _ = prompt
    out_prompt = causal(prompt_q, prompt_latents, prompt_numbers if branches.packed else None)

    start = 0 if shards == 1 else mesh.sequence_shard() * q.shape[1]
    to_own = partial(q, gather(own_latents), start, own, gather(own))
    # Every query sees the whole prompt region, so far as it is of its prompt.
    to_prompt = partial(gather(q), prompt_latents, split, gather(prompts), prompt_numbers)
    if shards > 1:
        to_prompt = mesh.merge_tokens(*to_prompt, shards)
    # Every token sees itself at least, so that one of the two has a finite log-sum-exp.
    out_branch, _ = latent_attention.merge(*to_own, *to_prompt)
    return jnp.concatenate([out_prompt, out_branch], axis=1)
