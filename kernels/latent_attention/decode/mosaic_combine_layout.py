"""Register layouts of the combine kernel on Hopper: which thread of a warpgroup loads what of O^T [C, rows]."""

import math

import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.utils import vector_concat, vector_slice
from jax.experimental.pallas import mosaic_gpu as plgpu

from latent_attention.hopper.smem_tiles import tiled_layout

VECTOR = 4
"""Rows that a thread loads at a time: 16 bytes."""


class CombineTile:
    """Tile [columns, rows] of one split, or [parallel splits, columns, rows], as a warpgroup holds it.

    Each thread has VECTOR neighbouring rows of each of `thread_columns` neighbouring columns. With one parallel split,
    the four warps have different columns; with more, different splits, two a warp if there are eight.
    """

    def __init__(self, rows: int, parallel_splits: int, thread_columns: int):
        warp_splits = max(parallel_splits // 4, 1)
        row_lanes = math.gcd(rows // VECTOR, 32 // VECTOR)
        column_lanes = 32 // (row_lanes * warp_splits)
        self.rows, self.thread_columns = rows, thread_columns
        self.columns = 4 * warp_splits // parallel_splits * column_lanes * thread_columns
        self.elements = parallel_splits * self.columns * rows // 128
        """Elements of each thread."""
        self.warp = column_lanes * thread_columns, VECTOR * row_lanes
        """(columns, rows) of a warp."""
        all_warps = self.columns, self.warp[1]
        if parallel_splits == 1:
            self.shape, split_axis = (self.columns, rows), ()
            self.layout = tiled_layout(all_warps, self.warp, (thread_columns, VECTOR), warps=(-6,), lanes=(-4, -3))
        else:
            self.shape, split_axis = (parallel_splits, self.columns, rows), (0,)
            tiles = (parallel_splits, *all_warps), (warp_splits, *self.warp), (1, thread_columns, VECTOR)
            self.layout = tiled_layout(*tiles, warps=(-9, -8), lanes=(-6, -5, -4))
        self.stats_shape, self.stats_layout = (*self.shape[:-2], rows), self.layout.reduce((len(split_axis),))
        """Shape and layout of m_i and l_i, without the axis of columns."""
        self.splits_layout = self.layout.reduce((1, 2)) if split_axis else None
        """Layout of a vector [parallel splits]."""
        self._stats_axes = *split_axis, len(self.shape) - 1

    def over_columns(self, x):
        """Broadcasts [.., rows] to [.., columns, rows]."""
        return broadcast(x, self.shape, self._stats_axes, self.layout)

    def transpose(self, x):
        """Transposes [columns, rows] to [rows, columns], within the registers of each thread."""
        shape, (down, across) = (self.rows, self.columns), self.warp
        wide = self.thread_columns
        layout = tiled_layout(
            (across, self.columns), (across, down), (VECTOR, wide), (1, wide), warps=(-7,), lanes=(-5, -6)
        )

        @plgpu.inline_mgpu(arg_types=(self.layout,), return_type=plgpu.ShapeDtypeStruct(shape, x.dtype, layout=layout))
        def transpose(_, x):
            old = x.registers.reshape(-1, wide)
            new = np.empty((len(old), VECTOR), dtype=object)
            for i, j in np.ndindex(new.shape):
                new[i, j] = vector_concat([vector_slice(column, slice(j, j + 1)) for column in old[i]])
            to = layout.to_mgpu()
            return mgpu.FragmentedArray(_registers=new.reshape(to.registers_shape(shape)), _layout=to, _is_signed=None)

        return transpose(x)  # pyright: ignore[reportCallIssue]

    def merged_layout(self):
        """Layout of [columns, rows] with one element a thread and lanes along columns, as the output lies in memory."""
        lane_columns = min(self.columns, 8)
        lane_rows = 32 // lane_columns
        row_warps = math.gcd(4, self.rows // lane_rows)
        column_warps = math.gcd(4 // row_warps, self.columns // lane_columns)
        copies = 4 // (row_warps * column_warps)
        tiles = (column_warps * lane_columns, row_warps * lane_rows), (lane_columns, lane_rows), (1, 1)
        return tiled_layout(*tiles, warps=(-6, -5, *([plgpu.Replicated(copies)] if copies > 1 else [])), lanes=(-4, -3))


def broadcast(x, shape, axes, layout):
    """`lax.broadcast_in_dim` with this layout of the result."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, axes), layout)
