"""gemv on Hopper's tensor cores (mma.sync): rows of a matrix, in registers, times a vector, in registers.

`load_rows` loads rows from shared memory, `gemv` writes partial sums to shared memory and `reduce_row_sums` adds these
up. A vector [width] is distributed over the 128 threads of a warpgroup, or, if it is narrow, replicated in each of its
warps.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf, vector

from latent_attention.hopper.mlir import constant, i32, thread_index
from latent_attention.hopper.registers import (
    ONE_PER_THREAD,
    map_elements,
    rows_layout,
    vector_layout,
    vector_length,
)
from latent_attention.hopper.smem_tiles import load_as, tiled_layout


def is_narrow(width: int) -> bool:
    """Whether each warp has whole rows of this width, a multiple of 256, instead of a quarter of every row."""
    return width % 256 == 0 and width <= 1024


_NARROW = tiled_layout((4, 256), (1, 256), (1, 8), warps=(-6,), lanes=(-3,))


def operand_layout(width: int) -> Any:
    """The layout of the vector that `gemv` multiplies rows of this width with."""
    return _NARROW.reduce((0,)) if is_narrow(width) else vector_layout(width)


_MMA_CHAIN = 5
"""Dependent mma instructions in a row; longer sums are split into independent chains that are added at the end."""


def matrix_layout(width: int) -> Any:
    """The layout of the rows [rows, width] that `gemv` multiplies."""
    return _NARROW if is_narrow(width) else rows_layout(vector_length(width))


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
    """Loads a vector [width] as the operand of `gemv`."""
    (width,) = ref.shape
    return load_as(ref, operand_layout(width))


def load_rows(ref, rows: int, width: int) -> Any:
    """Loads 16-bit rows [rows, width] from flat shared memory, for `gemv`."""
    layout = matrix_layout(width)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct((rows, width), ref.dtype, layout=layout),
    )
    def load(_, ref):
        whole = mgpu.utils.memref_reshape(ref, (rows, width))
        return mgpu.FragmentedArray.load_untiled(whole, layout=layout.to_mgpu(), optimized=False)

    return load(ref)  # pyright: ignore[reportCallIssue]


def gemv(x, w, sums_ref, per_row: int) -> None:
    """Writes partial sums of w x to shared memory, for `reduce_row_sums`.

    Each mma multiplies a 16 x 16 matrix A by a 16 x 8 matrix B. A thread holds four elements of each of two rows of A
    and four of B. B gets the thread's elements of x, A its elements of two rows of w at the same positions; then the
    diagonal of each half of the result holds sums of the products wanted, and the rest of it is not used.

    Args:
        x: [width], in `operand_layout`.
        w: [rows, width], from `load_rows`; rows a multiple of 4 if they are narrow.
        sums_ref: float32 [rows * per_row].
        per_row: from `sums_per_row`.
    """
    rows, width = w.shape
    narrow, reduced = is_narrow(width), per_row == _REDUCED
    vec = 8 if narrow else vector_length(width)

    @plgpu.inline_mgpu(arg_types=(operand_layout(width), matrix_layout(width), plgpu.RefType()))
    def multiply(_, x, w, sums):
        def words(registers) -> list:
            """Registers as words of two elements, padded to an even number of them."""
            packed = [mgpu.utils.bitcast(r, ir.VectorType.get((vec // 2,), i32())) for r in registers.reshape(-1)]
            unpacked = [vector.extract(r, [], [i]) for r in packed for i in range(vec // 2)]
            return unpacked + [constant(0)] * (len(unpacked) % 2)

        thread = thread_index()
        lane, warp = arith.remui(thread, constant(32)), arith.divui(thread, constant(32))
        # Lane (row, pair) has elements 2 pair and 2 pair + 1 of a row of an 8 x 8 half of the result.
        row, pair = arith.divui(lane, constant(4)), arith.remui(lane, constant(4))
        equal = arith.CmpIPredicate.eq
        has_diagonal = arith.cmpi(equal, pair, arith.divui(row, constant(2)))
        is_second = arith.cmpi(equal, arith.remui(row, constant(2)), constant(1))
        f32 = ir.F32Type.get()
        zero = arith.constant(f32, 0.0)

        def on_diagonal(elements) -> Any:
            return arith.select(is_second, elements[1], elements[0])

        xs, totals = words(x.registers), []
        own = w.registers.reshape(rows // 4 if narrow else rows, -1)
        steps, dtype = len(xs) // 2, "bf16" if isinstance(x.mlir_dtype, ir.BF16Type) else "f16"
        chains = -(-steps // _MMA_CHAIN)
        for i in range(0, len(own), 2):
            one = words(own[i])
            other = words(own[i + 1]) if i + 1 < len(own) else [constant(0)] * len(one)
            results = [[zero] * 4 for _ in range(chains)]
            for k in range(steps):
                at = slice(2 * k, 2 * k + 2)
                a = [word for both in zip(one[at], other[at], strict=True) for word in both]
                results[k % chains] = _mma(dtype, a, xs[at], results[k % chains])
            for half in (slice(0, 2), slice(2, 4))[: len(own) - i]:
                total = functools.reduce(arith.addf, (on_diagonal(elements[half]) for elements in results))
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


def _mma(dtype: str, a: list, b: list, c: list) -> list:
    """c + a b of m16n8k16, on each thread's fragments; Mosaic offers mma on whole tiles in its own layouts only."""
    code = f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32 "
    code += "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    f32 = ir.F32Type.get()
    out: Any = llvm.inline_asm(
        llvm.StructType.get_literal([f32] * 4), [*a, *b, *c], code, ",".join(["=f"] * 4 + ["r"] * 6 + ["f"] * 4)
    )
    return [llvm.extractvalue(f32, out, [i]) for i in range(4)]


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
