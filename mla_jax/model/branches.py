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
    """Which token belongs to what, in a batch of rows with two regions."""

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
    q_BTHK: jax.Array,
    latents: Any,
    causal: Callable[[jax.Array, Any, jax.Array | None], OutLse],
    to_all: Callable[[jax.Array, Any, jax.Array, jax.Array], OutLse],
) -> jax.Array:
    """Attention of both regions of each row; out_BTHV.

    Args:
        branches: who sees what.
        q_BTHK: queries.
        latents: a pytree of arrays [B, T, ...], what keys and values are made of.
        causal: (queries, latents, segments or None) of one region; its tokens see themselves and those before them.
        to_all: (queries, latents, segments of the queries, segments of the latents); queries see all of their segment.
    """
    arrays = q_BTHK, latents, branches.prompts_BT, branches.branches_BT
    split = q_BTHK.shape[1] - branches.size
    prompt, branch = (jax.tree.map(lambda x, cut=cut: x[:, cut], arrays) for cut in (slice(split), slice(split, None)))
    q_prompt, latents_prompt, prompts, _ = prompt
    q_branch, latents_branch, continued, own = branch
    out_prompt, _ = causal(q_prompt, latents_prompt, prompts if branches.packed else None)
    # Every token sees itself at least, so that the log-sum-exp of the first part is finite.
    parts = causal(q_branch, latents_branch, own), to_all(q_branch, latents_prompt, continued, prompts)
    out_branch, _ = latent_attention.merge(*parts[0], *parts[1])
    return jnp.concatenate([out_prompt, out_branch], axis=1)
