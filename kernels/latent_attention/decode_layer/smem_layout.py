"""What a block of `mosaic_layer` works on: arrays in memory, and its shared memory."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from latent_attention.call_shapes import LayerShape
from latent_attention.decode_layer import gemv as products
from latent_attention.decode_layer.producer import CONSUMERS, SLOT, SLOTS, TOKENS, parts_of_rows
from latent_attention.hopper.smem_tiles import REDUCE_SCRATCH, swizzled_smem

AT_ONCE = 8
"""Results of the attention that come in one copy."""
AHEAD = 4
"""Such copies for each consumer at a time."""
VALUES = 16
"""Rows of the up-projection of values that a consumer multiplies at a time."""
_ALIGNMENT = 1024
"""Of arrays in shared memory."""


def partial_slots(blocks: int) -> int:
    """Of partial results of the attention: of the new token and of each block; whole rounds, and 128 threads."""
    return -(-(blocks + AT_ONCE) // 128) * 128


def longest_vector(shape: LayerShape) -> int:
    """That blocks make together; two parts of the queries find room in it too."""
    return max(shape.Q, shape.H * shape.V, shape.F, CONSUMERS * (shape.N + shape.R))


def parts_of_values(shape: LayerShape) -> int:
    """Of the product of a row of the up-projection of values."""
    return products.parts_of_row(shape.C, VALUES, CONSUMERS * VALUES)


class Refs(NamedTuple):
    """Arguments and results in memory; matrices are flat, but for one."""

    h: Any
    input_gain: Any
    q_a: Any
    kv_a: Any
    q_gain: Any
    q_b: Any
    kv_gain: Any
    kv_b: Any
    """[H (N + V), C]."""
    cos: Any
    sin: Any
    length: Any
    o: Any
    post_gain: Any
    gate: Any
    up: Any
    down: Any
    c: Any
    rope: Any
    board: Any
    """See `Board`."""
    out: Any
    partial: Any
    """Results of the attention: [slots, H, C], each a mean of latents."""
    log2_sums: Any
    """float32 [H, slots]: the logarithm of the sum of 2^score, by which results weigh."""


class Board(NamedTuple):
    """What blocks meet at, int32: a counter, and vectors that they hand each other in words of `mosaic_meeting`."""

    counter: Any
    a: Any
    """Latents of the query, and of keys and values with the rotary key: [Q + C + R]."""
    q: Any
    """[H (N + R)]."""
    absorbed: Any
    """Queries, as the attention takes them: [H (C + R)]."""
    new: Any
    """Of the new token, what goes to the cache: [C + R]."""
    value: Any
    """[H V]."""
    middle: Any
    """Hidden state after the attention."""
    inner: Any
    """[F]."""

    @classmethod
    def widths(cls, shape: LayerShape) -> "Board":
        """Multiples of 4, as words are read in fours; the counter has a line of memory to itself."""
        D, Q, C, R, N, V, H, F = shape
        return cls(32, Q + C + R, H * (N + R), H * (C + R), C + R, H * V, D, F)

    @classmethod
    def of(cls, shape: LayerShape, ref) -> "Board":
        """References to the parts."""
        widths = cls.widths(shape)
        return cls(*(ref.at[pl.ds(sum(widths[:i]), width)] for i, width in enumerate(widths)))


@dataclasses.dataclass
class Shared:
    """Shared memory and barriers, as `shared` makes them."""

    ring: Any
    c_tiles: Any
    rope_tiles: Any
    q_c: Any
    q_rope: Any
    weights: Any
    scratch: Any
    """Of each consumer, to reduce over its warps; in the attention, its weights are there."""
    of_new: Any
    """In the same place, two vectors of each consumer: of the new token, or its query and itself. As they are narrow,
    warps reduce them without `scratch`."""
    given: Any
    """By one consumer to the other: its result of the attention [H, C]."""
    partials: Any
    """Results of the attention for a head: of each consumer those that it adds, and those that it adds after them."""
    vector: Any
    """That the rows of a matrix are multiplied with, or parts of the queries."""
    parts: Any
    """float32: of the products of the rows that the block has of a matrix, see `mosaic_products.dots`."""
    log2_sum: Any
    """What belongs to `given`."""
    of_head: Any
    """`log2_sums` of a head."""
    shares: Any
    """Of each result in the attention."""
    latent: Any
    """What each consumer has added; before that, a part of the queries."""
    residual: Any
    full: Any
    tokens_full: Any
    empty: Any
    partials_full: Any
    of_head_full: Any
    residual_full: Any


def shared(shape: LayerShape, blocks: int, dtype) -> dict[str, Any]:
    """What `Shared` holds; tiles of the cache use the ring too, and the sums over threads what holds weights."""
    D, _, C, R, _, _, H, _ = shape
    pair = 2 * SLOT
    return {
        "ring": plgpu.RefUnion(
            plgpu.SMEM((SLOTS, SLOT), dtype), swizzled_smem(pair // C, C, dtype, SLOTS // 2),
            swizzled_smem(pair // R, R, dtype, SLOTS // 2),
        ),
        # What a consumer exchanges when it reduces scores, 128 H bytes, ends where the other's weights start.
        "weights": plgpu.RefUnion(
            swizzled_smem(H, TOKENS, dtype, CONSUMERS), plgpu.SMEM((CONSUMERS, REDUCE_SCRATCH), jnp.float32),
            plgpu.SMEM((CONSUMERS, 2, REDUCE_SCRATCH), dtype),
        ),
        # In turn: vectors of the queries, what the attention takes and then its partials, vectors of what follows.
        "exchange": plgpu.RefUnion(
            (swizzled_smem(H, C, dtype), swizzled_smem(H, R, dtype), swizzled_smem(H, C, dtype)),
            plgpu.SMEM((CONSUMERS * AHEAD, AT_ONCE, C), dtype), plgpu.SMEM((longest_vector(shape),), dtype),
        ),
        "parts": plgpu.SMEM(
            (max(parts_of_rows(shape, blocks)[1], CONSUMERS * VALUES * parts_of_values(shape)),), jnp.float32
        ),
        "log2_sum": plgpu.SMEM((H,), jnp.float32),
        "of_head": plgpu.SMEM((partial_slots(blocks),), jnp.float32),
        "shares": plgpu.SMEM((partial_slots(blocks),), jnp.float32),
        "latent": plgpu.SMEM((CONSUMERS, C), jnp.float32),
        "residual": plgpu.SMEM((D,), dtype),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
        "tokens_full": plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS // 2),
        "empty": plgpu.Barrier(num_arrivals=1, num_barriers=SLOTS),
        "partials_full": plgpu.Barrier(num_arrivals=1, num_barriers=CONSUMERS * AHEAD),
        "of_head_full": plgpu.Barrier(num_arrivals=1),
        "residual_full": plgpu.Barrier(num_arrivals=1),
    }  # fmt: skip


def shared_bytes(shape: LayerShape, blocks: int) -> int:
    """All of it, with the alignment that Pallas gives each array."""

    def size(x) -> int:
        if isinstance(x, plgpu.Barrier):
            return 8 * int(np.prod(x.num_barriers))
        return -(-math.prod(x.shape) * jnp.dtype(x.dtype).itemsize // _ALIGNMENT) * _ALIGNMENT

    return sum(map(size, shared(shape, blocks, jnp.bfloat16).values()))


def out_types(shape: LayerShape, blocks: int, dtype) -> list[jax.ShapeDtypeStruct]:
    """Of what the kernel writes, in the order of `Refs`."""
    D, C, H = shape.D, shape.C, shape.H
    slots = partial_slots(blocks)
    of = jax.ShapeDtypeStruct
    return [of((D,), dtype), of((slots, H, C), dtype), of((H, slots), jnp.float32)]
