"""Second kernel of the decode on Hopper: merges the splits of each sequence (FlashDecoding's reduction).

With the accumulator O_s, running max m_s and row sum l_s of each split s, as `mosaic_split_kv` leaves them in base 2:

    m = max over s of m_s     l = sum over s of 2^(m_s - m) l_s     out = (sum over s of 2^(m_s - m) O_s) / l
    log-sum-exp = (m + log2 l) ln 2

A CTA has a tile of columns and rows of the output of one sequence. If sequences have many splits, the warps of a CTA
take different splits and are merged through shared memory; if few, they take different columns.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import gpu

from latent_attention.decode.mosaic_combine_layout import CombineTile, broadcast
from latent_attention.hopper.smem_tiles import LOWEST, load_as

_MAX_ROWS = 32
"""Rows of a tile at most: a cache line of 128 bytes."""
_MAX_ELEMENTS = 64
"""Elements of partial outputs that a thread loads at a time."""
_MAX_PARALLEL_SPLITS = 8
"""Splits that a warpgroup loads side by side: two a warp."""
_MAX_WARPGROUPS = 4
_SPLITS_PER_THREAD = 4
"""Splits that a thread should have to load before more threads share them."""
_PAD = 4
"""Elements between columns in shared memory, against bank conflicts."""


class _Config(NamedTuple):
    """Tiling of a launch."""

    tile: CombineTile
    parallel_splits: int
    warpgroups: int
    unroll: int
    """Splits that a thread loads before it uses them."""

    @property
    def parts(self) -> int:
        """Splits that the CTA loads in parallel, and partial results that it merges through shared memory."""
        return self.parallel_splits * self.warpgroups


def _configure(batch: int, row_blocks: int, splits: int, c_width: int, row_block: int, num_sms: int) -> _Config:
    rows = max(n for n in range(8, min(row_block, _MAX_ROWS) + 1, 8) if row_block % n == 0)
    expected = -(-(splits - batch) // batch)  # splits of a sequence
    parallel_splits = 1
    while parallel_splits < _MAX_PARALLEL_SPLITS and 2 * parallel_splits * _SPLITS_PER_THREAD <= expected:
        parallel_splits *= 2
    warpgroups = min(max(expected // (parallel_splits * _SPLITS_PER_THREAD), 1), _MAX_WARPGROUPS)
    tile = CombineTile(rows, parallel_splits, 1)
    # Wide tiles load fewer statistics and store longer runs, but each SM should have a CTA or two.
    work = batch * row_blocks * (row_block // rows) * c_width
    while c_width % (2 * tile.columns) == 0 and tile.elements <= 16 and work // (2 * tile.columns) >= 3 * num_sms // 2:
        tile = CombineTile(rows, parallel_splits, 2 * tile.thread_columns)
    unroll = max(min(-(-expected // (parallel_splits * warpgroups)), _MAX_ELEMENTS // tile.elements), 1)
    return _Config(tile, parallel_splits, warpgroups, unroll)


class _Accumulator:
    """Phase 1: one warpgroup's online softmax over its splits of a sequence."""

    def __init__(self, config: _Config, partial_ref, stats_ref, first, count, wg, column, row):
        self.config, self.partial_ref, self.stats_ref = config, partial_ref, stats_ref
        self.first, self.count, self.end = first, count, first + count
        self.wg, self.column, self.row = wg, column, row
        self.lane = 0
        if config.parallel_splits > 1:
            layout = config.tile.splits_layout
            self.lane = plgpu.broadcasted_iota(jnp.int32, (config.parallel_splits,), 0, layout=layout)

    def run(self):
        """(acc, m_i, l_i) of the splits that are each thread's, acc not divided by l_i."""
        tile, unroll = self.config.tile, self.config.unroll
        m_i, l_i = (_filled(value, tile.stats_shape, tile.stats_layout) for value in (LOWEST, 0))

        def step(n, carry):
            acc, m_i, l_i = carry
            loaded = [self._load(n * unroll + u) for u in range(unroll)]
            new_m_i = m_i
            for _, m_s, _ in loaded:
                new_m_i = jnp.maximum(new_m_i, m_s)
            alpha = jnp.exp2(m_i - new_m_i)
            acc, l_i = acc * tile.over_columns(alpha), l_i * alpha
            for o_s, m_s, l_s in loaded:
                weight = jnp.exp2(m_s - new_m_i)
                acc, l_i = acc + o_s * tile.over_columns(weight), l_i + l_s * weight
            return acc, new_m_i, l_i

        splits_per_step = self.config.parts * unroll
        steps = lax.div(self.count + splits_per_step - 1, splits_per_step)
        return lax.fori_loop(0, steps, step, (_filled(0, tile.shape, tile.layout), m_i, l_i))

    def _load(self, n):
        """(O_s, m_s, l_s) of the n-th split of each thread; beyond the sequence's splits 0, a masked maximum and 0."""
        (tile, parallel_splits, warpgroups, _), first = self.config, self.first
        index = first + (n * warpgroups + self.wg) * parallel_splits
        # Clamped to splits of the sequence. What is loaded twice, or is not the sequence's and may be NaN, is masked.
        start = jnp.maximum(jnp.minimum(index, self.end - parallel_splits), 0)
        here = start if parallel_splits == 1 else pl.ds(start, parallel_splits)
        m_s, l_s = (load_as(self.stats_ref.at[here, i, self.row], tile.stats_layout) for i in range(2))
        o_s = load_as(self.partial_ref.at[here, self.column, self.row], tile.layout)
        split = self.lane + start
        valid = valid_stats = jnp.logical_and(split >= index, split < self.end)
        if parallel_splits > 1:
            valid = broadcast(valid, tile.shape, [0], tile.layout)
            valid_stats = broadcast(valid_stats, tile.stats_shape, [0], tile.stats_layout)
        m_s, l_s = jnp.where(valid_stats, m_s, 2 * LOWEST), jnp.where(valid_stats, l_s, 0.0)
        return jnp.where(valid, o_s, 0.0), m_s, l_s


def _merge_parts(config: _Config, acc_smem, stats_smem):
    """Phase 2: (acc, m_i, l_i) of all parts of the CTA, from shared memory."""
    rows, columns = config.tile.rows, config.tile.columns
    layout = config.tile.merged_layout()
    stats_layout = layout.reduce((0,))
    stats = [[load_as(stats_smem.at[i, j], stats_layout) for j in range(2)] for i in range(config.parts)]
    acc, m_i, l_i = _filled(0, (columns, rows), layout), stats[0][0], _filled(0, (rows,), stats_layout)
    for m_s, _ in stats:
        m_i = jnp.maximum(m_i, m_s)
    for i, (m_s, l_s) in enumerate(stats):
        weight = jnp.exp2(m_s - m_i)
        o_s = load_as(acc_smem.at[i, :, pl.ds(0, rows)], layout)
        acc, l_i = acc + o_s * broadcast(weight, (columns, rows), [1], layout), l_i + l_s * weight
    return acc, m_i, l_i


@plgpu.inline_mgpu()
def _cta_barrier(_):
    """Waits for all threads of the CTA; shared memory written by any of them before is visible (`__syncthreads`)."""
    gpu.barrier()


def _filled(value, shape, layout):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _normalizer_and_lse(m_i, l_i):
    """The row sum, or 1 if nothing was seen, and the natural log-sum-exp, or -inf if nothing was seen."""
    seen = l_i > 0
    normalizer = jnp.where(seen, l_i, jnp.ones_like(l_i))
    lse = (m_i + jnp.log2(normalizer)) * math.log(2)
    return normalizer, jnp.where(seen, lse, jnp.full_like(lse, -jnp.inf))


def combine(partial_KPCR, stats_KP2R, splits_B2, *, dtype, num_sms: int):
    """Merges the splits of each sequence; in names, K are blocks of R rows and P are split indices.

    Args:
        partial_KPCR: see `mosaic_split_kv.partials`.
        stats_KP2R: see there.
        splits_B2: `Schedule.splits_B2`.
        dtype: of the output.
        num_sms: SMs to keep busy.

    Returns:
        out [B, K * R, C] of `dtype` and lse [B, K * R] float32.
    """
    row_blocks, splits, c_width, row_block = partial_KPCR.shape
    batch = splits_B2.shape[0]
    config = _configure(batch, row_blocks, splits, c_width, row_block, num_sms)
    tile, parallel_splits = config.tile, config.parallel_splits
    rows, columns, row_tiles = tile.rows, tile.columns, row_block // tile.rows

    def kernel(partial_ref, stats_ref, splits_ref, out_ref, lse_ref, *scratch):
        chunk, b, row_tile, wg = (lax.axis_index(name) for name in ("chunk", "batch", "row_tile", "wg"))
        k, row = lax.div(row_tile, row_tiles), pl.ds(lax.rem(row_tile, row_tiles) * rows, rows)
        column, out_row = pl.ds(chunk * columns, columns), pl.ds(row_tile * rows, rows)
        first, count = splits_ref[b, 0], splits_ref[b, 1]
        own = _Accumulator(config, partial_ref.at[k], stats_ref.at[k], first, count, wg, column, row).run()

        def store_lse(lse):
            @pl.when(chunk == 0)
            def _():
                lse_ref[b, out_row] = lse

        if parallel_splits == 1:  # then there is one warpgroup
            normalizer, lse = _normalizer_and_lse(*own[1:])
            out_ref[b, out_row, column] = tile.transpose(own[0] * tile.over_columns(1 / normalizer)).astype(dtype)
            store_lse(lse)
            return
        acc_smem, stats_smem = scratch
        parts = pl.ds(wg * parallel_splits, parallel_splits)
        acc_smem[parts, :, pl.ds(0, rows)], stats_smem[parts, 0], stats_smem[parts, 1] = own
        _cta_barrier()  # pyright: ignore[reportCallIssue]

        @pl.when(wg == 0)
        def _():
            acc, m_i, l_i = _merge_parts(config, acc_smem, stats_smem)
            normalizer, lse = _normalizer_and_lse(m_i, l_i)
            out = acc * broadcast(1 / normalizer, (columns, rows), [1], tile.merged_layout())
            out_ref.at[b, out_row, column].transpose((1, 0))[...] = out.astype(dtype)
            store_lse(lse)

    scratch = [
        plgpu.SMEM((config.parts, columns, rows + _PAD), jnp.float32), plgpu.SMEM((config.parts, 2, rows), jnp.float32)
    ]  # fmt: skip
    return plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((batch, row_blocks * row_block, c_width), dtype),
            jax.ShapeDtypeStruct((batch, row_blocks * row_block), jnp.float32),
        ],
        grid=(c_width // columns, batch, row_blocks * row_tiles),
        grid_names=("chunk", "batch", "row_tile"),
        num_threads=config.warpgroups,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        scratch_types=scratch if parallel_splits > 1 else [],
    )(partial_KPCR, stats_KP2R, splits_B2)
