"""A consumer warpgroup of the split-KV kernel with rows on M, for many heads; the schedule is FlashMLA's "seesaw".

With 64 rows of queries on wgmma's M axis, nothing is transposed, and a tile is read once for all of them:

    S [rows, tokens] = Q_c C^T + Q_r R^T        P = exp2(S - m_i)        O [rows, C] += P C

O [64, 512] fills the registers of two warpgroups, so each consumer has a half of it, O_0 or O_1. It also needs the
scores of all tokens, so tiles come in pairs, as many as fit in shared memory: consumer t has the scores and the softmax
of tile t, and gets the other P, and m_i with that tile, through shared memory. With C_th for half h of tile t:

    consumer 0   S_0   softmax_0   O_0 += P_0 C_00                O_0 += P_1 C_10   S_0 of the next pair
    consumer 1      S_1            O_1 += P_0 C_01   softmax_1    O_1 += P_1 C_11

So one has its softmax while the other's wgmma run. Halves of tiles are released, and loaded again, one by one. Own P is
an operand from registers; for the other consumer it is stored where the rotary keys were, which only S needs.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from latent_attention.decode.mosaic_consumer import visible_tokens
from latent_attention.decode.mosaic_many_heads_smem import PAIR, Smem, Tiles
from latent_attention.decode.mosaic_smem import TILE, Params, Refs
from latent_attention.decode.tile_scheduler import Split
from latent_attention.hopper.smem_tiles import (
    LOWEST,
    MASKED,
    PER_ROW,
    broadcast_per_row,
    iota,
    load_as,
    store_transposed,
)
from latent_attention.hopper.swizzled_tiles import clear_rows


class Consumer:
    """Consumer warpgroup `wg` of the CTA at (`cta`, `row_block`) of the grid."""

    def __init__(self, params: Params, refs: Refs, smem: Smem, cta, row_block, wg):
        self.params, self.refs, self.smem = params, refs, smem
        self.cta, self.row_block, self.wg = cta, row_block, wg
        self.s_shape = params.row_block, TILE
        self.o_shape = params.row_block, params.c_width // PAIR

    def run(self, split: Split) -> None:
        """The main loop over the pairs of tiles of a split, and the epilogue."""
        # Wait for the producer's loads of the queries of this sequence.
        plgpu.barrier_wait(self.smem.q_produced)
        for own, main_loop in enumerate((self._first_loop, self._second_loop)):

            @pl.when(self.wg == own)
            def _(own=own, main_loop=main_loop):
                accumulator = plgpu.WGMMAAccumulatorRef(self.o_shape, jnp.float32)
                self._epilogue(split, own, *pl.run_scoped(functools.partial(main_loop, split), accumulator))

    def _first_loop(self, split: Split, acc_ref):
        """Consumer 0's (O_0, m_i, l_i) of a split."""
        last = split.end - 1
        unmasked = jnp.minimum(self._unmasked(split), last)
        carry = *self._start(), self._first_scores(split, split.begin)
        for begin, end, masked in ((split.begin, unmasked, False), (unmasked, last, True)):
            carry = lax.fori_loop(begin, end, functools.partial(self._attend_first, split, acc_ref, masked), carry)
        plgpu.barrier_arrive(self.smem.q_consumed)
        return self._attend_first(split, acc_ref, True, last, carry, is_last=True)

    def _second_loop(self, split: Split, acc_ref):
        """Consumer 1's (O_1, m_i, l_i) of a split."""
        unmasked, carry = self._unmasked(split), self._start()
        for begin, end, masked in ((split.begin, unmasked, False), (unmasked, split.end, True)):
            carry = lax.fori_loop(begin, end, functools.partial(self._attend_second, split, acc_ref, masked), carry)
        plgpu.barrier_arrive(self.smem.q_consumed)
        return acc_ref[...], *carry

    def _unmasked(self, split: Split):
        """One past the split's last pair that needs no mask: all queries see it, and those before, in full."""
        tokens = jnp.maximum(jnp.minimum(split.length - self.params.queries + 1, split.kv_len), 0)
        return jnp.clip(lax.div(tokens, PAIR * TILE), split.begin, split.end)

    def _start(self):
        """(m_i, l_i) of no tokens."""
        rows = (self.params.row_block,)
        return tuple(plgpu.layout_cast(jnp.full(rows, value, jnp.float32), PER_ROW) for value in (LOWEST, 0))

    def _first_scores(self, split: Split, i, after=lambda: None):
        """S of consumer 0's tile of pair i; after() is called when the first of its wgmma have been issued."""
        tiles, valid = self.smem.tiles(), split.kv_len - i * PAIR * TILE

        def multiply(s_ref):
            self._multiply_half(s_ref, tiles, 0, 0, valid)
            after()
            self._multiply_half(s_ref, tiles, 0, 1, valid)
            return s_ref[...]

        return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(self.s_shape, jnp.float32))

    def _attend_first(self, split: Split, acc_ref, masked: bool, i, carry, is_last: bool = False):
        """Consumer 0's part of pair i: (m_i, l_i, S of the next pair) with it, or if it is the last (O_0, m_i, l_i)."""
        tiles, (m_i, l_i, scores) = self.smem.tiles(), carry
        m_0, p, p_sum = self._softmax(split, scores, tiles, 0, i * PAIR * TILE, m_i, masked)
        l_i = self._rescale(acc_ref, l_i, m_i, m_0) + p_sum
        plgpu.wgmma(acc_ref, p, tiles.c[0][0])
        self._release(0, 0)
        m_1 = self._receive_max(1)
        l_i = self._rescale(acc_ref, l_i, m_0, m_1)
        plgpu.barrier_wait(self.smem.p_ready.at[1])
        plgpu.wgmma(acc_ref, tiles.p[1], tiles.c[1][0])
        if is_last:
            self._release(1, 0)
            return acc_ref[...], m_1, l_i
        # S of the next pair follows without a gap. ptxas would serialise all wgmma if one were under way between steps.
        return m_1, l_i, self._first_scores(split, i + 1, lambda: self._release(1, 0, under_way=1))

    def _attend_second(self, split: Split, acc_ref, masked: bool, i, carry):
        """Consumer 1's part of pair i of the split: (m_i, l_i) with it."""
        tiles, base, (m_i, l_i) = self.smem.tiles(), (i * PAIR + 1) * TILE, carry
        valid = split.kv_len - base

        def multiply(s_ref):
            self._multiply_half(s_ref, tiles, 1, 1, valid)
            self._multiply_half(s_ref, tiles, 1, 0, valid)
            m_0 = self._receive_max(0)
            l_0 = self._rescale(acc_ref, l_i, m_i, m_0)
            plgpu.barrier_wait(self.smem.p_ready.at[0])
            plgpu.wgmma(acc_ref, tiles.p[0], tiles.c[0][1])
            return plgpu.wgmma_accumulator_load(s_ref, wait_n=1), m_0, l_0  # that one runs during the softmax

        scores, m_0, l_0 = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(self.s_shape, jnp.float32))
        m_1, p, p_sum = self._softmax(split, scores, tiles, 1, base, m_0, masked)
        self._release(0, 1)
        l_i = self._rescale(acc_ref, l_0, m_0, m_1) + p_sum
        plgpu.wgmma(acc_ref, p, tiles.c[1][1])
        self._release(1, 1)
        return m_1, l_i

    def _multiply_half(self, s_ref, tiles: Tiles, tile: int, half: int, valid) -> None:
        """S += Q C^T over a half of the width, and with the half that is not the tile's own the rotary part.

        Tokens from `valid` on may be NaN: they are cleared, because 0 x NaN is NaN.
        """
        is_own = half == tile
        # Wait for the producer's loads of the half.
        plgpu.barrier_wait((self.smem.own_produced if is_own else self.smem.other_produced).at[tile])
        c_ref = tiles.c[tile][half]

        @pl.when(valid < TILE)
        def _():
            clear_rows(c_ref, valid)

        plgpu.wgmma(s_ref, tiles.q_c[half], c_ref.transpose((1, 0)))
        if not is_own:
            plgpu.wgmma(s_ref, tiles.q_rope, tiles.k_rope[tile].transpose((1, 0)))

    def _softmax(self, split: Split, scores, tiles: Tiles, tile: int, base, m_i, masked: bool):
        """(m_i' = max(m_i, max S) less `headroom`, P = 2^(S - m_i') in 16 bits, its sums [rows]) of a tile.

        The other consumer gets m_i' as soon as it is known, as it has to rescale its accumulator, and then P.
        """
        params, smem, shape = self.params, self.smem, self.s_shape
        scores *= params.log2_scale
        if masked:
            visible = visible_tokens(params, split, self.row_block, shape, 0)
            scores = jnp.where(iota(shape, 1) + base < visible, scores, MASKED)
        m_i = jnp.maximum(m_i, jnp.max(scores, axis=1) - params.headroom)
        # m_i of the pair before has been read: its reader then released the half that was loaded for these scores.
        smem.m_i[tile] = m_i
        plgpu.barrier_arrive(smem.m_ready.at[tile])
        p = jnp.exp2(scores - broadcast_per_row(m_i, shape))
        p_16 = p.astype(params.p_dtype)
        tiles.p[tile][...] = p_16  # over the rotary keys: the wgmma that read them, this warpgroup's, have ended
        plgpu.commit_smem()  # for the other's wgmma
        plgpu.barrier_arrive(smem.p_ready.at[tile])
        return m_i, p_16, jnp.sum(p, axis=1)

    def _rescale(self, acc_ref, l_i, m_i, new_m_i):
        """Multiplies the accumulator, of which no wgmma is under way, by 2^(m_i - m_i'), and returns l_i times that."""
        alpha = jnp.exp2(m_i - new_m_i)
        acc = plgpu.wgmma_accumulator_load(acc_ref, wait_n=None)
        acc_ref[...] = acc * broadcast_per_row(alpha, self.o_shape)
        return l_i * alpha

    def _receive_max(self, tile: int):
        """Waits for m_i with the other consumer's tile."""
        plgpu.barrier_wait(self.smem.m_ready.at[tile])
        return load_as(self.smem.m_i.at[tile], PER_ROW)

    def _release(self, tile: int, half: int, under_way: int = 0) -> None:
        """Waits for all wgmma but the last ones, of this number, and lets the producer load the next values there."""
        plgpu.wgmma_wait(under_way)
        plgpu.barrier_arrive(self.smem.consumed.at[PAIR * tile + half])

    def _epilogue(self, split: Split, own: int, acc, m_i, l_i) -> None:
        """Writes a half of O^T (not divided by l_i), m_i and l_i at the split index."""
        smem, half = self.smem, self.o_shape[1]
        split_index = self.cta + split.b
        if own == 1:
            # The row sum before has been read: after that, consumer 0 has handed over a P, which this one received.
            smem.l_i[...] = l_i
            plgpu.barrier_arrive(smem.l_ready)
        else:
            plgpu.barrier_wait(smem.l_ready)
            self.refs.stats[self.row_block, split_index, 0] = m_i
            self.refs.stats[self.row_block, split_index, 1] = l_i + load_as(smem.l_i, PER_ROW)
        partial = self.refs.partial.at[self.row_block, split_index, pl.ds(own * half, half)]
        store_transposed(partial, acc)
