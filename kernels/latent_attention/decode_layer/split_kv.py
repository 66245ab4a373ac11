"""The attention of `mosaic_layer`: each block over its tiles of the cache, then all their results together.

As in `mosaic_partials`, a tile of the cache lies on the M axis of wgmma and the heads on N. The new token, which is not
in the cache yet when its tiles are copied, has a result of its own, that of slot 0.
"""

import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from latent_attention.call_shapes import LayerShape
from latent_attention.decode_layer import gemv as products
from latent_attention.decode_layer.producer import CONSUMERS, TOKENS, Share, slot_of, token_tile, tokens_held, turns
from latent_attention.decode_layer.smem_layout import AHEAD, AT_ONCE, partial_slots
from latent_attention.hopper import cta_sync, mailbox
from latent_attention.hopper import registers as regs
from latent_attention.hopper.smem_tiles import (
    MASKED,
    PER_COLUMN,
    broadcast_per_column,
    iota,
    load_as,
    reduce_columns,
    wgmma_zeros,
)
from latent_attention.hopper.swizzled_tiles import (
    clear_rows,
    copy_rows,
    load_accumulator,
    receive_rows,
    store_accumulator,
)


class Attention:
    """Of a consumer of a block; `held` tokens are in the cache, with room for `capacity`."""

    def __init__(self, shape: LayerShape, blocks: int, dtype, scale: float, block, wg, refs, smem, meet):
        self.shape, self.blocks, self.dtype, self.log2_scale = shape, blocks, dtype, scale * math.log2(math.e)
        self.block, self.wg, self.refs, self.smem, self.scratch = block, wg, refs, smem, smem.scratch.at[wg]
        self.meet_in_block, self.capacity = meet, refs.c.shape[1]
        self.held = tokens_held(refs)
        # Results: of the new token and of each block that has tokens; these blocks come first.
        self.used = 1 + jnp.minimum(lax.div(self.held + TOKENS - 1, TOKENS), blocks)
        # The largest weight is 2^headroom, so that small ones are not lost in float16.
        self.headroom = 15 if dtype == jnp.float16 else 0

    def attend_to_new(self, q_words, new_words, tag) -> None:
        """The result of the new token, each head's by a block: the last ones, which have fewest tokens."""
        refs, C, R, H, new = self.refs, self.shape.C, self.shape.R, self.shape.H, self.smem.of_new.at[self.wg]
        head = self.blocks - 1 - self.block
        assert products.is_narrow(C)

        @pl.when((head < H) & (self.wg == 1))
        def _():
            of_head = q_words.at[pl.ds(head * (C + R), C + R)]
            for i, words in enumerate((of_head, new_words)):
                mailbox.receive(words, new.at[i, pl.ds(0, C + R)], tag, 128)
            cta_sync.warpgroup_barrier()

            def product(columns, layout):
                q, k = (regs.load_f32(new.at[i, columns], layout) for i in range(2))
                return regs.reduce_sum(q * k, layout, self.scratch), k

            score, c = product(pl.ds(0, C), products.operand(C))
            score = (score + product(pl.ds(C, R), regs.rope_pairs_layout(R))[0]) * self.log2_scale
            there = refs.length[0] < self.capacity
            regs.store(refs.partial.at[0, head], c.astype(self.dtype), products.operand(C))
            refs.log2_sums[head, 0] = jnp.where(there, score, MASKED)
            cta_sync.warpgroup_barrier()  # all have read what lies in the place of weights

    def collect_queries(self, words, tag, share: Share) -> None:
        """To shared memory, if the block has tokens."""
        smem = self.smem

        @pl.when(share.count > 0)
        def _():
            receive_rows(words, (smem.q_c, smem.q_rope), tag, 128 * CONSUMERS)
            plgpu.commit_smem()

        self.meet_in_block()

    def attend(self, share: Share) -> None:
        """The result of this block's tokens, if it has any, whose queries are there."""
        smem, wg, H, C = self.smem, self.wg, self.shape.H, self.shape.C
        first, count, number = share[1:]
        skipped, steps = turns(wg, share)

        def step(m, carry):
            i = skipped + CONSUMERS * m
            slot = slot_of(number + 2 * i)
            carry = self._tile(lax.div(slot, 2), (first + i * self.blocks) * TOKENS, *carry)
            for j in range(2):
                plgpu.barrier_arrive(smem.empty.at[slot + j])
            return carry

        @pl.when(steps > 0)
        def _():
            lowest = plgpu.layout_cast(jnp.full((H,), MASKED, jnp.float32), PER_COLUMN)
            carry = wgmma_zeros((C, H)), lowest, wgmma_zeros((TOKENS, H))
            acc, peak, sums = lax.fori_loop(0, steps, step, carry)
            total = reduce_columns("add", sums, self.scratch)
            result = acc * broadcast_per_column(1 / total, acc.shape), peak + jnp.log2(total)
            pl.when(skipped == 1)(lambda: self._give(*result))

            @pl.when(skipped == 0)
            def _():
                self._keep(1 + first, *lax.cond(count > 1, lambda: self._joined(*result), lambda: result))

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
        weights = jnp.exp2(scores - broadcast_per_column(new_peak, scores.shape))
        own = smem.weights.at[self.wg]
        store_accumulator(own, weights.astype(self.dtype))
        plgpu.commit_smem()

        def add_values(acc_ref):
            plgpu.wgmma(acc_ref, c.transpose((1, 0)), own.transpose((1, 0)))

        acc = acc * broadcast_per_column(shrink, acc.shape)
        acc = pl.run_state(add_values)(plgpu.WGMMAAccumulatorRef.init(acc))
        return acc, new_peak, sums * broadcast_per_column(shrink, sums.shape) + weights

    def _keep(self, slot, mean, log2_sum) -> None:
        """Writes a result, [C, H], by way of the place of the queries, which both consumers are done with."""
        store_accumulator(self.smem.q_c, mean.astype(self.dtype))
        regs.store_strided(self.refs.log2_sums.at[:, slot], log2_sum, PER_COLUMN)
        cta_sync.warpgroup_barrier()
        copy_rows(self.smem.q_c, self.refs.partial.at[slot])

    def _give(self, mean, log2_sum) -> None:
        """Hands a consumer's result to the other one."""
        self.smem.log2_sum[...] = log2_sum
        store_accumulator(self.smem.given, mean.astype(self.dtype))
        self.meet_in_block()

    def _joined(self, mean, log2_sum) -> tuple:
        """The block's result."""
        self.meet_in_block()
        theirs = load_accumulator(self.smem.given, self.dtype).astype(jnp.float32)
        their_log2_sum = load_as(self.smem.log2_sum, PER_COLUMN)
        peak = jnp.maximum(log2_sum, their_log2_sum)
        own, other = jnp.exp2(log2_sum - peak), jnp.exp2(their_log2_sum - peak)
        total = own + other
        mean = mean * broadcast_per_column(own / total, mean.shape) + theirs * broadcast_per_column(
            other / total, mean.shape
        )
        return mean, peak + jnp.log2(total)

    def fetch(self, head) -> None:
        """The first results of a head to shared memory, for both consumers."""
        plgpu.copy_gmem_to_smem(self.refs.log2_sums.at[head], self.smem.of_head, self.smem.of_head_full)
        count = jnp.minimum(lax.div(self.used + AT_ONCE - 1, AT_ONCE), CONSUMERS * AHEAD)
        lax.fori_loop(0, count, lambda n, _: self._fetch(head, lax.rem(n, CONSUMERS), lax.div(n, CONSUMERS)), None)

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
        log2_sums, slot = (
            load_as(smem.of_head, regs.ONE_PER_THREAD),
            regs.element_indices(partial_slots(self.blocks)),
        )
        log2_sums = jnp.where(slot < self.used, log2_sums, MASKED)
        sums = jnp.exp2(log2_sums - regs.reduce_max(log2_sums, regs.ONE_PER_THREAD, self.scratch))
        regs.store(smem.shares, sums, regs.ONE_PER_THREAD)  # the same of both consumers
        total = regs.reduce_sum(sums, regs.ONE_PER_THREAD, self.scratch)  # its barriers make the shares seen

        def some(i, acc):
            place, first = self._place(wg, i), self._first(wg, i)
            plgpu.barrier_wait(smem.partials_full.at[place])
            for j in range(AT_ONCE):
                share, part = (
                    smem.shares[first + j],
                    regs.load_f32(smem.partials.at[place, j], regs.vector_layout(C)),
                )
                acc += share * jnp.where(share > 0, part, 0.0)
            cta_sync.warpgroup_barrier()
            self._fetch(head, wg, i + AHEAD)
            return acc

        nothing = plgpu.layout_cast(jnp.zeros((C,), jnp.float32), regs.vector_layout(C))
        rounds = lax.div(self.used + (CONSUMERS - wg) * AT_ONCE - 1, CONSUMERS * AT_ONCE)
        regs.store(smem.latent.at[wg], lax.fori_loop(0, rounds, some, nothing), regs.vector_layout(C))
        self.meet_in_block()
        one, other = (regs.load_f32(smem.latent.at[i], products.operand(C)) for i in range(CONSUMERS))
        return ((one + other) / total).astype(self.dtype)
