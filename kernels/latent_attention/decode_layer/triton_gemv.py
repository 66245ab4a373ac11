"""Triton device functions of the batch-1 decoder layer: GEMV over the whole grid, and the grid barrier.

A *_norm_ptr is the weight (gamma) of an RMSNorm.

A matrix in 8 bits is never widened: x is rounded to 16-bit integers, whose two bytes are int8 digits, and products of
these with it are exact in int32, four at a time (dp4a). Both are held as words of four elements.
"""

# pyright: reportGeneralTypeIssues=false
# It takes the functions of triton.language, which run inside kernels only, for ones that never return.

import triton
import triton.language as tl

_RADIX = tl.constexpr(256)
_LARGEST = tl.constexpr(127 * 256 + 127)


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
def round_to_integer(x):
    """The nearest integer, halves to even, if |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _norm_factor(x_ptr, eps, K: tl.constexpr):
    """The factor of RMSNorm for x [K]: 1 / sqrt(mean(x²) + eps)."""
    k = tl.arange(0, triton.next_power_of_2(K))
    x = tl.load(x_ptr + k, k < K, other=0).to(tl.float32)
    return tl.rsqrt(tl.sum(x * x, 0) / K + eps)


@triton.jit
def _load_elements(x_ptr, norm_ptr, factor, k, K: tl.constexpr, NORM: tl.constexpr):
    """Elements k of x [K]; NORM: of its RMSNorm, rounded to its type."""
    x = tl.load(x_ptr + k, k < K, other=0)
    if NORM:
        gamma = tl.load(norm_ptr + k, k < K, other=0).to(tl.float32)
        x = (x.to(tl.float32) * factor * gamma).to(x.dtype)
    return x


@triton.jit
def _load_vector(x_ptr, norm_ptr, eps, K: tl.constexpr, CHUNK: tl.constexpr, NORM: tl.constexpr):
    """x [K] in chunks; NORM: see `_load_elements`."""
    factor = _norm_factor(x_ptr, eps, K) if NORM else 1.0
    chunks = ()
    for first in tl.static_range(0, K, CHUNK):
        chunks += (_load_elements(x_ptr, norm_ptr, factor, first + tl.arange(0, CHUNK), K, NORM),)
    return chunks


@triton.jit
def _packed(digits, COUNT: tl.constexpr):
    """Words of the low bytes of four digits each, of COUNT."""
    low_bytes = tl.reshape(digits & 0xFF, (COUNT // 4, 4))
    return tl.sum(low_bytes << (8 * tl.arange(0, 4))[None, :], 1)


@triton.jit
def _load_digits(x_ptr, norm_ptr, eps, K: tl.constexpr, CHUNK: tl.constexpr, NORM: tl.constexpr):
    """The high and the low digits of `_load_vector`, in words, and the scale: x = scale * (RADIX * high + low)."""
    factor = _norm_factor(x_ptr, eps, K) if NORM else 1.0
    k = tl.arange(0, triton.next_power_of_2(K))
    x = _load_elements(x_ptr, norm_ptr, factor, k, K, NORM).to(tl.float32)
    largest = tl.max(tl.abs(x), 0)
    inverse_scale = tl.where(largest > 0, _LARGEST / largest, 0.0)
    highs, lows = (), ()
    for first in tl.static_range(0, K, CHUNK):
        part = _load_elements(x_ptr, norm_ptr, factor, first + tl.arange(0, CHUNK), K, NORM)
        units = round_to_integer(part.to(tl.float32) * inverse_scale).to(tl.int32)
        highs += (_packed((units + _RADIX // 2) >> 8, CHUNK),)
        lows += (_packed(units, CHUNK),)
    return highs, lows, largest / _LARGEST + 0 * tl.sum(x, 0)  # NaN of x, which no digit is


@triton.jit
def dot4(a, b, sums):
    """sums + a b, for words of four int8."""
    return tl.inline_asm_elementwise(
        "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, sums], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def gemv(
    w_ptr, w2_ptr, scale_ptr, scale2_ptr, x_ptr, norm_ptr, residual_ptr, out_ptr, counter_ptr, eps, program, programs,
    OUT: tl.constexpr, K: tl.constexpr, SYNC: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr,
    RESIDUAL: tl.constexpr, INT8: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """This program's rows, of `programs`, of y = W x, W [OUT, K].

    SYNC: a grid barrier before x and the residual are read, which other programs wrote; W is prefetched before it.
    NORM: RMSNorm of x first. GATED: y = silu(W x) * (W2 x), with the rows of W and W2 interleaved. RESIDUAL: plus the
    residual [OUT]. INT8: W in words of four elements, K a multiple of 4.
    """
    chunks: tl.constexpr = (K + CHUNK - 1) // CHUNK
    # Tiles of a group; two groups are in registers, one in use and one in flight.
    count: tl.constexpr = tl.constexpr(5 if chunks % 5 == 0 else 4 if chunks % 4 == 0 else 3 if chunks % 3 == 0 else 1)
    each: tl.constexpr = ROWS // 2 if GATED else ROWS
    packed: tl.constexpr = tl.constexpr(4 if INT8 else 1)
    width: tl.constexpr = tl.constexpr(K // packed)
    columns: tl.constexpr = tl.constexpr(CHUNK // packed)
    if INT8:
        w_ptr = w_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
        w2_ptr = w2_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    start, end = partition(OUT, program, programs)
    lane = tl.arange(0, ROWS)
    row = start + (lane // 2 if GATED else lane)
    rows_ptr = (tl.where(lane % 2 == 0, w_ptr, w2_ptr) if GATED else w_ptr) + row.to(tl.int64) * width
    scale_ptr = (tl.where(lane % 2 == 0, scale_ptr, scale2_ptr) if GATED else scale_ptr) + row
    tiles = _load_tiles(rows_ptr, row < end, 0, width, columns, count)
    if SYNC:
        grid_barrier(counter_ptr)
    # x stays in registers, for all rows.
    if INT8:
        highs, lows, x_scale = _load_digits(x_ptr, norm_ptr, eps, K, CHUNK, NORM)
    else:
        xs = _load_vector(x_ptr, norm_ptr, eps, K, CHUNK, NORM)
    for r in range(start, end, each):
        out = r + tl.arange(0, each)
        if INT8:
            of_highs, of_lows = tl.zeros([ROWS, columns], tl.int32), tl.zeros([ROWS, columns], tl.int32)
        else:
            sums = tl.zeros([ROWS, columns], tl.float32)
        if RESIDUAL:
            residual = tl.load(residual_ptr + out, out < end, other=0).to(tl.float32)
        for first in tl.static_range(0, chunks, count):
            if first + count < chunks:
                following = _load_tiles(rows_ptr, row < end, (first + count) * columns, width, columns, count)
            else:
                rows_ptr += each * width
                following = _load_tiles(rows_ptr, row + each < end, 0, width, columns, count)
            tl.debug_barrier()  # or the compiler would sink these loads to their use
            for j in tl.static_range(count):
                if INT8:
                    of_highs = dot4(tiles[j], highs[first + j][None, :], of_highs)
                    of_lows = dot4(tiles[j], lows[first + j][None, :], of_lows)
                else:
                    sums += tiles[j].to(tl.float32) * xs[first + j].to(tl.float32)[None, :]
            tiles = following
        if INT8:
            y = _RADIX * tl.sum(of_highs, 1).to(tl.float32) + tl.sum(of_lows, 1).to(tl.float32)
            y *= x_scale * tl.load(scale_ptr, row < end, other=0)
        else:
            y = tl.sum(sums, 1)
        row += each
        scale_ptr += each
        if GATED:
            gate, up = tl.split(tl.reshape(y, (each, 2)))
            y = gate / (1 + tl.exp(-gate)) * up
        if RESIDUAL:
            y += residual
        tl.store(out_ptr + out, y, out < end)
