"""Static parameters, global arrays and shared memory of the split-KV kernel for Hopper, see `mosaic_split_kv`."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from latent_attention.hopper.smem_tiles import CHUNK, REDUCE_SCRATCH, swizzled_smem

TILE = 64
"""Tokens of a KV tile: M of wgmma in S = K Q^T."""


class Config(NamedTuple):
    """Tuning parameters, on which results do not depend but for rounding."""

    stages: int
    """Pipeline stages, of one KV tile each. A multiple of the consumers, so that stage s is always used by consumer
    s % consumers, which alone tracks the parity of its mbarriers."""
    num_ctas: int
    """CTAs that share the KV tiles of one block of rows; times the blocks of rows, no more than the GPU has SMs."""
    consumers: int = 2
    """Consumer warpgroups, 1 or 2: with 2, one has its softmax while the other's wgmma run."""
    q_stages: int = 2
    """Sequences whose queries are in shared memory at a time, 1 or 2."""
    rows_on_m: bool = False
    """Whether rows are on wgmma's M axis and not tokens, for many heads; see `mosaic_many_heads_consumer`."""


@dataclasses.dataclass(frozen=True)
class Params:
    """Static parameters of a launch."""

    config: Config
    batch: int
    queries: int
    heads: int
    row_block: int
    """Rows (query tokens x heads) of a CTA: N of wgmma."""
    c_width: int
    rope_width: int
    page_size: int
    paged: bool
    int8: bool
    p_dtype: Any
    """Type of the probabilities P as an operand of wgmma: that of the queries, float16 with an int8 cache."""
    log2_scale: float
    """Softmax scale times log2(e), so that P = exp2(S - m_i)."""

    @property
    def s_shape(self) -> tuple[int, int]:
        """Shape of the accumulator of scores, S^T: [tokens, rows]."""
        return TILE, self.row_block

    @property
    def o_shape(self) -> tuple[int, int]:
        """Shape of the accumulator of the output, O^T: [C, rows]."""
        return self.c_width, self.row_block

    @property
    def q_rows(self) -> int:
        """Rows of the queries in shared memory: with an int8 cache, two int8 digits of each (`int8.split_queries`)."""
        return 2 * self.row_block if self.int8 else self.row_block

    @property
    def q_rope_column(self) -> int:
        """First column of the rotary part of the queries, which are an array of their own if W is no multiple of 64."""
        return 0 if (self.c_width + self.rope_width) % CHUNK else self.c_width

    @property
    def copy_tokens(self) -> int:
        """Tokens of one TMA load: a tile, or a page if that is smaller."""
        return min(TILE, self.page_size)

    @property
    def pv_tokens(self) -> int:
        """Tokens of one wgmma group O^T += V^T P: int8 values pass through registers, where half a tile fits."""
        return TILE // 2 if self.int8 else TILE

    @property
    def headroom(self) -> int:
        """Exponent of the largest P: 2^15 in float16, where it keeps small P from underflow."""
        return 15 if self.p_dtype == jnp.float16 else 0

    @property
    def num_splits(self) -> int:
        """Rows of the workspace of partial results, see `tile_scheduler`."""
        return self.config.num_ctas + self.batch


class Refs(NamedTuple):
    """Arguments and results in global memory; None where a call has no such array."""

    q_c: Any
    q_rope: Any
    q_scales: Any
    """With an int8 cache: scale of each row's queries [B, rows], times the softmax scale."""
    c: Any
    k_rope: Any
    scales: Any
    block_table: Any
    ctas: Any
    """`Schedule.ctas_P7`."""
    sequences: Any
    """`Schedule.sequences_B4`."""
    partial: Any
    """Accumulators O^T [row blocks, splits, C, row block]."""
    stats: Any
    """Running max m_i and row sum l_i [row blocks, splits, 2, row block]."""


class Smem(NamedTuple):
    """Shared memory and mbarriers of a CTA. Producer and consumers use the stages of K and V in the same order."""

    q_c: Any
    """Content part of the queries, [q_stages, q_rows, C]."""
    q_rope: Any
    """Rotary part of the queries, [q_stages, q_rows, R]."""
    c: Any
    """Latents, keys and values both, [stages, TILE, C]."""
    k_rope: Any
    """Rotary keys, [stages, TILE, R]."""
    scales: Any
    """With an int8 cache: [stages, 2, TILE]."""
    p: Any
    """Probabilities of each consumer, [row_block, TILE]."""
    inbox: Any
    """float32 [CHUNK, row_block] for each consumer: rows of the other's accumulator. In the memory of `p`."""
    stats: Any
    """m_i and l_i of each consumer, for the other, [consumers, 2, row_block]."""
    reduce_scratch: Any
    """Scratch for each consumer's reductions across its warps, [consumers, REDUCE_SCRATCH]."""
    produced: Any
    """mbarrier of each stage, completed by the TMA loads of a tile; its consumer waits."""
    consumed: Any
    """mbarrier of each stage: its consumer arrives, the producer waits before it loads the next tile there."""
    q_produced: Any
    """mbarrier of each stage of queries, completed by their TMA loads; all consumers wait."""
    q_consumed: Any
    """mbarrier of each stage of queries: all consumers arrive, the producer waits."""
    rendezvous: Any
    """mbarrier at which the consumers arrive and wait for each other, in the epilogue."""

    @classmethod
    def of(cls, refs: list) -> "Smem":
        """Allocations in the order of `smem_types`."""
        return cls(*refs[:5], *refs[5], *refs[6:])


def smem_types(params: Params, q_dtype, kv_dtype) -> list:
    """Allocations in the order of `Smem`, of which `p` and `inbox` are one; None where a call has no such array."""
    stages, consumers, q_stages = params.config.stages, params.config.consumers, params.config.q_stages
    c_width, rope_width, row_block = params.c_width, params.rope_width, params.row_block
    loads = (4 if params.int8 else 2) * (TILE // params.copy_tokens)
    return [
        swizzled_smem(params.q_rows, c_width, q_dtype, q_stages),
        swizzled_smem(params.q_rows, rope_width, q_dtype, q_stages),
        swizzled_smem(TILE, c_width, kv_dtype, stages),
        swizzled_smem(TILE, rope_width, kv_dtype, stages),
        plgpu.SMEM((stages, 2, TILE), jnp.float32) if params.int8 else None,
        plgpu.RefUnion(
            swizzled_smem(row_block, TILE, params.p_dtype, consumers, columns=params.pv_tokens),
            swizzled_smem(CHUNK, row_block, jnp.float32, consumers),
        ),
        plgpu.SMEM((consumers, 2, row_block), jnp.float32),
        plgpu.SMEM((consumers, REDUCE_SCRATCH), jnp.float32),
        plgpu.Barrier(num_arrivals=loads, num_barriers=stages),
        plgpu.Barrier(num_arrivals=1, num_barriers=stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=q_stages),
        plgpu.Barrier(num_arrivals=consumers, num_barriers=q_stages),
        plgpu.Barrier(num_arrivals=consumers),
    ]
