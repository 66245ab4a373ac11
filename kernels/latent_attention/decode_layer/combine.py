"""The end of the attention: partial results combined per head, then the up-projection of values.

A unit of work is 32 rows of W^UV of one head; the CTA that has it combines that head's partial results first. So a head
is combined by several CTAs, each for itself, which saves handing the result on.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from latent_attention.decode_layer import gemv, layouts
from latent_attention.decode_layer.consumer_context import ConsumerContext
from latent_attention.decode_layer.global_layout import PARTIALS_PER_COPY, max_partials
from latent_attention.decode_layer.smem_layout import PARTIAL_SLOTS, VALUE_ROWS, value_sums_per_row
from latent_attention.decode_layer.tile_stream import NUM_CONSUMERS
from latent_attention.hopper import cta_sync
from latent_attention.hopper import registers as regs
from latent_attention.hopper.smem_tiles import MASKED, load_as

_UNIT_ROWS = NUM_CONSUMERS * VALUE_ROWS


class Combine:
    """The combine and value projection of one consumer warpgroup. `num_partials` are written, see `SplitKV`."""

    def __init__(self, context: ConsumerContext, num_partials):
        self.context, self.shape, self.smem, self.wg = context, context.shape, context.smem, context.wg
        self.num_partials = num_partials
        self.units = self.shape.H * self.shape.V // _UNIT_ROWS

    def load_first_values(self) -> tuple[Any, Any]:
        """`_load_values` of the CTA's first unit; of a CTA that has none, of some other unit."""
        return self._load_values(jnp.minimum(self.context.cta, self.units - 1))

    def _load_values(self, unit) -> tuple[Any, Any]:
        """This consumer's rows of W^UV in a unit, and in 8 bits the scales of all of its rows."""
        N, V, C = self.shape.N, self.shape.V, self.shape.C
        refs, row = self.context.refs, unit * _UNIT_ROWS
        row += (lax.div(row, V) + 1) * N  # in `kv_b` each head has N rows of keys, then V rows of values
        own = refs.kv_b.at[pl.ds(row + self.wg * VALUE_ROWS, VALUE_ROWS)]
        if refs.scales is None:
            return load_as(own, layouts.matrix_layout(C)), None
        scales = regs.gather(refs.scales.kv_b, row + jnp.minimum(regs.element_indices(), _UNIT_ROWS - 1))
        return gemv.load_rows(own, VALUE_ROWS, C), scales

    def prefetch_partials(self, i) -> None:
        """Starts the first copies of partial results for the CTA's i-th unit, if it has that. For both consumers."""
        unit = self.context.cta + i * self.context.num_ctas
        head = lax.div(unit * NUM_CONSUMERS * VALUE_ROWS, self.shape.V)
        pl.when(unit < self.units)(lambda: self._start_copies(head))

    def project_values(self, values) -> None:
        """W^UV of equation 11 times the attention over latents: the attention's output [H V], published by consumer 0.

        `values` is from `load_first_values`, and the copies of the first unit have been started.
        """
        context, row_sums = self.context, self.smem.row_sums
        per_row = value_sums_per_row(self.shape)

        def one(i, values, scales):
            unit = context.cta + i * context.num_ctas
            latent = self._combine(lax.div(unit * _UNIT_ROWS, self.shape.V))
            if self.units > context.num_ctas:
                pl.when(self.wg == 0)(lambda: self.prefetch_partials(i + 1))
            own_rows = pl.ds(self.wg * VALUE_ROWS * per_row, VALUE_ROWS * per_row)
            gemv.gemv(context.operand(latent), values, row_sums.at[own_rows], per_row)
            context.cta_barrier()

            @pl.when(self.wg == 0)
            def _():
                n = jnp.minimum(regs.element_indices(), _UNIT_ROWS - 1)
                y = gemv.reduce_row_sums(row_sums, n, per_row)
                if scales is not None:
                    y = y * scales
                context.publish(context.workspace.values, unit * _UNIT_ROWS + n, y)

        @pl.when(context.cta < self.units)
        def _():
            one(0, *values)
            if self.units > context.num_ctas:

                def more(i, _):
                    one(i, *self._load_values(context.cta + i * context.num_ctas))

                lax.fori_loop(1, context.num_own(self.units), more, None)

    def _start_copies(self, head) -> None:
        """The log-sum-exps of a head, and as many of its partial results as there are slots for."""
        smem, refs = self.smem, self.context.refs
        plgpu.copy_gmem_to_smem(refs.partial_lse.at[head], smem.head_lse, smem.head_lse_loaded)
        needed = lax.div(self.num_partials + PARTIALS_PER_COPY - 1, PARTIALS_PER_COPY)

        def start(n, _):
            self._start_copy(head, lax.rem(n, NUM_CONSUMERS), lax.div(n, NUM_CONSUMERS))

        lax.fori_loop(0, jnp.minimum(needed, NUM_CONSUMERS * PARTIAL_SLOTS), start, None)

    @staticmethod
    def _first(wg, i):
        """The first partial result of consumer wg's i-th copy; consumers take copies in turn."""
        return (i * NUM_CONSUMERS + wg) * PARTIALS_PER_COPY

    @staticmethod
    def _slot(wg, i):
        """Where that copy goes in `Smem.partials`."""
        return PARTIAL_SLOTS * wg + lax.rem(i, PARTIAL_SLOTS)

    def _start_copy(self, head, wg, i) -> None:
        """Starts a copy, if there is anything in it. After the last result it may contain anything."""
        first, slot = self._first(wg, i), self._slot(wg, i)

        @pl.when(first < self.num_partials)
        def _():
            partials = self.context.refs.partial_out.at[pl.ds(first, PARTIALS_PER_COPY), head]
            plgpu.copy_gmem_to_smem(partials, self.smem.partials.at[slot], self.smem.partials_loaded.at[slot])

    def _combine(self, head) -> Any:
        """The attention of a head over latents: [C], the operand of `gemv`. Each consumer sums the copies it has."""
        smem, C, wg, scratch = self.smem, self.shape.C, self.wg, self.context.scratch
        plgpu.barrier_wait(smem.head_lse_loaded)
        lse = load_as(smem.head_lse, regs.ONE_PER_THREAD)
        index = regs.element_indices(max_partials(self.context.num_ctas))
        lse = jnp.where(index < self.num_partials, lse, MASKED)
        weights = jnp.exp2(lse - regs.reduce_max(lse, regs.ONE_PER_THREAD, scratch))
        regs.store(smem.combine_weights, weights, regs.ONE_PER_THREAD)  # both consumers write the same
        total = regs.reduce_sum(weights, regs.ONE_PER_THREAD, scratch)  # its barriers make the weights visible

        def step(i, acc):
            slot, first = self._slot(wg, i), self._first(wg, i)
            plgpu.barrier_wait(smem.partials_loaded.at[slot])
            for j in range(PARTIALS_PER_COPY):
                weight = smem.combine_weights[first + j]
                partial = regs.load_f32(smem.partials.at[slot, j], regs.vector_layout(C))
                acc += weight * jnp.where(weight > 0, partial, 0.0)  # of weight 0 it may be NaN
            cta_sync.warpgroup_barrier()  # all warps have read the slot; no fence, see `fence_proxy_async`
            self._start_copy(head, wg, i + PARTIAL_SLOTS)
            return acc

        zeros = plgpu.layout_cast(jnp.zeros((C,), jnp.float32), regs.vector_layout(C))
        steps = lax.div(
            self.num_partials + (NUM_CONSUMERS - wg) * PARTIALS_PER_COPY - 1, NUM_CONSUMERS * PARTIALS_PER_COPY
        )
        regs.store(smem.head_vector.at[wg], lax.fori_loop(0, steps, step, zeros), regs.vector_layout(C))
        self.context.cta_barrier()
        one, other = (regs.load_f32(smem.head_vector.at[i], layouts.operand_layout(C)) for i in range(NUM_CONSUMERS))
        return ((one + other) / total).astype(self.context.dtype)
