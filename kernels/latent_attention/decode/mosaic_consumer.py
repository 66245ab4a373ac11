"""A consumer warpgroup of the split-KV kernel for Hopper: wgmma, online softmax, and the epilogue.

With Q of the CTA's rows, a tile K = [C | R] of the cache and V its latents C, everything transposed:

    S^T [tokens, rows] = C Q_c^T + R Q_r^T          two wgmma with the tile on M
    m_i' = max(m_i, max over tokens of S)           P = exp2(S - m_i'), alpha = exp2(m_i - m_i')
    O^T [C, rows] = O^T alpha + C^T P               wgmma with the latent's width on M; P goes through shared memory
    l_i [rows]                                      sums of P: by token of the tile until the epilogue, then in all

The consumers alternate over the tiles of a split; in the epilogue their results are added up.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from latent_attention.decode.mosaic_smem import TILE, Params, Refs, Smem
from latent_attention.decode.tile_scheduler import Split
from latent_attention.hopper.int8_tiles import MIN_SCALE, load_transposed, scaled_products
from latent_attention.hopper.smem_tiles import (
    CHUNK,
    LOWEST,
    MASKED,
    PER_COLUMN,
    PER_ROW,
    broadcast_per_column,
    broadcast_per_row,
    iota,
    load_as,
    reduce_columns,
    wgmma_zeros,
)
from latent_attention.hopper.swizzled_tiles import clear_rows
from latent_attention.int8 import RADIX


class Consumer:
    """Consumer warpgroup `wg` of the CTA at (`cta`, `row_block`) of the grid."""

    def __init__(self, params: Params, refs: Refs, smem: Smem, cta, row_block, wg):
        self.params, self.refs, self.smem = params, refs, smem
        self.cta, self.row_block, self.wg = cta, row_block, wg
        self.consumers = params.config.consumers

    def run(self, split: Split) -> None:
        """The main loop over this consumer's tiles of a split, and the epilogue."""
        params, smem, queries = self.params, self.smem, self.params.queries
        q_stage = lax.rem(split.splits_before, params.config.q_stages)
        # Wait for the producer's loads of the queries of this sequence.
        plgpu.barrier_wait(smem.q_produced.at[q_stage])
        q_scale = None
        if params.int8:
            rows = pl.ds(self.row_block * params.row_block, params.row_block)
            q_scale = load_as(self.refs.q_scales.at[split.b, rows], PER_COLUMN)
        # Tile n of the CTA, counted from its first, is consumer n % consumers'.
        skipped = lax.rem(self.wg + self.consumers - lax.rem(split.tiles_before, self.consumers), self.consumers)

        def own_tiles(stop):
            """Number of this consumer's tiles among the tiles [begin, stop)."""
            return lax.div(jnp.maximum(stop - split.begin - skipped + self.consumers - 1, 0), self.consumers)

        def step(n, carry, masked):
            return self._attend_to_tile(split, skipped + n * self.consumers, q_stage, q_scale, carry, masked)

        lowest = plgpu.layout_cast(jnp.full((params.row_block,), LOWEST, jnp.float32), PER_COLUMN)
        carry = wgmma_zeros(params.o_shape), lowest, wgmma_zeros(params.s_shape)
        # The first tiles, which all queries see in full, need no mask.
        unmasked_end = lax.div(jnp.maximum(jnp.minimum(split.length - queries + 1, split.kv_len), 0), TILE)
        unmasked = own_tiles(jnp.minimum(unmasked_end, split.end))
        carry = lax.fori_loop(0, unmasked, functools.partial(step, masked=False), carry)
        carry = lax.fori_loop(unmasked, own_tiles(split.end), functools.partial(step, masked=True), carry)
        acc, m_i, p_sum = carry
        # When all consumers have arrived, the producer may load the queries of another sequence there.
        plgpu.barrier_arrive(smem.q_consumed.at[q_stage])
        split_index = self.cta + split.b
        self._epilogue(split_index, acc, m_i, reduce_columns("add", p_sum, smem.reduce_scratch.at[self.wg]))

    def _attend_to_tile(self, split: Split, i, q_stage, q_scale, carry, masked: bool):
        """Tile i of the split: (O^T [C, rows], m_i [rows], sums of P [tokens, rows]) with it."""
        params, smem = self.params, self.smem
        acc, m_i, p_sum = carry
        stage = lax.rem(split.tiles_before + i, params.config.stages)
        base = (split.begin + i) * TILE
        # Wait for the producer's loads of the tile.
        plgpu.barrier_wait(smem.produced.at[stage])

        # S^T = C Q_c^T + R Q_r^T, times the softmax scale and log2(e)
        c_scale = None
        if params.int8:
            c_scale = load_as(smem.scales.at[stage, 0], PER_ROW)
            if masked:  # scales beyond kv_len may be NaN
                c_scale = jnp.where(iota((TILE,), 0, PER_ROW) < split.kv_len - base, c_scale, 1.0)
            c_scale = jnp.maximum(c_scale, MIN_SCALE)
            scores = self._int8_scores(stage, q_stage, c_scale, q_scale)
        else:
            if masked:
                clear_rows(smem.c.at[stage], split.kv_len - base)  # it may be NaN, and 0 x NaN is NaN
            scores = self._scores(stage, q_stage)
        if masked:
            visible = visible_tokens(params, split, self.row_block, params.s_shape, 1)
            scores = jnp.where(iota(params.s_shape, 0) + base < visible, scores, MASKED)

        # m_i' = max(m_i, max S), less `headroom`; O^T and the sums of P times alpha = 2^(m_i - m_i')
        new_m_i = jnp.maximum(m_i, reduce_columns("max", scores, smem.reduce_scratch.at[self.wg]) - params.headroom)
        alpha = jnp.exp2(m_i - new_m_i)

        def rescale(acc_and_sum):
            return tuple(x * broadcast_per_column(alpha, x.shape) for x in acc_and_sum)

        # Skipped if no maximum grew. A row that is NaN makes the comparison false, and every row has its own alpha.
        acc, p_sum = lax.cond(jnp.max(new_m_i - m_i) <= 0, lambda x: x, rescale, (acc, p_sum))

        # P = 2^(S - m_i')
        p = jnp.exp2(scores - broadcast_per_column(new_m_i, params.s_shape))
        p_sum += p if c_scale is None else p * broadcast_per_row(1 / c_scale, params.s_shape)
        acc = self._multiply_values(stage, acc, p)
        # wgmma has read the stage: the producer may load the next tile there.
        plgpu.barrier_arrive(smem.consumed.at[stage])
        return acc, new_m_i, p_sum

    def _scores(self, stage, q_stage):
        """S^T [tokens, rows] of a 16-bit tile, times the softmax scale and log2(e)."""
        smem = self.smem

        def multiply(s_ref):
            plgpu.wgmma(s_ref, smem.c.at[stage], smem.q_c.at[q_stage].transpose((1, 0)))
            plgpu.wgmma(s_ref, smem.k_rope.at[stage], smem.q_rope.at[q_stage].transpose((1, 0)))
            return s_ref[...]

        scores = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(self.params.s_shape, jnp.float32))
        return scores * self.params.log2_scale

    def _int8_scores(self, stage, q_stage, c_scale, q_scale):
        """S^T + log2(c_scale) of an int8 tile: P is then multiplied by the scales of the values, which stay int8.

        S = (C Q_c^T c_scale + R Q_r^T rope_scale) q_scale. The queries are two int8 digits of each row, side by side on
        the N axis: x y = RADIX (x y_high) + x y_low is exact in int32.
        """
        smem, row_block, s_shape = self.smem, self.params.row_block, self.params.s_shape

        def multiply_int8(keys_ref, q_ref, scale):
            def multiply(s_ref):
                plgpu.wgmma(s_ref, keys_ref, q_ref.transpose((1, 0)))
                return s_ref[...]

            digits = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((TILE, 2 * row_block), jnp.int32))
            return scaled_products(digits, RADIX, scale)

        rope_scale = load_as(smem.scales.at[stage, 1], PER_ROW)
        scores = multiply_int8(smem.k_rope.at[stage], smem.q_rope.at[q_stage], rope_scale)
        scores += multiply_int8(smem.c.at[stage], smem.q_c.at[q_stage], c_scale)
        return scores * broadcast_per_column(q_scale, s_shape) + broadcast_per_row(jnp.log2(c_scale), s_shape)

    def _multiply_values(self, stage, acc, p):
        """O^T + V^T P: P is written to shared memory as [rows, tokens] and read from there, transposed, by wgmma."""
        params, c_ref, p_ref = self.params, self.smem.c.at[stage], self.smem.p.at[self.wg]
        p_ref.transpose((1, 0))[...] = plgpu.layout_cast(p.astype(params.p_dtype), plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()

        def multiply(acc_ref):
            if params.int8:
                for start in range(0, TILE, params.pv_tokens):
                    values = load_transposed(c_ref, params.c_width, start, params.pv_tokens)
                    own_p = self.smem.p.at[self.wg, :, pl.ds(start, params.pv_tokens)]
                    plgpu.wgmma(acc_ref, values, own_p.transpose((1, 0)))
            else:
                plgpu.wgmma(acc_ref, c_ref.transpose((1, 0)), p_ref.transpose((1, 0)))

        return pl.run_state(multiply)(plgpu.WGMMAAccumulatorRef.init(acc))

    def _rendezvous(self) -> None:
        """Waits for the other consumer; shared memory written by it before is visible."""
        plgpu.barrier_arrive(self.smem.rendezvous)
        plgpu.barrier_wait(self.smem.rendezvous)

    def _epilogue(self, split_index, acc, m_i, l_i) -> None:
        """Adds up the consumers' results and writes O^T (not divided by l_i), m_i and l_i at the split index."""
        stats_s, consumers = self.smem.stats, self.consumers
        stats_s[self.wg, 0], stats_s[self.wg, 1] = m_i, l_i
        self._rendezvous()  # the other's are in shared memory, and it is done with P, where the inboxes are
        stats = [[load_as(stats_s.at[i, j], PER_COLUMN) for j in range(2)] for i in range(consumers)]
        new_m_i = functools.reduce(jnp.maximum, [their_m_i for their_m_i, _ in stats])
        acc = acc * broadcast_per_column(jnp.exp2(m_i - new_m_i), acc.shape)
        for wg in range(consumers):

            @pl.when(self.wg == wg)
            def _(wg=wg):
                self._exchange(split_index, acc, wg)

        @pl.when(self.wg == 0)
        def _():
            self.refs.stats[self.row_block, split_index, 0] = new_m_i
            new_l_i = sum(their_l_i * jnp.exp2(their_m_i - new_m_i) for their_m_i, their_l_i in stats)
            self.refs.stats[self.row_block, split_index, 1] = new_l_i

    def _exchange(self, split_index, acc, wg: int) -> None:
        """Writes the chunks j of O^T, CHUNK rows each, with j % consumers == wg, plus the other consumer's.

        The consumers exchange one chunk each at a time through their inboxes in shared memory.
        """
        consumers, inbox = self.consumers, self.smem.inbox
        chunks = self.params.c_width // CHUNK

        def chunk(j):
            return acc[j * CHUNK : (j + 1) * CHUNK]

        for first in range(0, chunks, consumers):
            own = chunk(first + wg) if first + wg < chunks else None
            for other in range(consumers):
                if other == wg:
                    continue
                if first + other < chunks:
                    inbox[other] = chunk(first + other)
                self._rendezvous()  # both inboxes are written
                if own is not None:
                    own += plgpu.layout_cast(inbox[wg], plgpu.Layout.WGMMA)
                self._rendezvous()  # both are read, and may be written again
            if own is not None:
                self.refs.partial[self.row_block, split_index, pl.ds((first + wg) * CHUNK, CHUNK)] = own


def visible_tokens(params: Params, split: Split, row_block, shape: tuple[int, int], row_axis: int):
    """Tokens that each row of a block sees, of this shape with rows along `row_axis`, or a scalar.

    Row r is query token r // heads.
    """
    if params.queries == 1:
        return split.kv_len
    query = lax.div(iota(shape, row_axis) + row_block * params.row_block, params.heads)
    return jnp.minimum(query + (split.length - params.queries + 1), split.kv_len)
