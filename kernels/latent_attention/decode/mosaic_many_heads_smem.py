"""Shared memory of the split-KV kernel with rows on M, see `mosaic_many_heads_consumer`."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from latent_attention.decode.mosaic_smem import TILE, Params
from latent_attention.hopper.smem_tiles import opaque_zero, swizzled_smem

PAIR = 2
"""KV tiles in shared memory: the scores of tile t are consumer t's. Also the halves of their width: the output of half
h is consumer h's."""

ROWS_ON_M = 64
"""Rows of a block: M of wgmma."""


class Tiles(NamedTuple):
    """Operands of wgmma in shared memory."""

    q_c: list
    """Content part of the queries of each half, [row_block, C / 2]."""
    q_rope: Any
    """Rotary part of the queries, [row_block, R]."""
    c: list
    """Latents, keys and values both, of each tile and half, [TILE, C / 2]."""
    k_rope: list
    """Rotary keys of each tile, [TILE, R]."""
    p: list
    """Probabilities of each tile, [row_block, TILE], in the memory of its rotary keys."""


class Smem(NamedTuple):
    """Shared memory and mbarriers of a CTA."""

    q_c: Any
    """See `Tiles`; [halves, row_block, C / 2]."""
    q_rope: Any
    """[1, row_block, R]."""
    c: Any
    """[tiles, halves, TILE, C / 2]."""
    k_rope_and_p: list
    """Of each tile two references to the same memory, [1, TILE, R] and [1, row_block, TILE]."""
    m_i: Any
    """Running max after each tile, [tiles, row_block]."""
    l_i: Any
    """Row sums of consumer 1's tiles, [row_block]."""
    q_produced: Any
    """mbarrier completed by the TMA loads of the queries; both consumers wait."""
    q_consumed: Any
    """mbarrier of the queries: both consumers arrive, the producer waits."""
    own_produced: Any
    """mbarrier of each tile t, completed by the TMA loads of its half t; consumer t waits."""
    other_produced: Any
    """mbarrier of each tile t, completed by the TMA loads of its other half and its rotary keys; consumer t waits."""
    consumed: Any
    """mbarrier of each half h of each tile t, at PAIR * t + h: consumer h arrives when its wgmma have read the values
    and, if h is not t, P; the producer waits before it loads the next there."""
    m_ready: Any
    """mbarrier of each tile t: consumer t arrives when m_i is in shared memory; the other one waits."""
    p_ready: Any
    """The same for P."""
    l_ready: Any
    """mbarrier at which consumer 1 arrives when its row sums are in shared memory; consumer 0 waits."""

    @classmethod
    def of(cls, refs: list) -> "Smem":
        """Allocations in the order of `smem_types`."""
        return cls(*[*refs[:3], refs[3 : 3 + PAIR], *refs[3 + PAIR :]])

    def tiles(self) -> Tiles:
        """The operands of wgmma, for one pair of tiles: their descriptors are not computed before the loop."""
        zero, each = opaque_zero(), range(PAIR)
        return Tiles(
            [self.q_c.at[half + zero] for half in each],
            self.q_rope.at[zero],
            [[self.c.at[tile + zero, half] for half in each] for tile in each],
            [k_rope.at[zero] for k_rope, _ in self.k_rope_and_p],
            [p.at[zero] for _, p in self.k_rope_and_p],
        )


def smem_types(params: Params, q_dtype, kv_dtype) -> list:
    """Allocations in the order of `Smem`, those of rotary keys and probabilities one by one."""
    rows, half, rope_width = params.row_block, params.c_width // PAIR, params.rope_width
    loads = TILE // params.copy_tokens
    return [
        swizzled_smem(rows, half, q_dtype, PAIR),
        swizzled_smem(rows, rope_width, q_dtype, 1),
        swizzled_smem(TILE, half, kv_dtype, PAIR, PAIR),
        *(
            plgpu.RefUnion(swizzled_smem(TILE, rope_width, kv_dtype, 1), swizzled_smem(rows, TILE, params.p_dtype, 1))
            for _ in range(PAIR)
        ),
        plgpu.SMEM((PAIR, rows), jnp.float32),
        plgpu.SMEM((rows,), jnp.float32),
        plgpu.Barrier(num_arrivals=PAIR + 1),
        plgpu.Barrier(num_arrivals=PAIR),
        plgpu.Barrier(num_arrivals=loads, num_barriers=PAIR),
        plgpu.Barrier(num_arrivals=2 * loads, num_barriers=PAIR),
        plgpu.Barrier(num_arrivals=1, num_barriers=PAIR * PAIR),
        plgpu.Barrier(num_arrivals=1, num_barriers=PAIR),
        plgpu.Barrier(num_arrivals=1, num_barriers=PAIR),
        plgpu.Barrier(num_arrivals=1),
    ]
