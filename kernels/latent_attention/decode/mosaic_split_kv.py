"""First kernel of the decode on Hopper, in Pallas Mosaic GPU: partial results of each share of the cache.

The transposed layout of ETAP (arXiv 2506.01969): a tile of the cache lies on the M axis of wgmma, which is 64 long at
least, and the queries (tokens x heads, the "rows") on N, so that few heads are not padded to 64:

    S [tokens, rows] = c q_c^T + k_rope q_r^T        P = exp2(S - max)        O^T [C, rows] += c^T P

One block a multiprocessor walks its share of the tiles of the batch (schedule.py). In it a warpgroup, the producer,
only copies tiles into a ring in shared memory; others, the consumers, take turns at the tiles, so that one waits for
its softmax while the tensor cores work for another.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from latent_attention.hopper.smem_tiles import (
    CHUNK,
    LOWEST,
    MASKED,
    PER_COLUMN,
    PER_ROW,
    REDUCE_SCRATCH,
    broadcast_per_column,
    broadcast_per_row,
    iota,
    load_as,
    load_transposed,
    reduce_columns,
    swizzled_smem,
    wgmma_zeros,
)
from latent_attention.hopper.swizzled_tiles import clear_rows
from latent_attention.int8 import RADIX, split_queries

TILE = 64
"""Tokens of a tile: M of wgmma."""
_LEAST_SCALE = 2.0**-60
"""Stands for a scale of 0, whose logarithm is not finite; sums of its inverse over any cache are."""
_PRODUCER_REGISTERS = 24
_CONSUMER_REGISTERS = {1: 232, 2: 240, 3: 160}
"""A thread, by the number of consumers; with the producer's, what a multiprocessor has."""


class Config(NamedTuple):
    """What can be tuned without changing results."""

    stages: int
    """Tiles in the ring, a multiple of the consumers: each slot belongs to one of them, which counts its phases."""
    programs: int
    """Shares of the cache; with the blocks of rows, no more than the GPU has multiprocessors."""
    consumers: int = 2
    """Warpgroups that take turns at the tiles: 1 to 3."""
    q_slots: int = 2
    """Sequences whose queries are in shared memory at a time."""


def partials(
    q_BRW, c_PSC, k_rope_PSR, scales_P2S, block_table_BN, work, *, heads, queries, scale, config: Config, row_block
):  # fmt: skip
    """What each program finds in its share, at the split indices of the schedule `work`; R are rows in blocks of `row_block`.

    Returns:
        out [blocks, slots, C, row_block], to be divided by the sums, and peaks and sums [blocks, slots, 2, row_block]
        of 2^score; float32.
    """
    batch, rows, width = q_BRW.shape
    c_width, rope_width, page_size = c_PSC.shape[2], k_rope_PSR.shape[2], c_PSC.shape[1]
    int8, paged = scales_P2S is not None, block_table_BN is not None
    dtype = jnp.float16 if int8 else q_BRW.dtype  # of the weights
    depth = TILE // 2 if int8 else TILE  # tokens of one product with the values
    # The largest weight is 2^headroom, so that small ones are not lost in float16.
    headroom = 15 if dtype == jnp.float16 else 0
    stages, programs, consumers, q_slots = config
    assert stages % consumers == 0
    row_blocks, slots, chunks = rows // row_block, programs + batch, c_width // CHUNK
    piece = min(TILE, page_size)  # tokens of one copy
    pieces = TILE // piece
    log2_scale = scale * math.log2(math.e)
    tile_shape = TILE, row_block

    # A slice of an array that TMA tiles must leave whole tiles, so a narrow rotary part comes as an array of its own.
    q_scale_BR, q_rows = None, row_block
    if int8:
        q_BRW, q_scale_BR = split_queries(q_BRW, row_block)
        q_scale_BR, q_rows = q_scale_BR * log2_scale, 2 * row_block
    q_c, q_rope, rope_at = q_BRW, q_BRW, c_width
    if width % CHUNK:
        q_c, q_rope, rope_at = q_BRW[..., :c_width], q_BRW[..., c_width:], 0

    def kernel(
        qc_ref, qr_ref, q_scales_ref, c_ref, k_rope_ref, scales_ref, table_ref, programs_ref, sequences_ref, out_ref,
        stats_ref, qc_s, qr_s, c_s, k_rope_s, scales_s, weights_inbox_s, stats_s, scratch_s, full, empty, q_full,
        q_empty, met,
    ):  # fmt: skip
        weights_s, inbox_s = weights_inbox_s
        program, block, wg = lax.axis_index("program"), lax.axis_index("block"), lax.axis_index("wg")
        first, last, *first_segment, share_end = (programs_ref[program, i] for i in range(7))

        def for_each_segment(work):
            """work(b, begin, end, length, held, tiles done, segments done): a sequence and the tiles that are ours."""

            def step(b, carry):
                tile, count, begin, end, length, held = carry

                @pl.when(end > begin)
                def _():
                    work(b, begin, end, length, held, tile, count)

                following = jnp.minimum(b + 1, batch - 1)
                start, stop, next_length, next_held = (sequences_ref[following, i] for i in range(4))
                next_end = jnp.minimum(share_end, stop) - start
                done = jnp.maximum(end - begin, 0)
                return tile + done, count + jnp.minimum(done, 1), 0, next_end, next_length, next_held

            lax.fori_loop(first, last, step, (0, 0, *first_segment))

        def produce(b, begin, end, _, held, tile, count):
            q_slot = lax.rem(count, q_slots)

            @pl.when(count >= q_slots)
            def _():
                plgpu.barrier_wait(q_empty.at[q_slot])

            block_rows, rope_columns = pl.ds(block * q_rows, q_rows), pl.ds(rope_at, rope_width)
            plgpu.copy_gmem_to_smem(qc_ref.at[b, block_rows, pl.ds(0, c_width)], qc_s.at[q_slot], q_full.at[q_slot])
            plgpu.copy_gmem_to_smem(qr_ref.at[b, block_rows, rope_columns], qr_s.at[q_slot], q_full.at[q_slot])

            def copy(i, _):
                number = tile + i - begin
                slot = lax.rem(number, stages)

                @pl.when(number >= stages)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                for n in range(pieces):
                    copy_piece(b, i * TILE + n * piece, held, slot, pl.ds(n * piece, piece))

            lax.fori_loop(begin, end, copy, None)

        def copy_piece(b, token, held, slot, to):
            page, offset = b, token
            if paged:
                # Pieces that no query needs come from page 0: their entries of the table may be anything.
                needed = token < held
                page = jnp.where(needed, table_ref[b, jnp.where(needed, lax.div(token, page_size), 0)], 0)
                offset = lax.rem(token, page_size)
            tokens = pl.ds(offset, piece)
            plgpu.copy_gmem_to_smem(c_ref.at[page, tokens], c_s.at[slot, to], full.at[slot])
            plgpu.copy_gmem_to_smem(k_rope_ref.at[page, tokens], k_rope_s.at[slot, to], full.at[slot])
            for i in range(2 if int8 else 0):
                plgpu.copy_gmem_to_smem(scales_ref.at[page, i, tokens], scales_s.at[slot, i, to], full.at[slot])

        def consume(b, begin, end, length, held, tile, count):
            q_slot = lax.rem(count, q_slots)
            plgpu.barrier_wait(q_full.at[q_slot])
            q_scale = load_as(q_scales_ref.at[b, pl.ds(block * row_block, row_block)], PER_COLUMN) if int8 else None
            skipped = lax.rem(wg + consumers - lax.rem(tile, consumers), consumers)

            def own_tiles(stop):
                """How many of the tiles [begin, stop) are this warpgroup's."""
                return lax.div(jnp.maximum(stop - begin - skipped + consumers - 1, 0), consumers)

            def step(n, carry, masked):
                acc, peak, sums = carry
                i = skipped + n * consumers
                slot = lax.rem(tile + i, stages)
                base = (begin + i) * TILE
                plgpu.barrier_wait(full.at[slot])
                if int8:
                    c_scale = load_as(scales_s.at[slot, 0], PER_ROW)
                    if masked:  # what is not held may be NaN
                        c_scale = jnp.where(iota((TILE,), 0, PER_ROW) < held - base, c_scale, 1.0)
                    c_scale = jnp.maximum(c_scale, _LEAST_SCALE)
                    scores = int8_scores(slot, q_slot, c_scale, q_scale)
                else:
                    if masked:
                        clear_rows(c_s.at[slot], held - base)  # it may be NaN, and 0 x NaN is NaN
                    scores = plain_scores(slot, q_slot)
                if masked:
                    scores = jnp.where(iota(tile_shape, 0) + base < seen(length, held), scores, MASKED)
                new_peak = jnp.maximum(peak, reduce_columns("max", scores, scratch_s.at[wg]) - headroom)
                shrink = jnp.exp2(peak - new_peak)

                def shrunk(x):
                    return x * broadcast_per_column(shrink, x.shape)

                # Only where a peak grew; a row that is NaN compares as if it did, and does not harm the others.
                acc, sums = lax.cond(
                    jnp.max(new_peak - peak) <= 0, lambda x: x, lambda x: (shrunk(x[0]), shrunk(x[1])), (acc, sums)
                )
                weights = jnp.exp2(scores - broadcast_per_column(new_peak, tile_shape))
                sums += weights * broadcast_per_row(1 / c_scale, tile_shape) if int8 else weights
                transposed = plgpu.layout_cast(weights.astype(dtype), plgpu.Layout.WGMMA_TRANSPOSED)
                weights_s.at[wg].transpose((1, 0))[...] = transposed
                plgpu.commit_smem()

                def multiply(acc_ref):
                    if int8:
                        for start in range(0, TILE, depth):
                            values = load_transposed(c_s.at[slot], c_width, start, depth)
                            plgpu.wgmma(acc_ref, values, weights_s.at[wg, :, pl.ds(start, depth)].transpose((1, 0)))
                    else:
                        plgpu.wgmma(acc_ref, c_s.at[slot].transpose((1, 0)), weights_s.at[wg].transpose((1, 0)))

                acc = pl.run_state(multiply)(plgpu.WGMMAAccumulatorRef.init(acc))
                plgpu.barrier_arrive(empty.at[slot])
                return acc, new_peak, sums

            lowest = plgpu.layout_cast(jnp.full((row_block,), LOWEST, jnp.float32), PER_COLUMN)
            carry = wgmma_zeros((c_width, row_block)), lowest, wgmma_zeros(tile_shape)
            # Tiles that all queries see in full need no mask; they come first.
            seen_by_all = lax.div(jnp.maximum(jnp.minimum(length - queries + 1, held), 0), TILE)
            unmasked = own_tiles(jnp.minimum(seen_by_all, end))
            carry = lax.fori_loop(0, unmasked, functools.partial(step, masked=False), carry)
            carry = lax.fori_loop(unmasked, own_tiles(end), functools.partial(step, masked=True), carry)
            acc, peak, sums = carry
            plgpu.barrier_arrive(q_empty.at[q_slot])
            store(program + b, acc, peak, reduce_columns("add", sums, scratch_s.at[wg]))

        def seen(length, held):
            """One past the last token that each row sees; row r is query token r // heads."""
            if queries == 1:
                return held
            query = lax.div(iota(tile_shape, 1) + block * row_block, heads)
            return jnp.minimum(query + (length - queries + 1), held)

        def plain_scores(slot, q_slot):
            """Scores in powers of two of a 16-bit tile."""

            def multiply(scores_ref):
                plgpu.wgmma(scores_ref, c_s.at[slot], qc_s.at[q_slot].transpose((1, 0)))
                plgpu.wgmma(scores_ref, k_rope_s.at[slot], qr_s.at[q_slot].transpose((1, 0)))
                return scores_ref[...]

            return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(tile_shape, jnp.float32)) * log2_scale

        def int8_scores(slot, q_slot, c_scale, q_scale):
            """Scores of an int8 tile, plus the logarithm of each token's scale: values are in units of it."""

            def product(keys_ref, q_ref, scale):
                def multiply(sums_ref):
                    plgpu.wgmma(sums_ref, keys_ref, q_ref.transpose((1, 0)))
                    return sums_ref[...]

                sums = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((TILE, 2 * row_block), jnp.int32))
                # High and low parts of the queries stand side by side.
                exact = sums[:, :row_block] * RADIX + sums[:, row_block:]
                return exact.astype(jnp.float32) * broadcast_per_row(scale, tile_shape)

            rope_scale = load_as(scales_s.at[slot, 1], PER_ROW)
            scores = product(k_rope_s.at[slot], qr_s.at[q_slot], rope_scale)
            scores += product(c_s.at[slot], qc_s.at[q_slot], c_scale)
            return scores * broadcast_per_column(q_scale, tile_shape) + broadcast_per_row(jnp.log2(c_scale), tile_shape)

        def meet():
            """All consumers have come here, and what any has written to shared memory is there."""
            plgpu.barrier_arrive(met)
            plgpu.barrier_wait(met)

        def store(slot, acc, peak, total):
            """Writes out what the consumers found, added up: each keeps some chunks and gives away the others."""
            stats_s[wg, 0], stats_s[wg, 1] = peak, total
            meet()
            stats = [[load_as(stats_s.at[i, j], PER_COLUMN) for j in range(2)] for i in range(consumers)]
            new_peak = functools.reduce(jnp.maximum, [part_peak for part_peak, _ in stats])
            acc = acc * broadcast_per_column(jnp.exp2(peak - new_peak), acc.shape)
            for me in range(consumers):

                @pl.when(wg == me)
                def _(me=me):
                    exchange(slot, acc, me)

            @pl.when(wg == 0)
            def _():
                stats_ref[block, slot, 0] = new_peak
                stats_ref[block, slot, 1] = sum(part_total * jnp.exp2(part - new_peak) for part, part_total in stats)

        def exchange(slot, acc, me):
            """Consumer `me` keeps the chunks j with j % consumers == me, which all others give to it in turn."""

            def chunk(j):
                return acc[j * CHUNK : (j + 1) * CHUNK]

            for first_chunk in range(0, chunks, consumers):
                kept = chunk(first_chunk + me) if first_chunk + me < chunks else None
                for turn in range(1, consumers):
                    to = (me + turn) % consumers
                    if first_chunk + to < chunks:
                        inbox_s[to] = chunk(first_chunk + to)
                    meet()
                    if kept is not None:
                        kept += plgpu.layout_cast(inbox_s[me], plgpu.Layout.WGMMA)
                    meet()
                if kept is not None:
                    out_ref[block, slot, pl.ds((first_chunk + me) * CHUNK, CHUNK)] = kept

        @pl.when(wg == consumers)
        def _():
            plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
            for_each_segment(produce)

        @pl.when(wg < consumers)
        def _():
            plgpu.set_max_registers(_CONSUMER_REGISTERS[consumers], action="increase")
            for_each_segment(consume)

    inputs = [
        q_c,
        q_rope,
        q_scale_BR,
        c_PSC,
        k_rope_PSR,
        scales_P2S,
        block_table_BN,
        work.ctas_P7,
        work.sequences_B4,
    ]
    copies = (4 if int8 else 2) * pieces
    scratch = [
        swizzled_smem(q_rows, c_width, q_c.dtype, q_slots),
        swizzled_smem(q_rows, rope_width, q_c.dtype, q_slots),
        swizzled_smem(TILE, c_width, c_PSC.dtype, stages),
        swizzled_smem(TILE, rope_width, c_PSC.dtype, stages),
        plgpu.SMEM((stages, 2, TILE), jnp.float32) if int8 else None,
        # The inboxes are in use only while no consumer has weights there.
        plgpu.RefUnion(
            swizzled_smem(row_block, TILE, dtype, consumers, columns=depth),
            swizzled_smem(CHUNK, row_block, jnp.float32, consumers),
        ),
        plgpu.SMEM((consumers, 2, row_block), jnp.float32),
        plgpu.SMEM((consumers, REDUCE_SCRATCH), jnp.float32),
        plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        plgpu.Barrier(num_arrivals=1, num_barriers=stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=q_slots),
        plgpu.Barrier(num_arrivals=consumers, num_barriers=q_slots),
        plgpu.Barrier(num_arrivals=consumers),
    ]
    given = [x is not None for x in inputs] + [True, True] + [x is not None for x in scratch]

    def entry(*refs):
        """Puts None where an optional input or scratch is left out."""
        refs = iter(refs)
        kernel(*(next(refs) if there else None for there in given))

    return plgpu.kernel(
        entry,
        out_type=[
            jax.ShapeDtypeStruct((row_blocks, slots, c_width, row_block), jnp.float32),
            jax.ShapeDtypeStruct((row_blocks, slots, 2, row_block), jnp.float32),
        ],
        grid=(programs, row_blocks),
        grid_names=("program", "block"),
        num_threads=consumers + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        scratch_types=[x for x in scratch if x is not None],
    )(*(x for x in inputs if x is not None))
