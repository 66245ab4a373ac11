"""int8 tiles of the cache in shared memory: scores and values by wgmma, see docs/kernels.md, "int8".

A tile [tokens, width], as `smem_tiles.swizzled_smem` makes it, has the 64-byte swizzle.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from latent_attention.hopper.mlir import add, constant, divmod_unsigned, i8, i32, mul, thread_index
from latent_attention.hopper.smem_tiles import CHUNK, broadcast_per_row

MIN_SCALE = 2.0**-60
"""Replaces int8 scales of 0, whose logarithm is infinite; sums of its inverse over any cache stay finite."""
SWIZZLE = 64
"""Swizzle of int8 tiles in shared memory: rows of 64 bytes, whose 16-byte units are permuted."""


def scaled_products(digits, radix: int, scale):
    """Products of a tile and queries, times the scale [tokens] of each token, `smem_tiles.PER_ROW`: [tokens, rows].

    `digits` int32 [tokens, 2 rows] are the products with the high digits of the queries, then with the low ones:
    radix * high + low is exact in int32.
    """
    rows = digits.shape[1] // 2
    exact = (digits[:, :rows] * radix + digits[:, rows:]).astype(jnp.float32)
    return exact * broadcast_per_row(scale, exact.shape)


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
    transforms = plgpu.TilingTransform((8, SWIZZLE)), plgpu.SwizzleTransform(SWIZZLE)

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
        offset = arith.addi(arith.muli(chunk, constant(8 * SWIZZLE)), arith.muli(column, constant(2 * SWIZZLE)))
        offset = arith.addi(offset, arith.muli(unit, constant(16)))
        offset = arith.addi(offset, arith.remui(inside, constant(16)))
        tokens_of_thread = [
            mgpu.utils.getelementptr(base, [arith.addi(offset, arith.muli(which, constant(SWIZZLE)))], i8())
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


def store_restored(ref, x) -> None:
    """Writes a 16-bit accumulator x [256, N], its rows in the order of `load_transposed`, to ref [N, 256] in order.

    The rows that a thread has of a column are 8 contiguous elements of it, 16 bytes.
    """
    width, columns = x.shape
    assert width == 256 and ref.shape == (columns, width)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
    def store(_, ref, x):
        (warp, lane), target = divmod_unsigned(thread_index(), 32), mgpu.utils.memref_ptr(ref)
        row, pair = divmod_unsigned(lane, 4)
        own = add(mul(pair, 2 * 2 * width), mul(warp, 2 * CHUNK), mul(row, 16))  # bytes: column 2 pair, element 64 warp
        for tile in range(columns // 8):
            registers = [x.registers[block, tile, 0, 0, half, 0, 0, 0, 0] for block in range(4) for half in range(2)]
            words = [mgpu.utils.bitcast(register, i32()) for register in registers]
            for column in range(2):  # the lower halves of the words, then the upper ones
                selector = (0x5410, 0x7632)[column]
                halves: list[Any] = [
                    llvm.inline_asm(i32(), [one, other], f"prmt.b32 $0, $1, $2, {selector};", "=r,r,r")
                    for one, other in zip(words[::2], words[1::2], strict=True)
                ]
                four = vector.from_elements(ir.VectorType.get((4,), i32()), halves)
                offset = add(own, constant(2 * width * (8 * tile + column)))
                llvm.store(four, mgpu.utils.getelementptr(target, [offset], i8()), alignment=16)

    store(ref, x)  # pyright: ignore[reportCallIssue]
