"""The attention of `mosaic_layer`: each block over its tiles of the cache, then all their results together.

As in `mosaic_partials`, a tile of the cache lies on the M axis of wgmma and the heads on N. The new token, which is not
in the cache yet when its tiles are copied, has a result of its own, that of slot 0.
"""

import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from latent_attention import mosaic_products as products
from latent_attention import mosaic_vector as mv
from latent_attention.mosaic_layer_memory import AHEAD, AT_ONCE, partial_slots
from latent_attention.mosaic_layer_ring import CONSUMERS, TOKENS, Share, slot_of, token_tile, turns
from latent_attention.mosaic_tiles import (
    COLUMNS_OF_TILE,
    MASKED,
    clear_rows,
    iota,
    over_columns,
    read,
    reduce_columns,
    wgmma_zeros,
)
from latent_attention.shapes import LayerShape


class Attention:
    """Of a consumer of a block; `held` tokens are in the cache, with room for `capacity`."""

    def __init__(self, shape: LayerShape, blocks: int, dtype, scale: float, block, wg, refs, smem, meet):
        self.shape, self.blocks, self.dtype, self.log2_scale = shape, blocks, dtype, scale * math.log2(math.e)
        self.block, self.wg, self.refs, self.smem, self.scratch = block, wg, refs, smem, smem.scratch.at[wg]
        self.meet_in_block, self.capacity = meet, refs.c.shape[1]
        self.held = jnp.minimum(refs.length[0], self.capacity)
        # Results: of the new token and of each block that has tokens.
        self.used = 1 + jnp.minimum(lax.div(self.held + TOKENS - 1, TOKENS), blocks)
        # The largest weight is 2^headroom, so that small ones are not lost in float16.
        self.headroom = 15 if dtype == jnp.float16 else 0

    def attend_to_new(self) -> None:
        """The result of the new token, each head's by a block: the last ones, which have fewest tokens."""
        refs, C, R, H = self.refs, self.shape.C, self.shape.R, self.shape.H
        head = self.blocks - 1 - self.block

        @pl.when((head < H) & (self.wg == 1))
        def _():
            def product(columns, layout):
                q, k = (mv.load(ref.at[columns], layout) for ref in (refs.absorbed.at[head], refs.new))
                return mv.total(q * k, layout, self.scratch), k

            score, c = product(pl.ds(0, C), products.operand(C))
            score = (score + product(pl.ds(C, R), mv.pairs(R))[0]) * self.log2_scale
            there = refs.length[0] < self.capacity
            mv.store(refs.partial.at[0, head], c, products.operand(C))
            refs.stats[0, head, 0] = jnp.where(there, score, MASKED)
            refs.stats[1, head, 0] = jnp.where(there, 1.0, 0.0)

    def fetch_queries(self, share: Share) -> None:
        """To shared memory, if the block has tokens."""
        refs, smem, C = self.refs, self.smem, self.shape.C

        @pl.when(share.count > 0)
        def _():
            plgpu.copy_gmem_to_smem(refs.absorbed.at[:, pl.ds(0, C)], smem.q_c, smem.q_full)
            plgpu.copy_gmem_to_smem(refs.absorbed.at[:, pl.ds(C, self.shape.R)], smem.q_rope, smem.q_full)

    def attend(self, share: Share) -> None:
        """The result of this block's tokens, if it has any, whose queries are on their way."""
        smem, wg, H, C = self.smem, self.wg, self.shape.H, self.shape.C
        first, count, number = share[1:]
        skipped, steps = turns(wg, share)

        @pl.when(count > 0)
        def _():
            plgpu.barrier_wait(smem.q_full)

        def step(m, carry):
            i = skipped + CONSUMERS * m
            slot = slot_of(number + 2 * i)
            carry = self._tile(lax.div(slot, 2), (first + i * self.blocks) * TOKENS, *carry)
            for j in range(2):
                plgpu.barrier_arrive(smem.empty.at[slot + j])
            return carry

        @pl.when(steps > 0)
        def _():
            lowest = plgpu.layout_cast(jnp.full((H,), MASKED, jnp.float32), COLUMNS_OF_TILE)
            carry = wgmma_zeros((C, H)), lowest, wgmma_zeros((TOKENS, H))
            acc, peak, sums = lax.fori_loop(0, steps, step, carry)
            total = reduce_columns("add", sums, self.scratch)
            slot = 1 + first  # blocks that have tokens come first

            @pl.when((count > 1) & (skipped == 1))
            def _():
                self._give(acc, peak, total)

            @pl.when(skipped == 0)
            def _():
                alone = *(acc[half] for half in self._halves()), peak, total
                *parts, peak_, total_ = lax.cond(count > 1, lambda: self._joined(acc, peak, total), lambda: alone)
                self._keep(slot, parts, peak_, total_)

    def _tile(self, pair, base, acc, peak, sums):
        """Adds the tile in a pair of slots, tokens from `base` on, to what there is."""
        smem, H = self.smem, self.shape.H
        c, k_rope = token_tile(self.shape, smem, pair)
        plgpu.barrier_wait(smem.tokens_full.at[pair])

        @pl.when(base + TOKENS > self.held)
        def _():  # what is not held may be NaN, and 0 x NaN is NaN
            clear_rows(c, self.held - base)

        def scores_of(scores_ref):
            plgpu.wgmma(scores_ref, c, smem.q_c.transpose((1, 0)))
            plgpu.wgmma(scores_ref, k_rope, smem.q_rope.transpose((1, 0)))
            return scores_ref[...]

        scores = pl.run_scoped(scores_of, plgpu.WGMMAAccumulatorRef((TOKENS, H), jnp.float32)) * self.log2_scale
        scores = jnp.where(iota((TOKENS, H), 0) < self.held - base, scores, MASKED)
        new_peak = jnp.maximum(peak, reduce_columns("max", scores, self.scratch) - self.headroom)
        shrink = jnp.exp2(peak - new_peak)
        weights = jnp.exp2(scores - over_columns(new_peak, scores.shape))
        own = smem.weights.at[self.wg]
        own.transpose((1, 0))[...] = plgpu.layout_cast(weights.astype(self.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()

        def add_values(acc_ref):
            plgpu.wgmma(acc_ref, c.transpose((1, 0)), own.transpose((1, 0)))

        acc = acc * over_columns(shrink, acc.shape)
        acc = pl.run_state(add_values)(plgpu.WGMMAAccumulatorRef.init(acc))
        return acc, new_peak, sums * over_columns(shrink, sums.shape) + weights

    def _keep(self, slot, parts, peak, total) -> None:
        """Writes a result, [C, H] in parts."""
        start = 0
        for part in parts:
            mv.store_transposed(self.refs.partial.at[slot, :, pl.ds(start, len(part))], part)
            start += len(part)
        for i, number in enumerate((peak, total)):
            mv.store_apart(self.refs.stats.at[i, :, slot], number, COLUMNS_OF_TILE)

    def _halves(self) -> list[slice]:
        """Of the accumulator, which are exchanged one after the other."""
        half = self.shape.C // 2
        return [slice(0, half), slice(half, 2 * half)]

    def _give(self, acc, peak, total) -> None:
        """Hands a consumer's result to the other one."""
        self.smem.stats[0], self.smem.stats[1] = peak, total
        for half in self._halves():
            self.smem.inbox[...] = acc[half]
            plgpu.commit_smem()  # copies will write there
            self.meet_in_block()
            self.meet_in_block()

    def _joined(self, acc, peak, total):
        """The block's result."""
        theirs = []
        for _half in self._halves():
            self.meet_in_block()
            theirs.append(plgpu.layout_cast(self.smem.inbox[...], plgpu.Layout.WGMMA))
            self.meet_in_block()
        their_peak, their_total = (read(self.smem.stats.at[i], COLUMNS_OF_TILE) for i in range(2))
        together = jnp.maximum(peak, their_peak)
        own, other = jnp.exp2(peak - together), jnp.exp2(their_peak - together)
        parts = [
            acc[half] * over_columns(own, their.shape) + their * over_columns(other, their.shape)
            for half, their in zip(self._halves(), theirs, strict=True)
        ]
        return *parts, together, total * own + their_total * other

    def fetch(self, head) -> None:
        """The first results of a head to shared memory, for both consumers."""
        for i in range(2):
            plgpu.copy_gmem_to_smem(self.refs.stats.at[i, head], self.smem.of_head.at[i], self.smem.of_head_full)
        for wg in range(CONSUMERS):
            for i in range(AHEAD):
                self._fetch(head, wg, i)

    def _first(self, wg, i):
        """Of a consumer's i-th few results, at which the two take turns."""
        return (i * CONSUMERS + wg) * AT_ONCE

    def _place(self, wg, i):
        """Where these are in shared memory."""
        return AHEAD * wg + lax.rem(i, AHEAD)

    def _fetch(self, head, wg, i) -> None:
        """There is memory for whole rounds of results, in which may be anything."""
        first, place = self._first(wg, i), self._place(wg, i)

        @pl.when(first < self.used)
        def _():
            results = self.refs.partial.at[pl.ds(first, AT_ONCE), head]
            plgpu.copy_gmem_to_smem(results, self.smem.partials.at[place], self.smem.partials_full.at[place])

    def latent_of(self, head):
        """The attention of a head over latents: [C], as `operand`. Both consumers add the results that they fetched."""
        smem, C, wg = self.smem, self.shape.C, self.wg
        plgpu.barrier_wait(smem.of_head_full)
        slot = mv.numbers(partial_slots(self.blocks))
        peaks, sums = (read(smem.of_head.at[i], mv.ONE_BY_ONE) for i in range(2))
        peaks, sums = jnp.where(slot < self.used, peaks, MASKED), jnp.where(slot < self.used, sums, 0.0)
        factors = jnp.exp2(peaks - mv.largest(peaks, mv.ONE_BY_ONE, self.scratch))
        mv.store(smem.shares, jnp.where(sums > 0, factors, 0.0), mv.ONE_BY_ONE)  # the same of both consumers
        total = mv.total(factors * sums, mv.ONE_BY_ONE, self.scratch)  # its barriers make the shares seen

        def some(i, acc):
            place, first = self._place(wg, i), self._first(wg, i)
            plgpu.barrier_wait(smem.partials_full.at[place])
            for j in range(AT_ONCE):
                share, part = smem.shares[first + j], mv.load(smem.partials.at[place, j], mv.along(C))
                acc += share * jnp.where(share > 0, part, 0.0)
            mv.meet_warpgroup()
            self._fetch(head, wg, i + AHEAD)
            return acc

        nothing = plgpu.layout_cast(jnp.zeros((C,), jnp.float32), mv.along(C))
        rounds = lax.div(self.used + (CONSUMERS - wg) * AT_ONCE - 1, CONSUMERS * AT_ONCE)
        mv.store(smem.latent.at[wg], lax.fori_loop(0, rounds, some, nothing), mv.along(C))
        self.meet_in_block()
        one, other = (mv.load(smem.latent.at[i], products.operand(C)) for i in range(CONSUMERS))
        self.meet_in_block()
        return ((one + other) / total).astype(self.dtype)
