"""Tiles in shared memory and their register layouts for wgmma; in Mosaic GPU (`plgpu.inline_mgpu`) what Pallas cannot.

In the attention kernels a tile of the cache lies on the M axis of wgmma and the query rows on N.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from latent_attention.hopper.mlir import constant, i8, i32, thread_index

LOWEST = -1e30
"""A finite stand-in for minus infinity: the difference of two of them is 0, not NaN."""
MASKED = 2 * LOWEST
"""The score of a masked token: exp2 of its difference from any other score is 0."""
REDUCE_SCRATCH = 1024
"""float32 elements of shared memory that a warpgroup needs for a reduction across its warps."""
CHUNK = 64
"""Columns of the latent per wgmma in the product with the values, where they are on the M axis."""
PER_ROW = plgpu.Layout.WGMMA.reduce(1)
"""The layout of a vector [M] with one element per row of a wgmma accumulator [M, N]."""
PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)
"""The layout of a vector [N] with one element per column of a wgmma accumulator [M, N]."""
_NO_INDEX = ((),) if jax.__version_info__ < (0, 11) else ()
_SWIZZLE = 64
"""Swizzle of int8 tiles in shared memory: rows of 64 bytes, whose 16-byte units are permuted."""


def tiled_layout(*tiles, warps, lanes) -> Any:
    """The register layout with these nested tiles; the last dimension is the vector that a thread loads at a time."""
    it = mgpu.TiledLayout(plgpu.Tiling(tiles), warps, lanes, vector_dim=-1, _check_canonical=False).canonicalize()
    return plgpu.Layout.TILED(it.tiling, it.warp_dims, it.lane_dims, it.vector_dim)


def swizzled_smem(rows: int, width: int, dtype, *leading: int, columns: int = CHUNK):
    """Shared memory for [*leading, rows, width] in tiles of up to `columns`, swizzled as TMA and wgmma expect it."""
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = math.gcd(min(128, columns * bits // 8), width * bits // 8)
    transforms = plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle)
    return plgpu.SMEM((*leading, rows, width), dtype, transforms=transforms)


def load_as(ref, layout):
    """Loads into registers of this layout, also if Mosaic has no fast path for it."""
    return plgpu.load(ref, *_NO_INDEX, layout=layout, optimized=False)


def wgmma_zeros(shape):
    """Zeros in the layout of a wgmma accumulator."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def iota(shape, dimension, layout: Any = plgpu.Layout.WGMMA):
    """Indices along a dimension."""
    return plgpu.broadcasted_iota(jnp.int32, shape, dimension, layout=layout)


def broadcast_per_row(x, shape):
    """Broadcasts x [M], one element per row, to [M, N]."""
    return lax.broadcast_in_dim(x, shape, [0])


def broadcast_per_column(x, shape):
    """Broadcasts x [N], one element per column, to [M, N]."""
    return lax.broadcast_in_dim(x, shape, [1])


def reduce_columns(op: str, x, scratch_ref):
    """Reduces a wgmma accumulator [M, N] over M; Pallas's reduction would share one scratch among all warpgroups."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct(x.shape[1:], x.dtype, layout=PER_COLUMN),
    )
    def reduce(_, x, scratch):
        return x.reduce(op, 0, scratch)

    return reduce(x, scratch_ref)  # pyright: ignore[reportCallIssue]


def _groups(width: int) -> list[tuple[int, int]]:
    """Splits a width into powers of two times 64, largest first: (first column, number of 64s)."""
    groups, first = [], 0
    for n in (8, 4, 2, 1):
        if width - first >= 64 * n:
            groups.append((first, n))
            first += 64 * n
    return groups


def restore_order(x):
    """Permutes the last axis from the row order of `load_transposed` back to the order of the tile's columns."""
    parts = []
    for first, n in _groups(x.shape[-1]):
        # Row (block, warp, half, lane) is column (8 warp + lane) 2n + 2 block + half.
        part = x[..., first : first + 64 * n].reshape(*x.shape[:-1], n, 4, 2, 8)
        parts.append(jnp.moveaxis(part, (-3, -1), (-4, -3)).reshape(*x.shape[:-1], 64 * n))
    return jnp.concatenate(parts, axis=-1)


def load_transposed(tile_ref, width: int, first: int, tokens: int):
    """Tokens [first, first + tokens) of an int8 tile in shared memory as [width, tokens] float16, for wgmma.

    wgmma transposes 16-bit tiles only. Here each thread loads contiguous columns of its tokens, as many bytes as it has
    rows of the result, which permutes the rows: `restore_order` undoes it.
    """
    transforms = plgpu.TilingTransform((8, _SWIZZLE)), plgpu.SwizzleTransform(_SWIZZLE)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(transforms),),
        return_type=plgpu.ShapeDtypeStruct((width, tokens), jnp.float16, layout=plgpu.Layout.WGMMA),
    )
    def load(_, tile):
        return _load_transposed(tile, width, first, tokens)

    return load(tile_ref)  # pyright: ignore[reportCallIssue]


def _load_transposed(tile, width: int, first_token: int, tokens: int):
    two_float16 = ir.VectorType.get((2,), ir.F16Type.get())
    base = mgpu.utils.memref_ptr(tile)
    own_thread = thread_index()
    lane = arith.remui(own_thread, constant(32))
    warp, row, column = (
        arith.divui(own_thread, constant(32)),
        arith.divui(lane, constant(4)),
        arith.remui(lane, constant(4)),
    )
    # Threads of odd columns load the later of their two tokens first, so that a warp has no bank conflicts; the bytes
    # are put in order when they are interleaved.
    swapped = arith.remui(column, constant(2))
    is_swapped = arith.cmpi(arith.CmpIPredicate.ne, swapped, constant(0))
    selectors = [arith.select(is_swapped, constant(y), constant(x)) for x, y in ((0x5140, 0x1504), (0x7362, 0x3726))]
    layout = mgpu.WGMMA_LAYOUT
    registers = np.empty(layout.registers_shape((width, tokens)), dtype=object)
    for first, n in _groups(width):
        own = arith.muli(arith.addi(arith.muli(warp, constant(8)), row), constant(2 * n))
        # Byte of (token, column c): tile row token / 8, chunk c / 64, then row token % 8 of 64 bytes, in which the
        # 16-byte unit is XORed with (token % 8) / 2: that is `column`, as the tokens are 2 column and the next one.
        chunk = arith.addi(arith.divui(own, constant(64)), constant(first // 64))
        inside = arith.remui(own, constant(64))
        unit = arith.xori(arith.divui(inside, constant(16)), column)
        offset = arith.addi(arith.muli(chunk, constant(8 * _SWIZZLE)), arith.muli(column, constant(2 * _SWIZZLE)))
        offset = arith.addi(offset, arith.muli(unit, constant(16)))
        offset = arith.addi(offset, arith.remui(inside, constant(16)))
        tokens_of_thread = [
            mgpu.utils.getelementptr(base, [arith.addi(offset, arith.muli(which, constant(_SWIZZLE)))], i8())
            for which in (swapped, arith.subi(constant(1), swapped))
        ]
        for k in range(tokens // 8):
            one, other = (
                _load_words(mgpu.utils.getelementptr(x, [(first_token + k * 8) * width], i8()), 2 * n)
                for x in tokens_of_thread
            )
            values = [pair for x, y in zip(one, other, strict=True) for pair in _interleave(x, y, selectors)]
            for j, x in enumerate(values[: 2 * n]):
                registers[first // 64 + j // 2, k, 0, 0, j % 2, 0, 0, 0, 0] = mgpu.utils.bitcast(x, two_float16)
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _load_words(pointer, size: int) -> list:
    """`size` int8 elements of shared memory, plus 128 so as to be unsigned, as 32-bit words."""
    if size == 2:
        words = [arith.extui(i32(), llvm.load(ir.IntegerType.get_signless(16), pointer, alignment=2))]
    else:
        loaded = llvm.load(ir.VectorType.get((size // 4,), i32()), pointer, alignment=size)
        words = [vector.extract(loaded, [], [i]) for i in range(size // 4)]
    return [arith.xori(x, constant(0x80808080 - 2**32)) for x in words]


def _interleave(x: Any, y: Any, selectors: list[Any]) -> list[Any]:
    """The pairs (x_j, y_j) of two words of four 8-bit elements each, every pair as two float16 in a word.

    The byte selectors (of `prmt`) choose the first two pairs and the last two.
    """
    pairs = []
    for selector in selectors:
        both: Any = llvm.inline_asm(i32(), [x, y, selector], "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r")
        for embed in ("0x4140", "0x4342"):
            # A byte behind 0x64 is the float16 1024 + byte; 1152 = 1024 + 128.
            code = f"{{ .reg .b32 e, o; prmt.b32 e, $1, 0x64, {embed}; mov.b32 o, 0x64806480; sub.f16x2 $0, e, o; }}"
            pairs.append(llvm.inline_asm(i32(), [both], code, "=r,r"))
    return pairs
