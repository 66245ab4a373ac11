"""Second kernel of the decode on Hopper: merges the partial results of each sequence (split-KV, FlashDecoding).

A block takes some columns and rows of the output of one sequence; a thread reads 4 rows at a time. If sequences have
many slots, the warps of a block take different slots and meet in shared memory; if few, they take different columns.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.utils import vector_concat, vector_slice
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import gpu

from latent_attention.hopper.smem_tiles import LOWEST, load_as, tiled_layout

_VECTOR = 4
"""Rows that a thread reads at a time: 16 bytes."""
_MOST_ROWS = 32
"""Of a block: whole lines of 128 bytes."""
_VALUES_AT_ONCE = 64
"""Numbers of the partial outputs that a thread holds."""
_MOST_BESIDE = 8
"""Slots that a warpgroup reads side by side: two a warp."""
_MOST_WARPGROUPS = 4
_SLOTS_A_THREAD = 4
"""What a thread should have to read before more of them share the slots."""
_PAD = 4
"""Between columns in shared memory, so that threads that read different columns find different banks."""


class _Tile:
    """Who reads what of a block [columns, rows], or [slots side by side, columns, rows], of the partial outputs.

    Each thread has `_VECTOR` rows of each of `wide` columns that lie together.
    """

    def __init__(self, rows: int, beside: int, wide: int):
        beside_in_warp = max(beside // 4, 1)
        across = math.gcd(rows // _VECTOR, 32 // _VECTOR)
        down = 32 // (across * beside_in_warp)
        self.rows, self.wide, self.columns = rows, wide, 4 * beside_in_warp // beside * down * wide
        self.values = beside * self.columns * rows // 128  # of each thread
        self.warp = down * wide, _VECTOR * across  # columns, rows
        all_warps = self.columns, self.warp[1]
        if beside == 1:
            self.shape, slots_axis = (self.columns, rows), ()
            self.layout = tiled_layout(all_warps, self.warp, (wide, _VECTOR), warps=(-6,), lanes=(-4, -3))
        else:
            self.shape, slots_axis = (beside, self.columns, rows), (0,)
            tiles = (beside, *all_warps), (beside_in_warp, *self.warp), (1, wide, _VECTOR)
            self.layout = tiled_layout(*tiles, warps=(-9, -8), lanes=(-6, -5, -4))
        self.stats_shape, self.stats_layout = (*self.shape[:-2], rows), self.layout.reduce((len(slots_axis),))
        self.slots_layout = self.layout.reduce((1, 2)) if slots_axis else None
        self.stats_axes = *slots_axis, len(self.shape) - 1

    def over_columns(self, x):
        """[.., rows] -> [.., columns, rows]."""
        return _spread(x, self.shape, self.stats_axes, self.layout)

    def transpose(self, x):
        """[columns, rows] -> [rows, columns], within each thread."""
        shape, (down, across) = (self.rows, self.columns), self.warp
        layout = tiled_layout(
            (across, self.columns), (across, down), (_VECTOR, self.wide), (1, self.wide), warps=(-7,), lanes=(-5, -6)
        )

        @plgpu.inline_mgpu(arg_types=(self.layout,), return_type=plgpu.ShapeDtypeStruct(shape, x.dtype, layout=layout))
        def transpose(_, x):
            given = x.registers.reshape(-1, self.wide)
            turned = np.empty((len(given), _VECTOR), dtype=object)
            for i, j in np.ndindex(turned.shape):
                turned[i, j] = vector_concat([vector_slice(column, slice(j, j + 1)) for column in given[i]])
            to = layout.to_mgpu()
            return mgpu.FragmentedArray(
                _registers=turned.reshape(to.registers_shape(shape)), _layout=to, _is_signed=None
            )

        return transpose(x)  # pyright: ignore[reportCallIssue]

    def merged(self):
        """The layout of [columns, rows], one number a thread, in which lanes lie along columns, as in the output."""
        lane_columns = min(self.columns, 8)
        lane_rows = 32 // lane_columns
        row_warps = math.gcd(4, self.rows // lane_rows)
        column_warps = math.gcd(4 // row_warps, self.columns // lane_columns)
        copies = 4 // (row_warps * column_warps)
        tiles = (column_warps * lane_columns, row_warps * lane_rows), (lane_columns, lane_rows), (1, 1)
        return tiled_layout(*tiles, warps=(-6, -5, *([plgpu.Replicated(copies)] if copies > 1 else [])), lanes=(-4, -3))


@plgpu.inline_mgpu()
def _meet(_):
    """All threads of the block have come here, and what they have written to shared memory is there."""
    gpu.barrier()


def _spread(x, shape, axes, layout):
    return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, axes), layout)


def _filled(value, shape, layout):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _divisor_and_lse(peak, total):
    """What to divide by, and the natural logarithm of the sum of all weights: -inf if there are none."""
    seen = total > 0
    divisor = jnp.where(seen, total, jnp.ones_like(total))
    lse = (peak + jnp.log2(divisor)) * math.log(2)
    return divisor, jnp.where(seen, lse, jnp.full_like(lse, -jnp.inf))


def combine(partial_KPCR, stats_KP2R, slots_B2, *, dtype, num_sms: int):
    """out [B, K * R, C] of `dtype` and lse [B, K * R] float32, from the results of `partials` in K blocks of R rows.

    `slots_B2` are the first slot and the number of slots of each sequence, as in `Schedule`; `num_sms` is the number of
    multiprocessors to keep busy.
    """
    row_blocks, slots, c_width, row_block = partial_KPCR.shape
    batch = slots_B2.shape[0]
    rows = max(n for n in range(8, min(row_block, _MOST_ROWS) + 1, 8) if row_block % n == 0)
    row_tiles = row_block // rows

    expected = -(-(slots - batch) // batch)  # slots of a sequence
    beside = 1
    while beside < _MOST_BESIDE and 2 * beside * _SLOTS_A_THREAD <= expected:
        beside *= 2
    warpgroups = min(max(expected // (beside * _SLOTS_A_THREAD), 1), _MOST_WARPGROUPS)
    tile = _Tile(rows, beside, 1)
    # Wide tiles read fewer statistics and write longer runs, but each multiprocessor should have a block or two.
    work = batch * row_blocks * row_tiles * c_width
    while c_width % (2 * tile.columns) == 0 and tile.values <= 16 and work // (2 * tile.columns) >= 3 * num_sms // 2:
        tile = _Tile(rows, beside, 2 * tile.wide)
    columns, parts = tile.columns, beside * warpgroups
    at_once = max(min(-(-expected // parts), _VALUES_AT_ONCE // tile.values), 1)
    merged, merged_stats = tile.merged(), tile.merged().reduce((0,))

    def gather(partial_ref, stats_ref, first, count, wg, column, row):
        """(outputs, peaks, sums), not divided, of the slots that are this thread's."""
        end = first + count
        mine = plgpu.broadcasted_iota(jnp.int32, (beside,), 0, layout=tile.slots_layout) if beside > 1 else 0

        def load(number):
            index = first + (number * warpgroups + wg) * beside
            # Past the end it reads again what the sequence has. Whatever else it reads, which may be NaN, is left out.
            start = jnp.maximum(jnp.minimum(index, end - beside), 0)
            here = start if beside == 1 else pl.ds(start, beside)
            peak, total = (load_as(stats_ref.at[here, i, row], tile.stats_layout) for i in range(2))
            part = load_as(partial_ref.at[here, column, row], tile.layout)
            slot = mine + start
            valid = valid_stats = jnp.logical_and(slot >= index, slot < end)
            if beside > 1:
                valid = _spread(valid, tile.shape, [0], tile.layout)
                valid_stats = _spread(valid_stats, tile.stats_shape, [0], tile.stats_layout)
            peak, total = jnp.where(valid_stats, peak, 2 * LOWEST), jnp.where(valid_stats, total, 0.0)
            return jnp.where(valid, part, 0.0), peak, total

        def step(n, carry):
            acc, peak, total = carry
            found = [load(n * at_once + u) for u in range(at_once)]
            new_peak = peak
            for _, part_peak, _ in found:
                new_peak = jnp.maximum(new_peak, part_peak)
            shrink = jnp.exp2(peak - new_peak)
            acc, total = acc * tile.over_columns(shrink), total * shrink
            for part, part_peak, part_total in found:
                weight = jnp.exp2(part_peak - new_peak)
                acc, total = acc + part * tile.over_columns(weight), total + part_total * weight
            return acc, new_peak, total

        peak, total = (_filled(value, tile.stats_shape, tile.stats_layout) for value in (LOWEST, 0))
        together = parts * at_once
        steps = lax.div(count + together - 1, together)
        return lax.fori_loop(0, steps, step, (_filled(0, tile.shape, tile.layout), peak, total))

    def merge(acc_s, stats_s):
        """The same of all threads, from shared memory."""
        stats = [[load_as(stats_s.at[i, j], merged_stats) for j in range(2)] for i in range(parts)]
        acc, peak, total = _filled(0, (columns, rows), merged), stats[0][0], _filled(0, (rows,), merged_stats)
        for part_peak, _ in stats:
            peak = jnp.maximum(peak, part_peak)
        for i, (part_peak, part_total) in enumerate(stats):
            weight = jnp.exp2(part_peak - peak)
            part = load_as(acc_s.at[i, :, pl.ds(0, rows)], merged)
            acc, total = acc + part * _spread(weight, (columns, rows), [1], merged), total + part_total * weight
        return acc, peak, total

    def kernel(partial_ref, stats_ref, slots_ref, out_ref, lse_ref, *scratch):
        chunk, b, block, wg = (lax.axis_index(name) for name in ("chunk", "batch", "block", "wg"))
        k, row = lax.div(block, row_tiles), pl.ds(lax.rem(block, row_tiles) * rows, rows)
        column, out_row = pl.ds(chunk * columns, columns), pl.ds(block * rows, rows)
        found = gather(partial_ref.at[k], stats_ref.at[k], slots_ref[b, 0], slots_ref[b, 1], wg, column, row)

        def store_lse(lse):
            @pl.when(chunk == 0)
            def _():
                lse_ref[b, out_row] = lse

        if beside == 1:
            divisor, lse = _divisor_and_lse(*found[1:])
            out_ref[b, out_row, column] = tile.transpose(found[0] * tile.over_columns(1 / divisor)).astype(dtype)
            store_lse(lse)
            return
        acc_s, stats_s = scratch
        mine = pl.ds(wg * beside, beside)
        acc_s[mine, :, pl.ds(0, rows)], stats_s[mine, 0], stats_s[mine, 1] = found
        _meet()  # pyright: ignore[reportCallIssue]

        @pl.when(wg == 0)
        def _():
            acc, peak, total = merge(acc_s, stats_s)
            divisor, lse = _divisor_and_lse(peak, total)
            out = acc * _spread(1 / divisor, (columns, rows), [1], merged)
            out_ref.at[b, out_row, column].transpose((1, 0))[...] = out.astype(dtype)
            store_lse(lse)

    scratch = [plgpu.SMEM((parts, columns, rows + _PAD), jnp.float32), plgpu.SMEM((parts, 2, rows), jnp.float32)]
    return plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((batch, row_blocks * row_block, c_width), dtype),
            jax.ShapeDtypeStruct((batch, row_blocks * row_block), jnp.float32),
        ],
        grid=(c_width // columns, batch, row_blocks * row_tiles),
        grid_names=("chunk", "batch", "block"),
        num_threads=warpgroups,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        scratch_types=scratch if beside > 1 else [],
    )(partial_KPCR, stats_KP2R, slots_B2)
