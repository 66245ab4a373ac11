"""Arrays of the fused decoder layer in global memory: arguments, outputs, and the sync workspace."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from latent_attention.call_shapes import LayerShape

PARTIALS_PER_COPY = 8
"""Partial results of the attention that are loaded in one copy."""


def max_partials(num_ctas: int) -> int:
    """Room for partial results: of the new token and of each CTA, whole copies, and a multiple of 128 threads."""
    return -(-(num_ctas + PARTIALS_PER_COPY) // 128) * 128


class Scales(NamedTuple):
    """Scales of the rows of matrices in 8 bits, float32 [out], by the matrices' names in `Refs`."""

    q_a: Any
    kv_a: Any
    q_b: Any
    kv_b: Any
    o: Any
    gate: Any
    up: Any
    down: Any


class Refs(NamedTuple):
    """The kernel's arguments and outputs, in this order. Matrices are flat, except `kv_b`.

    q_a is W^DQ of DeepSeek-V2, kv_a [W^DKV; W^KR], q_b W^UQ and W^QR, head by head, kv_b W^UK and W^UV, head by head,
    and o W^O.
    """

    h: Any
    """Hidden state [D]."""
    input_gamma: Any
    """RMSNorm weight [D], as `post_gamma`; `q_gamma` [Q], `kv_gamma` [C]."""
    q_a: Any
    kv_a: Any
    q_gamma: Any
    q_b: Any
    kv_gamma: Any
    kv_b: Any
    """[H (N + V), C]."""
    cos: Any
    sin: Any
    length: Any
    o: Any
    post_gamma: Any
    gate: Any
    up: Any
    down: Any
    c: Any
    """The cache: latents [1, S, C], updated in place."""
    rope: Any
    """The cache: rotary keys [1, S, R], updated in place."""
    workspace: Any
    """See `Workspace`; updated in place."""
    out: Any
    partial_out: Any
    """Partial results of the attention over latents, normalised: [max_partials, H, C]."""
    partial_lse: Any
    """Their log-sum-exps, base 2, by which they are combined: float32 [H, max_partials]."""
    timeline: Any = None
    """See `timeline`; left out unless the phases are timed."""
    scales: Scales | None = None
    """Of weights in 8 bits; None if they are in 16."""
    cache_scales: Any = None
    """Of a cache in 8 bits, float32 [1, 2, S], of latents and of rotary keys, updated in place; None if in 16 bits."""

    @classmethod
    def of(cls, args: tuple, int8: bool, int8_cache: bool) -> "Refs":
        """References to the kernel's arguments and outputs.

        Among them, the scales of weights in 8 bits come before the cache, and those of a cache in 8 bits after it.
        """
        before, rest = cls._fields.index("c"), list(args)
        scales = Scales(*(rest.pop(before) for _ in Scales._fields)) if int8 else None
        cache_scales = rest.pop(cls._fields.index("workspace")) if int8_cache else None
        return cls(*rest)._replace(scales=scales, cache_scales=cache_scales)


class Workspace(NamedTuple):
    """The sync workspace, int32: the counter of the grid barrier and a mailbox for each vector that CTAs hand on."""

    counter: Any
    qkv_a: Any
    """Latents of the query, then of keys and values with the rotary key, before their norms: [Q + C + R]."""
    q: Any
    """Queries, before RoPE: [H (N + R)]."""
    absorbed_q: Any
    """Queries as the attention takes them, W^UK absorbed and RoPE applied: [H (C + R)]."""
    new_token: Any
    """The new token's latent and rotary key, as in the cache: [C + R]."""
    values: Any
    """Output of the attention, after the up-projection of values: [H V]."""
    attn_residual: Any
    """Hidden state after the attention block: [D]."""
    ffn_hidden: Any
    """SwiGLU activations: [F]."""

    @classmethod
    def widths(cls, shape: LayerShape) -> "Workspace":
        """Words of each: multiples of 4, as they are read in fours. The counter has a cache line of its own."""
        D, Q, C, R, N, V, H, F = shape
        return cls(32, Q + C + R, H * (N + R), H * (C + R), C + R, H * V, D, F)

    @classmethod
    def split(cls, shape: LayerShape, ref) -> "Workspace":
        """References to the counter and the mailboxes in the one array `ref`."""
        widths = cls.widths(shape)
        return cls(*(ref.at[pl.ds(sum(widths[:i]), width)] for i, width in enumerate(widths)))


def out_types(shape: LayerShape, num_ctas: int, dtype) -> list[jax.ShapeDtypeStruct]:
    """Types of the outputs that are not updated in place, in the order of `Refs`."""
    D, C, H = shape.D, shape.C, shape.H
    partials = max_partials(num_ctas)
    array = jax.ShapeDtypeStruct
    return [array((D,), dtype), array((partials, H, C), dtype), array((H, partials), jnp.float32)]
