"""Triton device functions of the batch-1 decoder layer: GEMV over the whole grid, and the grid barrier.

A *_norm_ptr is the weight (gamma) of an RMSNorm.
"""

# pyright: reportGeneralTypeIssues=false
# It takes the functions of triton.language, which run inside kernels only, for ones that never return.

import triton
import triton.language as tl


@triton.jit
def grid_barrier(counter_ptr):
    """Waits for all programs of the launch; what they wrote before is then visible. The counter only ever grows."""
    programs = tl.num_programs(0)
    tl.debug_barrier()
    target = (tl.atomic_add(counter_ptr, 1, sem="acq_rel") // programs + 1) * programs
    while tl.atomic_add(counter_ptr, 0, sem="acquire") < target:
        pass


@triton.jit
def partition(count, program, programs):
    """First and end of a program's rows, of `count`."""
    each = tl.cdiv(count, programs)
    start = program * each
    return start, tl.minimum(start + each, count)


@triton.jit
def _load_tiles(w_ptr, row_valid, first, K: tl.constexpr, CHUNK: tl.constexpr, COUNT: tl.constexpr):
    """COUNT tiles of rows, of CHUNK columns each, from column `first`; 0 for rows that are not valid."""
    tiles = ()
    for j in tl.static_range(COUNT):
        k = first + j * CHUNK + tl.arange(0, CHUNK)
        valid = row_valid[:, None] & (k < K)[None, :]
        tiles += (tl.load(w_ptr[:, None] + k[None, :], valid, other=0, eviction_policy="evict_first"),)
    return tiles


@triton.jit
def _load_vector(x_ptr, norm_ptr, eps, K: tl.constexpr, CHUNK: tl.constexpr, NORM: tl.constexpr):
    """x [K] in chunks; NORM: RMSNorm of it, rounded to its type."""
    if NORM:
        k = tl.arange(0, triton.next_power_of_2(K))
        x = tl.load(x_ptr + k, k < K, other=0).to(tl.float32)
        factor = tl.rsqrt(tl.sum(x * x, 0) / K + eps)
    chunks = ()
    for first in tl.static_range(0, K, CHUNK):
        k = first + tl.arange(0, CHUNK)
        x = tl.load(x_ptr + k, k < K, other=0)
        if NORM:
            gamma = tl.load(norm_ptr + k, k < K, other=0).to(tl.float32)
            x = (x.to(tl.float32) * factor * gamma).to(x.dtype)
        chunks += (x,)
    return chunks


@triton.jit
def gemv(
    w_ptr, w2_ptr, scale_ptr, scale2_ptr, x_ptr, norm_ptr, residual_ptr, out_ptr, counter_ptr, eps, program, programs,
    OUT: tl.constexpr, K: tl.constexpr, SYNC: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr,
    RESIDUAL: tl.constexpr, INT8: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """This program's rows, of `programs`, of y = W x, W [OUT, K].

    SYNC: a grid barrier before x and the residual are read, which other programs wrote; W is prefetched before it.
    NORM: RMSNorm of x first. GATED: y = silu(W x) * (W2 x), with the rows of W and W2 interleaved. RESIDUAL: plus the
    residual [OUT].
    """
    chunks: tl.constexpr = (K + CHUNK - 1) // CHUNK
    # Tiles of a group; two groups are in registers, one in use and one in flight.
    count: tl.constexpr = tl.constexpr(5 if chunks % 5 == 0 else 4 if chunks % 4 == 0 else 3 if chunks % 3 == 0 else 1)
    each: tl.constexpr = ROWS // 2 if GATED else ROWS
    start, end = partition(OUT, program, programs)
    lane = tl.arange(0, ROWS)
    row = start + (lane // 2 if GATED else lane)
    rows_ptr = (tl.where(lane % 2 == 0, w_ptr, w2_ptr) if GATED else w_ptr) + row.to(tl.int64) * K
    scale_ptr = (tl.where(lane % 2 == 0, scale_ptr, scale2_ptr) if GATED else scale_ptr) + row
    tiles = _load_tiles(rows_ptr, row < end, 0, K, CHUNK, count)
    if SYNC:
        grid_barrier(counter_ptr)
    xs = _load_vector(x_ptr, norm_ptr, eps, K, CHUNK, NORM)  # stays in registers, for all rows
    for r in range(start, end, each):
        out = r + tl.arange(0, each)
        sums = tl.zeros([ROWS, CHUNK], tl.float32)
        if RESIDUAL:
            residual = tl.load(residual_ptr + out, out < end, other=0).to(tl.float32)
        for first in tl.static_range(0, chunks, count):
            if first + count < chunks:
                following = _load_tiles(rows_ptr, row < end, (first + count) * CHUNK, K, CHUNK, count)
            else:
                rows_ptr += each * K
                following = _load_tiles(rows_ptr, row + each < end, 0, K, CHUNK, count)
            tl.debug_barrier()  # or the compiler would sink these loads to their use
            for j in tl.static_range(count):
                sums += tiles[j].to(tl.float32) * xs[first + j].to(tl.float32)[None, :]
            tiles = following
        y = tl.sum(sums, 1)
        if INT8:
            y *= tl.load(scale_ptr, row < end, other=0)
        row += each
        scale_ptr += each
        if GATED:
            gate, up = tl.split(tl.reshape(y, (each, 2)))
            y = gate / (1 + tl.exp(-gate)) * up
        if RESIDUAL:
            y += residual
        tl.store(out_ptr + out, y, out < end)
