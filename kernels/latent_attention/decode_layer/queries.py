"""Between the projections and the attention: absorbed queries, RoPE, and the new token's entry in the cache.

Each of the three takes vectors that all CTAs have published and publishes its results. They are small and independent,
so they run side by side: in one consumer of some CTAs each.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from latent_attention.decode_layer import gemv, layouts
from latent_attention.decode_layer.consumer_context import ConsumerContext
from latent_attention.hopper import cta_sync, mailbox
from latent_attention.hopper import registers as regs
from latent_attention.hopper.smem_tiles import load_as


class Queries:
    """Absorption, RoPE and append by one consumer. A unit of the absorption is 64 columns of W^UK of one head."""

    def __init__(self, context: ConsumerContext, kv_gamma, eps: float):
        self.context, self.kv_gamma, self.eps = context, kv_gamma, eps
        self.units_per_head = context.shape.C // regs.VECMAT_COLUMNS
        self.units = context.shape.H * self.units_per_head

    def load_first_keys(self) -> tuple[Any, ...]:
        """The CTA's first unit and `_load_keys` of it; of a CTA that has none, of some other unit."""
        unit = jnp.minimum(self.context.cta, self.units - 1)
        return unit, *self._load_keys(unit)

    def _load_keys(self, unit) -> tuple[Any, Any]:
        """W^UK of a unit: [N, 64], and in 8 bits the scales of its rows."""
        _, _, _, _, N, V, _, _ = self.context.shape
        refs, row = self.context.refs, lax.div(unit, self.units_per_head) * (N + V)
        column = lax.rem(unit, self.units_per_head) * regs.VECMAT_COLUMNS
        keys = load_as(refs.kv_b.at[pl.ds(row, N), pl.ds(column, regs.VECMAT_COLUMNS)], regs.VECMAT_TILE)
        if refs.scales is None:
            return keys, None
        return keys, load_as(refs.scales.kv_b.at[pl.ds(row, N)], regs.VECMAT_TILE.reduce((1,)))

    def absorb(self, unit, keys, scales) -> None:
        """W^UK of equation 10 absorbed into the queries: q^C W^UK of each head, by consumer 0.

        `unit`, `keys` and `scales` are from `load_first_keys`.
        """
        context, (C, R, N) = self.context, self.context.shape[2:5]
        cta, num_ctas = context.cta, context.num_ctas

        def one(unit, keys, scales):
            head = lax.div(unit, self.units_per_head)
            column = lax.rem(unit, self.units_per_head) * regs.VECMAT_COLUMNS
            words = context.workspace.q.at[pl.ds(head * (N + R), N)]
            q = regs.load_f32(context.receive_query(words), regs.VECMAT_TILE.reduce((1,)))
            if scales is not None:
                q = q * scales
            y = regs.vecmat(q, keys.astype(jnp.float32), context.scratch)
            result = context.smem.head_vector.at[context.wg, pl.ds(0, regs.VECMAT_COLUMNS)]
            regs.store(result, y, regs.VECMAT_TILE.reduce((0,)))
            context.publish_vector(context.workspace.absorbed_q, head * (C + R) + column, result)

        @pl.when((context.wg == 0) & (cta < self.units))
        def _():
            one(unit, keys, scales)
            if self.units > num_ctas:

                def more(i, _):
                    one(cta + i * num_ctas, *self._load_keys(cta + i * num_ctas))

                lax.fori_loop(1, context.num_own(self.units), more, None)

    def apply_rope(self, cos, sin) -> None:
        """RoPE of the rotary part of the queries (equation 14): one head per CTA, by consumer 1."""
        context, (C, R, N), H = self.context, self.context.shape[2:5], self.context.shape.H
        layout = regs.rope_pairs_layout(R)

        @pl.when((context.wg == 1) & (context.cta < H))
        def _():
            words = context.workspace.q.at[pl.ds(context.cta * (N + R) + N, R)]
            result = context.smem.head_vector.at[context.wg, pl.ds(0, R)]
            q = regs.load_f32(context.receive_query(words), layout)
            regs.store(result, regs.apply_rope(q, cos, sin), layout)
            context.publish_vector(context.workspace.absorbed_q, context.cta * (C + R) + C, result)

    def append_to_cache(self, cos, sin) -> None:
        """The new token's latent and rotary key (equations 9 and 15, norm and RoPE), by consumer 1 of the last CTA.

        They go to the cache, if it is not full, and to all CTAs, which see them as the cache holds them.
        """
        context, (Q, C, R) = self.context, self.context.shape[1:4]
        refs, position, layout = context.refs, context.refs.length[0], regs.rope_pairs_layout(R)
        before, after = (context.smem.new_token_scratch.at[context.wg, i, pl.ds(0, C + R)] for i in range(2))
        latent, rotary = pl.ds(0, C), pl.ds(C, R)

        @pl.when((context.wg == 1) & (context.cta == context.num_ctas - 1))
        def _():
            mailbox.receive(context.workspace.qkv_a.at[pl.ds(Q, C + R)], before, context.epoch, 128)
            cta_sync.warpgroup_barrier()
            c = gemv.load_vector(before.at[latent])
            c = regs.rms_norm(c, self.kv_gamma, self.eps, layouts.operand_layout(C), context.scratch)
            k_rope = regs.apply_rope(regs.load_f32(before.at[rotary], layout), cos, sin).astype(context.dtype)
            parts, of_parts = (c, k_rope), (layouts.operand_layout(C), layout)
            cached, scales, store = parts, (), regs.store
            if refs.cache_scales is not None:
                quantized = [regs.quantize(x, of, context.scratch) for x, of in zip(parts, of_parts, strict=True)]
                (cached, scales), store = zip(*quantized, strict=True), regs.store_int8
                parts = [(x * scale).astype(context.dtype) for x, scale in quantized]
            for x, of, columns in zip(parts, of_parts, (latent, rotary), strict=True):
                regs.store(after.at[columns], x, of)
            context.publish_vector(context.workspace.new_token, 0, after)

            @pl.when(position < refs.c.shape[1])
            def _():
                for ref, x, of in zip((refs.c, refs.rope), cached, of_parts, strict=True):
                    store(ref.at[0, position], x, of)
                for i, scale in enumerate(scales):
                    refs.cache_scales[0, i, position] = scale
