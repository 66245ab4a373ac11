"""The projections of the layer: matrices that come through the pipeline, times a vector, rows to consumers in tiles.

Both consumers multiply tiles, each its own (`consumer_tile_range`); their partial sums meet in shared memory, and
consumer 0 adds them up and hands the results to an epilogue.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from latent_attention.decode_layer import gemv
from latent_attention.decode_layer.consumer_context import ConsumerContext
from latent_attention.decode_layer.tile_stream import (
    NUM_CONSUMERS,
    NUM_STAGES,
    CtaPartition,
    consumer_tile_range,
    num_prefetched,
    stage_of,
)
from latent_attention.hopper import registers as regs

Epilogue = Callable[..., None]
"""Called with indices of rows [128] and their results [128], `ONE_PER_THREAD`; of two matrices with both results."""


class Projections:
    """The streamed projections of one consumer warpgroup."""

    def __init__(self, context: ConsumerContext):
        self.context, self.smem, self.num_ctas, self.wg = context, context.smem, context.num_ctas, context.wg

    def prefetch(self, name: str) -> list:
        """This consumer's first tiles of a matrix, in registers: their stages are free for the producer again."""
        part = self.context.partition[name]
        first, _ = consumer_tile_range(self.wg, part)
        return [
            self._load_tile(part, first + m * NUM_CONSUMERS) for m in range(num_prefetched(part.stream, self.num_ctas))
        ]

    def multiply(self, name: str, x, epilogue: Epilogue, num_matrices: int = 1, prefetched: Sequence[Any] = ()) -> None:
        """Multiplies the CTA's rows of a matrix, and calls the epilogue with the results.

        Args:
            name: the tile stream.
            x: the operand, from `gemv.load_vector`.
            epilogue: see `Epilogue`.
            num_matrices: 2 if each tile has rows of two matrices.
            prefetched: from `prefetch`. These tiles are multiplied after those that the pipeline has room for, so that
                the producer refills it meanwhile.

        When consumer 1 returns, consumer 0 may still read `row_sums`. So a `cta_barrier` must precede the next call,
        as `receive_vector` and `grid_barrier` have one.
        """
        part = self.context.partition[name]
        stream = part.stream
        first, steps = consumer_tile_range(self.wg, part)
        scales = self._load_scales(name, part, num_matrices, 0)  # on their way while tiles are multiplied
        x = self.context.operand(x)

        def tile(m, w):
            row = (first + m * NUM_CONSUMERS) * stream.rows
            row_sums = self.smem.row_sums.at[pl.ds(row * stream.sums_per_row, stream.rows * stream.sums_per_row)]
            gemv.gemv(x, w, row_sums, stream.sums_per_row)

        def step(m, _):
            tile(m, self._load_tile(part, first + m * NUM_CONSUMERS))

            # This consumer has emptied its half of the pipeline once, or has no more tiles: now those prefetched.
            @pl.when(m == jnp.minimum(len(prefetched) + NUM_STAGES // NUM_CONSUMERS, steps) - 1)
            def _():
                for n, w in enumerate(prefetched):
                    tile(n, w)

        lax.fori_loop(len(prefetched), steps, step, None)
        self.context.cta_barrier()
        pl.when(self.wg == 0)(lambda: self._reduce(name, part, epilogue, num_matrices, scales))

    def _load_tile(self, part: CtaPartition, i) -> Any:
        """Loads the CTA's i-th tile into registers and frees its stage."""
        stream, stage = part.stream, stage_of(part.first_index + i)
        plgpu.barrier_wait(self.smem.produced.at[stage])
        w = gemv.load_rows(self.smem.stages.at[stage, pl.ds(0, stream.rows * stream.width)], stream.rows, stream.width)
        plgpu.barrier_arrive(self.smem.consumed.at[stage])  # by every thread, so it needs no barrier before
        return w

    def _rows(self, part: CtaPartition, num_matrices: int, i) -> tuple[Any, Any, Any]:
        """The CTA's i-th 128 rows: the tile, the row in it and the row of the matrix; beyond the last, that again."""
        rows = part.stream.rows // num_matrices
        n = jnp.minimum(regs.element_indices() + i * 128, part.num_tiles * rows - 1)
        tile = lax.div(n, rows)
        row = n - tile * rows
        return tile, row, (part.first_tile + tile * self.num_ctas) * rows + row

    def _load_scales(self, name: str, part: CtaPartition, num_matrices: int, i) -> list:
        """The scales of those rows, of each matrix; none if weights are in 16 bits."""
        scales = self.context.refs.scales
        if scales is None:
            return []
        *_, row = self._rows(part, num_matrices, i)

        def of_rows(ref, row):
            return regs.gather(ref, jnp.clip(row, 0, ref.shape[0] - 1))  # a CTA without rows has others'

        if name == "qkv_a":
            width = self.context.shape.Q
            return [jnp.where(row < width, of_rows(scales.q_a, row), of_rows(scales.kv_a, row - width))]
        refs = (scales.gate, scales.up) if name == "gate_up" else (getattr(scales, name),)
        return [of_rows(ref, row) for ref in refs]

    def _reduce(self, name: str, part: CtaPartition, epilogue: Epilogue, num_matrices: int, scales: list) -> None:
        """Adds up the partial sums of all of the CTA's rows. `scales` are of the first 128."""
        stream, rows = part.stream, part.stream.rows // num_matrices

        def step(i, scales):
            tile, row, index = self._rows(part, num_matrices, i)
            sums = [
                gemv.reduce_row_sums(self.smem.row_sums, tile * stream.rows + matrix * rows + row, stream.sums_per_row)
                for matrix in range(num_matrices)
            ]
            if scales:
                sums = [y * scale for y, scale in zip(sums, scales, strict=True)]
            epilogue(index, *sums)
            return self._load_scales(name, part, num_matrices, i + 1)

        lax.fori_loop(0, lax.div(part.num_tiles * rows + 127, 128), step, scales)

    def publish_epilogue(self, words) -> Epilogue:
        """Epilogue that hands the results to all CTAs through a mailbox."""
        return lambda indices, y: self.context.publish(words, indices, y)

    def residual_epilogue(self, write: Epilogue) -> Epilogue:
        """Epilogue that adds the residual before it writes."""
        return lambda indices, y: write(indices, y + regs.gather(self.smem.residual, indices))

    def swiglu_epilogue(self, write: Epilogue) -> Epilogue:
        """Epilogue that writes SwiGLU of the results of two matrices."""
        return lambda indices, gate, up: write(indices, gate / (1 + jnp.exp(-gate)) * up)
