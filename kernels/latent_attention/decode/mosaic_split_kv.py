"""First kernel of the decode on Hopper, in Pallas Mosaic GPU: split-KV attention, partial results of each CTA's tiles.

The transposed layout of ETAP (arXiv 2506.01969): a KV tile lies on the M axis of wgmma, which is 64 at least, and the
rows (query tokens x heads) on N, a multiple of 8, so that few heads are not padded to 64:

    S^T [tokens, rows] = C Q_c^T + R Q_r^T        P = exp2(S - m_i)        O^T [C, rows] += C^T P

The kernel is persistent and warp-specialized: one CTA an SM walks its run of the tiles of the batch (`tile_scheduler`).
A producer warpgroup (`mosaic_producer`) issues TMA loads into a pipeline of stages in shared memory; the consumer
warpgroups (`mosaic_consumer`) alternate over the tiles, so that one has its softmax while wgmma run for the other.
`mosaic_smem` has the shared memory and mbarriers, `mosaic_combine` the second kernel.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from latent_attention.decode import (
    mosaic_consumer,
    mosaic_many_heads_consumer,
    mosaic_many_heads_producer,
    mosaic_many_heads_smem,
    mosaic_producer,
    mosaic_smem,
)
from latent_attention.decode.mosaic_smem import Config, Params, Refs
from latent_attention.decode.tile_scheduler import CtaSplits, Schedule
from latent_attention.hopper.smem_tiles import CHUNK
from latent_attention.int8 import split_queries

_PRODUCER_REGISTERS = 24
_CONSUMER_REGISTERS = {1: 232, 2: 240}
"""Registers of a thread, by the number of consumers; with the producer's, at most the register file of an SM."""


def partials(
    q_BRW, c_PSC, k_rope_PSR, scales_P2S, block_table_BN, schedule: Schedule, *, heads: int, queries: int, scale: float,
    config: Config, row_block: int,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Partial attention of every CTA over its run of KV tiles.

    Args:
        q_BRW: queries; R are rows (query tokens x heads), padded to a multiple of `row_block`.
        c_PSC: see `latent_attention.decode`, as the next three.
        k_rope_PSR: see there.
        scales_P2S: see there.
        block_table_BN: see there.
        schedule: for `config.num_ctas` CTAs.
        heads: heads of a query token.
        queries: query tokens.
        scale: softmax scale.
        config: tuning parameters.
        row_block: rows of a CTA.

    Returns:
        At each split index, float32: the accumulator O^T [row blocks, splits, C, row_block], not divided by the row
        sum, and the running max and row sum, m_i and l_i of 2^score, [row blocks, splits, 2, row_block].
    """
    batch, rows, width = q_BRW.shape
    int8 = scales_P2S is not None
    params = Params(
        config=config, batch=batch, queries=queries, heads=heads, row_block=row_block, c_width=c_PSC.shape[2],
        rope_width=k_rope_PSR.shape[2], page_size=c_PSC.shape[1], paged=block_table_BN is not None, int8=int8,
        p_dtype=jnp.float16 if int8 else q_BRW.dtype, log2_scale=scale * math.log2(math.e),
    )  # fmt: skip
    assert config.stages % config.consumers == 0

    q_scale_BR = None
    if int8:
        q_BRW, q_scale_BR = split_queries(q_BRW, row_block)
        q_scale_BR = q_scale_BR * params.log2_scale
    q_c, q_rope = q_BRW, q_BRW
    if width % CHUNK:  # TMA's swizzled boxes do not divide these rows: the rotary part comes as an array of its own
        q_c, q_rope = q_BRW[..., : params.c_width], q_BRW[..., params.c_width :]

    smem_module, producer, consumer = mosaic_smem, mosaic_producer.Producer, mosaic_consumer.Consumer
    if config.rows_on_m:
        smem_module, producer = mosaic_many_heads_smem, mosaic_many_heads_producer.Producer
        consumer = mosaic_many_heads_consumer.Consumer

    def kernel(refs: Refs, smem) -> None:
        cta, block, wg = lax.axis_index("cta"), lax.axis_index("row_block"), lax.axis_index("wg")
        splits = CtaSplits(refs.ctas, refs.sequences, cta, batch)

        @pl.when(wg == config.consumers)
        def _():
            plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
            splits.for_each(producer(params, refs, smem, block).run)

        @pl.when(wg < config.consumers)
        def _():
            plgpu.set_max_registers(_CONSUMER_REGISTERS[config.consumers], action="increase")
            splits.for_each(consumer(params, refs, smem, cta, block, wg).run)

    inputs = [
        q_c, q_rope, q_scale_BR, c_PSC, k_rope_PSR, scales_P2S, block_table_BN, schedule.ctas_P7, schedule.sequences_B4,
    ]  # fmt: skip
    outputs = [
        jax.ShapeDtypeStruct((rows // row_block, params.num_splits, params.c_width, row_block), jnp.float32),
        jax.ShapeDtypeStruct((rows // row_block, params.num_splits, 2, row_block), jnp.float32),
    ]
    scratch = smem_module.smem_types(params, q_c.dtype, c_PSC.dtype)
    present = [x is not None for x in (*inputs, *outputs, *scratch)]

    def entry(*refs):
        """Calls the kernel with None for optional arrays that the call does not have."""
        rest = iter(refs)
        all_refs = [next(rest) if is_present else None for is_present in present]
        kernel(Refs(*all_refs[: len(Refs._fields)]), smem_module.Smem.of(all_refs[len(Refs._fields) :]))

    return plgpu.kernel(
        entry,
        out_type=outputs,
        grid=(config.num_ctas, rows // row_block),
        grid_names=("cta", "row_block"),
        num_threads=config.consumers + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        scratch_types=[x for x in scratch if x is not None],
    )(*(x for x in inputs if x is not None))
