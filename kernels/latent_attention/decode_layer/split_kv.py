"""The attention of the fused decoder layer: flash-decoding over the latents, each CTA over its tiles of the cache.

As in `decode.mosaic_split_kv`, a tile of the cache is on the M axis of wgmma and the heads are on N. Every CTA that has
tiles writes one partial result; `combine` merges them. The new token, which is not in the cache yet when its tiles are
copied, is a partial result of its own, number 0.

With a cache in 8 bits, S is an exact product of integers, queries being two int8 digits, and values are widened in
registers; scales of the latents are part of S, hence of P. See "int8" in docs/kernels.md.
"""

import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from latent_attention.decode_layer import digits, layouts
from latent_attention.decode_layer.consumer_context import ConsumerContext
from latent_attention.decode_layer.smem_layout import VALUE_TOKENS
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
from latent_attention.hopper.int8_tiles import MIN_SCALE, load_transposed, scaled_products, store_restored
from latent_attention.hopper.smem_tiles import (
    MASKED,
    PER_COLUMN,
    PER_ROW,
    any_above,
    broadcast_per_column,
    broadcast_per_row,
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

_HEADROOM, _GROWTH = 7, 8
"""Of probabilities with a cache in 8 bits, in float16: exponents of the largest one when the maximum is raised, and of
how much they may grow after that before it is raised again; 2^15 fits in float16."""


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
        self.int8 = self.refs.cache_scales is not None
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
            words, tiles = context.workspace.absorbed_q, (smem.q_c, smem.q_rope)
            if self.int8:
                digits.receive_queries(words, tiles, smem.q_scales, self.dtype, context.epoch, 4 * NUM_CONSUMERS)
            else:
                receive_rows(words, tiles, context.epoch, 128 * NUM_CONSUMERS)
            plgpu.commit_smem()

        context.cta_barrier()

    def attend(self) -> None:
        """The CTA's partial result over its tiles (equation 18 on latents), if it has any; after `receive_queries`."""
        smem, wg, H, C = self.smem, self.wg, self.shape.H, self.shape.C
        part = self.context.partition["tokens"]
        first, steps = consumer_tile_range(wg, part)
        stages, attend_to_tile = part.stream.stages, self._int8_tile if self.int8 else self._tile

        def step(m, carry):
            i = first + NUM_CONSUMERS * m
            stage = stage_of(part.first_index + stages * i)
            place, tile = lax.div(stage, stages), part.first_tile + i * self.context.num_ctas
            carry = attend_to_tile(place, tile * TILE_TOKENS, *carry)
            for j in range(stages):
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

    def _int8_tile(self, stage, base, acc, m_i, p_sums):
        """`_tile` of a cache in 8 bits, the tile in a stage; acc has its rows in the order of `load_transposed`.

        m_i is the running maximum less `_HEADROOM` at least, and is left as it is while p does not exceed float16: the
        vote on that costs less than the maximum. p of a token contains the scale of its latent, p_sums do not.
        """
        smem, H, C = self.smem, self.shape.H, self.shape.C
        c, k_rope = token_tile(self.shape, smem, stage)
        plgpu.barrier_wait(smem.tokens_produced.at[stage])

        def products(c_ref, rope_ref):
            plgpu.wgmma(rope_ref, k_rope, smem.q_rope.transpose((1, 0)))
            plgpu.wgmma(c_ref, c, smem.q_c.transpose((1, 0)))
            # While they run: scales, which may be NaN beyond kv_len, and the first values.
            valid = iota((TILE_TOKENS,), 0, PER_ROW) < self.kv_len - base
            c_scale, rope_scale = (load_as(smem.cache_scales.at[stage, i], PER_ROW) for i in range(2))
            c_scale = jnp.where(valid, jnp.maximum(c_scale, MIN_SCALE), 1.0)
            rope_scale = jnp.where(valid, rope_scale, 0.0)
            log2_scale = jnp.where(valid, jnp.log2(c_scale), MASKED)  # so it masks the scores
            values = load_transposed(c, C, 0, VALUE_TOKENS)
            c_products, rope_products = c_ref[...], rope_ref[...]
            return c_products, rope_products, c_scale, rope_scale, log2_scale, values

        accumulators = [plgpu.WGMMAAccumulatorRef((TILE_TOKENS, 2 * H), jnp.int32)] * 2
        of_c, of_rope, c_scale, rope_scale, log2_scale, values = pl.run_scoped(products, *accumulators)
        scores = scaled_products(of_c, digits.RADIX, c_scale) + scaled_products(of_rope, digits.RADIX, rope_scale)
        q_scale = load_as(smem.q_scales, PER_COLUMN) * self.log2_scale
        scores = scores * broadcast_per_column(q_scale, scores.shape) + broadcast_per_row(log2_scale, scores.shape)

        def raise_maximum(acc, m_i, p_sums):
            m_new = jnp.maximum(m_i, reduce_columns("max", scores, self.scratch) - _HEADROOM)
            alpha = jnp.exp2(m_i - m_new)
            acc, p_sums = (x * broadcast_per_column(alpha, x.shape) for x in (acc, p_sums))
            return acc, m_new, p_sums

        # This barrier comes after all warps' products with the previous p, where the scratch and the next p are.
        grown = any_above(scores - broadcast_per_column(m_i, scores.shape), _HEADROOM + _GROWTH)
        acc, m_i, p_sums = lax.cond(grown > 0, raise_maximum, lambda *same: same, acc, m_i, p_sums)
        p = jnp.exp2(scores - broadcast_per_column(m_i, scores.shape))
        p_sums += p * broadcast_per_row(1 / c_scale, p.shape)
        store_accumulator(smem.p.at[self.wg], p.astype(jnp.float16), VALUE_TOKENS)
        plgpu.commit_smem()

        def add_values(acc_ref):
            for start in range(0, TILE_TOKENS, VALUE_TOKENS):
                own = load_transposed(c, C, start, VALUE_TOKENS) if start else values
                plgpu.wgmma(acc_ref, own, smem.p.at[self.wg, :, pl.ds(start, VALUE_TOKENS)].transpose((1, 0)))

        return pl.run_state(add_values)(plgpu.WGMMAAccumulatorRef.init(acc)), m_i, p_sums

    def _write(self, index, out, lse) -> None:
        """Writes a partial result [C, H]; in 16 bits by way of the memory of the queries, which both have done with."""
        out, partial_out = out.astype(self.dtype), self.refs.partial_out.at[index]
        if self.int8:
            regs.store_strided(self.refs.partial_lse.at[:, index], lse, PER_COLUMN)
            store_restored(partial_out, out)
            return
        store_accumulator(self.smem.q_c, out)
        regs.store_strided(self.refs.partial_lse.at[:, index], lse, PER_COLUMN)
        cta_sync.warpgroup_barrier()
        copy_rows(self.smem.q_c, partial_out)

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
