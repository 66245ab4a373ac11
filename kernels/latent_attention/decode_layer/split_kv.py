"""The attention of the fused decoder layer: flash-decoding over the latents, each CTA over its tiles of the cache.

As in `decode.mosaic_split_kv`, a tile of the cache is on the M axis of wgmma and the heads are on N. Every CTA that has
tiles writes one partial result; `combine` merges them. The new token, which is not in the cache yet when its tiles are
copied, is a partial result of its own, number 0.
"""

import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from latent_attention.decode_layer import layouts
from latent_attention.decode_layer.consumer_context import ConsumerContext
from latent_attention.decode_layer.tile_stream import (
    NUM_CONSUMERS,
    TILE_TOKENS,
    cache_length,
    consumer_tile_range,
    stage_of,
    token_tile,
)
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


class SplitKV:
    """The attention of one consumer warpgroup."""

    def __init__(self, context: ConsumerContext, scale: float):
        self.context, self.shape, self.smem, self.refs = context, context.shape, context.smem, context.refs
        self.wg, self.scratch, self.dtype = context.wg, context.scratch, context.dtype
        self.log2_scale = scale * math.log2(math.e)
        self.kv_len = cache_length(self.refs)
        # The new token's, and one of each CTA that has tiles: number 1 + first_tile. There are no gaps, as the first
        # tiles of the n CTAs that have some are 0 to n - 1.
        self.num_partials = 1 + jnp.minimum(lax.div(self.kv_len + TILE_TOKENS - 1, TILE_TOKENS), context.num_ctas)
        # The largest p of a tile is 2^headroom, so that small ones do not underflow in float16.
        self.headroom = 15 if self.dtype == jnp.float16 else 0

    def attend_to_new(self) -> None:
        """Partial result 0, of the new token alone: its latent and its score, one head per CTA, by consumer 1."""
        context, refs, C, R = self.context, self.refs, self.shape.C, self.shape.R
        scratch = self.smem.new_token_scratch.at[self.wg]
        head = context.num_ctas - 1 - context.cta  # the last CTAs, as the first ones have had RoPE to do
        assert layouts.is_narrow(C)

        @pl.when((head < self.shape.H) & (self.wg == 1))
        def _():
            query = context.workspace.absorbed_q.at[pl.ds(head * (C + R), C + R)]
            for i, words in enumerate((query, context.workspace.new_token)):
                mailbox.receive(words, scratch.at[i, pl.ds(0, C + R)], context.epoch, 128)
            cta_sync.warpgroup_barrier()

            def dot(columns, layout):
                q, k = (regs.load_f32(scratch.at[i, columns], layout) for i in range(2))
                return regs.reduce_sum(q * k, layout, self.scratch), k

            score, c = dot(pl.ds(0, C), layouts.operand_layout(C))
            score = (score + dot(pl.ds(C, R), regs.rope_pairs_layout(R))[0]) * self.log2_scale
            fits_in_cache = refs.length[0] < refs.c.shape[1]
            regs.store(refs.partial_out.at[0, head], c.astype(self.dtype), layouts.operand_layout(C))
            refs.partial_lse[head, 0] = jnp.where(fits_in_cache, score, MASKED)
            cta_sync.warpgroup_barrier()  # all warps have read `new_token_scratch`, which p overwrites

    def receive_queries(self) -> None:
        """Absorbed queries of all heads to shared memory, by both consumers, if the CTA has tiles."""
        context, smem = self.context, self.smem

        @pl.when(context.partition["tokens"].num_tiles > 0)
        def _():
            words = context.workspace.absorbed_q
            receive_rows(words, (smem.q_c, smem.q_rope), context.epoch, 128 * NUM_CONSUMERS)
            plgpu.commit_smem()

        context.cta_barrier()

    def attend(self) -> None:
        """The CTA's partial result over its tiles (equation 18 on latents), if it has any; after `receive_queries`."""
        smem, wg, H, C = self.smem, self.wg, self.shape.H, self.shape.C
        part = self.context.partition["tokens"]
        first, steps = consumer_tile_range(wg, part)

        def step(m, carry):
            i = first + NUM_CONSUMERS * m
            stage = stage_of(part.first_index + 2 * i)
            carry = self._tile(lax.div(stage, 2), (part.first_tile + i * self.context.num_ctas) * TILE_TOKENS, *carry)
            for j in range(2):
                plgpu.barrier_arrive(smem.consumed.at[stage + j])  # by every thread, so it needs no barrier before
            return carry

        @pl.when(steps > 0)
        def _():
            initial_max = plgpu.layout_cast(jnp.full((H,), MASKED, jnp.float32), PER_COLUMN)
            carry = wgmma_zeros((C, H)), initial_max, wgmma_zeros((TILE_TOKENS, H))
            acc, m_i, p_sums = lax.fori_loop(0, steps, step, carry)
            l_i = reduce_columns("add", p_sums, self.scratch)
            result = acc * broadcast_per_column(1 / l_i, acc.shape), m_i + jnp.log2(l_i)
            # The consumer of the CTA's first tile writes. The other one has tiles, and sends, if there is a second: so
            # whenever one of them comes to the `cta_barrier` in `_send` or `_merged`, so does the other.
            pl.when(first == 1)(lambda: self._send(*result))

            @pl.when(first == 0)
            def _():
                index = 1 + part.first_tile
                self._write(index, *lax.cond(part.num_tiles > 1, lambda: self._merged(*result), lambda: result))

    def _tile(self, pair, base, acc, m_i, p_sums):
        """One step of the online softmax: the tile in a pair of stages, of tokens from `base` on.

        acc [C, H] is not normalised, m_i [H] the running maximum, base 2, and p_sums [TILE_TOKENS, H] the running sum
        of p over tiles, whose sum over tokens is l_i.
        """
        smem, H = self.smem, self.shape.H
        c, k_rope = token_tile(self.shape, smem, pair)
        plgpu.barrier_wait(smem.tokens_produced.at[pair])

        @pl.when(base + TILE_TOKENS > self.kv_len)
        def _():  # beyond kv_len there may be NaN, and 0 x NaN is NaN
            clear_rows(c, self.kv_len - base)

        def scores_of(scores_ref):
            plgpu.wgmma(scores_ref, c, smem.q_c.transpose((1, 0)))
            plgpu.wgmma(scores_ref, k_rope, smem.q_rope.transpose((1, 0)))
            return scores_ref[...]

        scores = pl.run_scoped(scores_of, plgpu.WGMMAAccumulatorRef((TILE_TOKENS, H), jnp.float32)) * self.log2_scale
        scores = jnp.where(iota((TILE_TOKENS, H), 0) < self.kv_len - base, scores, MASKED)
        m_new = jnp.maximum(m_i, reduce_columns("max", scores, self.scratch) - self.headroom)
        alpha = jnp.exp2(m_i - m_new)
        p = jnp.exp2(scores - broadcast_per_column(m_new, scores.shape))
        p_smem = smem.p.at[self.wg]
        store_accumulator(p_smem, p.astype(self.dtype))
        plgpu.commit_smem()

        def add_values(acc_ref):
            plgpu.wgmma(acc_ref, c.transpose((1, 0)), p_smem.transpose((1, 0)))

        acc = acc * broadcast_per_column(alpha, acc.shape)
        acc = pl.run_state(add_values)(plgpu.WGMMAAccumulatorRef.init(acc))
        return acc, m_new, p_sums * broadcast_per_column(alpha, p_sums.shape) + p

    def _write(self, index, out, lse) -> None:
        """Writes a partial result [C, H], by way of the queries' memory, which both consumers are done with."""
        store_accumulator(self.smem.q_c, out.astype(self.dtype))
        regs.store_strided(self.refs.partial_lse.at[:, index], lse, PER_COLUMN)
        cta_sync.warpgroup_barrier()
        copy_rows(self.smem.q_c, self.refs.partial_out.at[index])

    def _send(self, out, lse) -> None:
        """Hands this consumer's result to the other one."""
        self.smem.exchange_lse[...] = lse
        store_accumulator(self.smem.exchange, out.astype(self.dtype))
        self.context.cta_barrier()

    def _merged(self, out, lse) -> tuple:
        """The result of both consumers, from this one's and what the other sends."""
        self.context.cta_barrier()
        other_out = load_accumulator(self.smem.exchange, self.dtype).astype(jnp.float32)
        other_lse = load_as(self.smem.exchange_lse, PER_COLUMN)
        m = jnp.maximum(lse, other_lse)
        own, other = jnp.exp2(lse - m), jnp.exp2(other_lse - m)
        total = own + other
        out = out * broadcast_per_column(own / total, out.shape)
        out += other_out * broadcast_per_column(other / total, out.shape)
        return out, m + jnp.log2(total)
