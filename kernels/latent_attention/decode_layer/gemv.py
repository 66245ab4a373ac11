"""gemv on Hopper's tensor cores (mma.sync): rows of a matrix, in registers, times a vector, in registers.

`load_rows` loads rows from shared memory, `gemv` writes partial sums to shared memory and `reduce_row_sums` adds these
up. Rows in 8 bits are never widened: the operand is split into two `Digits`, whose products with them are exact.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf, vector

from latent_attention.decode_layer.digits import RADIX, Digits
from latent_attention.decode_layer.layouts import (
    is_narrow,
    matrix_layout,
    operand_layout,
    words_layout,
)
from latent_attention.hopper.mlir import constant, i32, thread_index
from latent_attention.hopper.registers import ONE_PER_THREAD, map_elements
from latent_attention.hopper.smem_tiles import load_as

_MMA_CHAIN = 5
"""Dependent mma instructions in a row; longer sums are split into independent chains that are added at the end."""


_REDUCED, _ONE_WARP, _ALL_WARPS = 4, 8 + 4, 4 * 8 + 4
"""Partial sums of a row: one from each of the four warps (reduced by shuffles), eight from the one warp that has the
row (the diagonal of the mma result), or eight from each of the four. Eights are padded by four against bank
conflicts."""
_MAX_UNREDUCED_ROWS = 32
"""Rows of a CTA at most for which there is room for `_ALL_WARPS`."""


def sums_per_row(width: int, tile_rows: int, cta_rows: int) -> int:
    """Room for partial sums of a row, in float32 elements: fewer where a tile has several rows, or the CTA many."""
    if is_narrow(width):
        return _ONE_WARP
    return _ALL_WARPS if tile_rows <= 2 and cta_rows <= _MAX_UNREDUCED_ROWS else _REDUCED


def load_vector(ref) -> Any:
    """Loads a vector [width] as the operand of `gemv`, for rows in 8 bits still to be `split`."""
    (width,) = ref.shape
    return load_as(ref, operand_layout(width))


def load_rows(ref, rows: int, width: int) -> Any:
    """Loads rows from contiguous memory, for `gemv`: of 16 bits [rows, width], of 8 bits as words [rows, width / 4]."""
    int8 = ref.dtype == jnp.int8
    layout = words_layout(width) if int8 else matrix_layout(width)
    columns, dtype = (width // 4, jnp.int32) if int8 else (width, ref.dtype)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct((rows, columns), dtype, layout=layout),
    )
    def load(_, ref):
        if int8:
            words = ir.MemRefType.get((rows, columns), i32(), memory_space=ir.MemRefType(ref.type).memory_space)
            whole = mgpu.utils.ptr_as_memref(mgpu.utils.memref_ptr(ref), words)
        else:
            whole = mgpu.utils.memref_reshape(ref, (rows, columns))
        signed = True if int8 else None
        return mgpu.FragmentedArray.load_untiled(whole, layout=layout.to_mgpu(), is_signed=signed, optimized=False)

    return load(ref)  # pyright: ignore[reportCallIssue]


def gemv(x, w, sums_ref, per_row: int) -> None:
    """Writes partial sums of w x to shared memory, for `reduce_row_sums`.

    Each mma multiplies a 16 x 16 matrix A by a 16 x 8 matrix B, or, in 8 bits, 16 x 32 by 32 x 8. A thread holds two
    words of each of two rows of A and two of B. B gets the thread's elements of x, A its elements of two rows of w at
    the same positions; then the diagonal of each half of the result holds sums of the products wanted, and the rest of
    it is not used.

    Args:
        x: [width], in `operand_layout`; for rows in 8 bits, its `Digits`.
        w: rows from `load_rows`; a multiple of 4 if they are narrow.
        sums_ref: float32 [rows * per_row].
        per_row: from `sums_per_row`.
    """
    int8 = isinstance(x, Digits)
    rows, width = w.shape[0], w.shape[1] * (4 if int8 else 1)
    narrow, reduced = is_narrow(width), per_row == _REDUCED
    w_layout = words_layout(width) if int8 else matrix_layout(width)
    words = w_layout.reduce((0,))
    x_layout = Digits(words, words, ONE_PER_THREAD) if int8 else operand_layout(width)

    @plgpu.inline_mgpu(arg_types=(x_layout, w_layout, plgpu.RefType()))
    def multiply(_, x, w, sums):
        thread = thread_index()
        lane, warp = arith.remui(thread, constant(32)), arith.divui(thread, constant(32))
        # Lane (row, pair) has elements 2 pair and 2 pair + 1 of a row of an 8 x 8 half of the result.
        row, pair = arith.divui(lane, constant(4)), arith.remui(lane, constant(4))
        equal = arith.CmpIPredicate.eq
        has_diagonal = arith.cmpi(equal, pair, arith.divui(row, constant(2)))
        is_second = arith.cmpi(equal, arith.remui(row, constant(2)), constant(1))
        f32 = ir.F32Type.get()
        zero = arith.constant(f32, 0.0)

        def dot_products(operand: list, one: list, other: list, dtype: str) -> list:
            """The diagonals of both halves: products of two rows with the operand, in words."""
            start, add = (constant(0), arith.addi) if dtype == "s8" else (zero, arith.addf)
            steps = len(operand) // 2
            results = [[start] * 4 for _ in range(-(-steps // _MMA_CHAIN))]
            for k in range(steps):
                at = slice(2 * k, 2 * k + 2)
                a = [word for both in zip(one[at], other[at], strict=True) for word in both]
                chain = k % len(results)
                results[chain] = _mma(dtype, a, operand[at], results[chain])
            return [
                functools.reduce(add, (arith.select(is_second, c[half + 1], c[half]) for c in results))
                for half in (0, 2)
            ]

        if int8:
            scale = vector.extract(x.scale.registers.flat[0], [], [0])
            high, low = _words(x.high.registers), _words(x.low.registers)

            def two_rows(one: list, other: list) -> list:
                both = (dot_products(digits, one, other, "s8") for digits in (high, low))
                as_float = ([arith.sitofp(f32, total) for total in totals] for totals in both)
                radix = arith.constant(f32, float(RADIX))
                return [
                    arith.mulf(scale, arith.addf(arith.mulf(radix, of_high), of_low))
                    for of_high, of_low in zip(*as_float, strict=True)
                ]
        else:
            xs, dtype = _words(x.registers), "bf16" if isinstance(x.mlir_dtype, ir.BF16Type) else "f16"

            def two_rows(one: list, other: list) -> list:
                return dot_products(xs, one, other, dtype)

        totals = []
        own = w.registers.reshape(rows // 4 if narrow else rows, -1)
        for i in range(0, len(own), 2):
            one = _words(own[i])
            other = _words(own[i + 1]) if i + 1 < len(own) else [constant(0)] * len(one)
            for total in two_rows(one, other)[: len(own) - i]:
                if reduced:
                    total = arith.select(has_diagonal, total, zero)
                    for distance in (4, 9, 18):  # in these bits the lanes of the diagonal differ
                        total = arith.addf(total, mgpu.utils.shfl_bfly(total, distance))
                totals.append(total)
        at = warp if reduced else row if narrow else arith.addi(arith.muli(warp, constant(8)), row)
        if narrow:
            at = arith.addi(arith.muli(warp, constant(per_row)), at)
        writes = scf.IfOp(arith.cmpi(equal, lane, constant(0)) if reduced else has_diagonal)
        with ir.InsertionPoint(writes.then_block):
            for i, total in enumerate(totals):
                index = arith.addi(at, constant(i * per_row * (4 if narrow else 1)))
                llvm.store(total, mgpu.utils.getelementptr(mgpu.utils.memref_ptr(sums), [index], f32))
            scf.yield_([])

    multiply(x, w, sums_ref)  # pyright: ignore[reportCallIssue]


def _words(registers) -> list:
    """Registers as 32-bit words, padded to an even number of them."""
    words = []
    for register in registers.reshape(-1):
        count = mgpu.utils.bitwidth(register.type) // 32
        packed = mgpu.utils.bitcast(register, ir.VectorType.get((count,), i32()))
        words += [vector.extract(packed, [], [i]) for i in range(count)]
    return words + [constant(0)] * (len(words) % 2)


def _mma(dtype: str, a: list, b: list, c: list) -> list:
    """c + a b of m16n8k16, or m16n8k32 of int8, on each thread's fragments.

    Mosaic offers mma on whole tiles in its own layouts only.
    """
    shape, of_sums, kind = ("m16n8k32", "s32", i32()) if dtype == "s8" else ("m16n8k16", "f32", ir.F32Type.get())
    code = f"mma.sync.aligned.{shape}.row.col.{of_sums}.{dtype}.{dtype}.{of_sums} "
    code += "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    letter = "r" if dtype == "s8" else "f"
    out: Any = llvm.inline_asm(
        llvm.StructType.get_literal([kind] * 4), [*a, *b, *c], code,
        ",".join([f"={letter}"] * 4 + ["r"] * 6 + [letter] * 4),
    )  # fmt: skip
    return [llvm.extractvalue(kind, out, [i]) for i in range(4)]


def reduce_row_sums(sums_ref, rows, per_row: int) -> Any:
    """The results [128] of rows [128] from their partial sums, both `ONE_PER_THREAD`."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), ONE_PER_THREAD),
        return_type=plgpu.ShapeDtypeStruct(rows.shape, jnp.float32, layout=ONE_PER_THREAD),
    )
    def reduce(_, sums, rows):
        f32 = ir.F32Type.get()
        four, one = (ir.VectorType.get((n,), f32) for n in (4, 1))

        def row_sum(row):
            pointer = mgpu.utils.getelementptr(
                mgpu.utils.memref_ptr(sums), [arith.muli(row, arith.constant(row.type, per_row))], f32
            )
            quads = [
                llvm.load(four, mgpu.utils.getelementptr(pointer, [4 * i], f32), alignment=16)
                for i in range(1 if per_row == _REDUCED else per_row // 4 - 1)
            ]
            total: Any = functools.reduce(arith.addf, quads)
            return vector.broadcast(one, vector.reduction(f32, vector.CombiningKind.ADD, total))

        return map_elements(rows, row_sum)

    return reduce(sums_ref, rows)  # pyright: ignore[reportCallIssue]
