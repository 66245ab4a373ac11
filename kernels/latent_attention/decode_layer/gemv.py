"""Rows of a matrix, in registers, times a vector, on the tensor cores of Hopper, for `mosaic_layer`.

A vector [width] lies in registers: over the 128 threads of a warpgroup, or, if it is narrow, in each of its warps.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf, vector

from latent_attention.hopper.mlir import constant, i32, thread_index
from latent_attention.hopper.registers import ONE_PER_THREAD, map_elements, rows_layout, vector_layout, vector_length
from latent_attention.hopper.smem_tiles import tiled_layout


def is_narrow(width: int) -> bool:
    """Whether a warp has whole rows of this width, not a quarter of each."""
    return width % 256 == 0 and width <= 1024


_NARROW = tiled_layout((4, 256), (1, 256), (1, 8), warps=(-6,), lanes=(-3,))


def operand(width: int) -> Any:
    """The layout of a vector that `dots` multiplies rows of this width with."""
    return _NARROW.reduce((0,)) if is_narrow(width) else vector_layout(width)


_CHAIN = 5
"""Products of tensor cores that wait for each other; more would rather wait than be added at the end."""


def layout_of_rows(width: int) -> Any:
    """The layout of rows [rows, width] that `dots` multiplies."""
    return _NARROW if is_narrow(width) else rows_layout(vector_length(width))


_ADDED_UP, _OF_ONE_WARP, _OF_ALL_WARPS = 4, 8 + 4, 4 * 8 + 4
"""Parts of a row: one of each warp, eight of one or of each; and four to spare against bank conflicts."""
_FEW = 32
"""Rows of a block at most, for whose parts there is room."""


def parts_of_row(width: int, rows_of_tile: int, rows_of_block: int) -> int:
    """float32 numbers of shared memory for a row in `dots`: where a tile has several, or a block many, fewer."""
    if is_narrow(width):
        return _OF_ONE_WARP
    return _OF_ALL_WARPS if rows_of_tile <= 2 and rows_of_block <= _FEW else _ADDED_UP


def load_rows(ref, rows: int, width: int) -> Any:
    """Rows [rows, width] of 16-bit numbers from where they lie flat in shared memory, as `dots` takes them."""
    layout = layout_of_rows(width)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct((rows, width), ref.dtype, layout=layout),
    )
    def load(_, ref):
        whole = mgpu.utils.memref_reshape(ref, (rows, width))
        return mgpu.FragmentedArray.load_untiled(whole, layout=layout.to_mgpu(), optimized=False)

    return load(ref)  # pyright: ignore[reportCallIssue]


def dots(x, w, parts_ref, per_row: int) -> None:
    """`load_rows` w [rows, width] times x [width], an `operand`: parts of each sum, for `summed`, to shared memory.

    Of narrow rows, a multiple of 4, a warp has whole ones, of others a quarter. `per_row` is what `parts_of_row` says.

    Tensor cores multiply 16 x 16 numbers by 16 x 8. A thread holds, of the first, four of each of two rows, and of the
    second as many, which are given those of x at the same places: then the sums of its products are on the diagonal.
    """
    rows, width = w.shape
    narrow, added_up = is_narrow(width), per_row == _ADDED_UP
    vec = 8 if narrow else vector_length(width)

    @plgpu.inline_mgpu(arg_types=(operand(width), layout_of_rows(width), plgpu.RefType()))
    def multiply(_, x, w, parts):
        def words(registers) -> list:
            """Two numbers each, an even number of them."""
            packed = [mgpu.utils.bitcast(r, ir.VectorType.get((vec // 2,), i32())) for r in registers.reshape(-1)]
            unpacked = [vector.extract(r, [], [i]) for r in packed for i in range(vec // 2)]
            return unpacked + [constant(0)] * (len(unpacked) % 2)

        own_thread = thread_index()
        lane, warp = arith.remui(own_thread, constant(32)), arith.divui(own_thread, constant(32))
        # Thread (row, pair) of an 8 x 8 result has numbers 2 pair and 2 pair + 1 of a row.
        row, pair = arith.divui(lane, constant(4)), arith.remui(lane, constant(4))
        equal = arith.CmpIPredicate.eq
        has_one = arith.cmpi(equal, pair, arith.divui(row, constant(2)))
        is_second = arith.cmpi(equal, arith.remui(row, constant(2)), constant(1))
        number = ir.F32Type.get()
        nothing = arith.constant(number, 0.0)

        def on_diagonal(numbers) -> Any:
            return arith.select(is_second, numbers[1], numbers[0])

        xs, totals = words(x.registers), []
        own = w.registers.reshape(rows // 4 if narrow else rows, -1)
        steps, kind = len(xs) // 2, "bf16" if isinstance(x.mlir_dtype, ir.BF16Type) else "f16"
        chains = -(-steps // _CHAIN)
        for i in range(0, len(own), 2):
            one = words(own[i])
            other = words(own[i + 1]) if i + 1 < len(own) else [constant(0)] * len(one)
            results = [[nothing] * 4 for _ in range(chains)]
            for k in range(steps):
                at = slice(2 * k, 2 * k + 2)
                a = [word for both in zip(one[at], other[at], strict=True) for word in both]
                results[k % chains] = _mma(kind, a, xs[at], results[k % chains])
            for half in (slice(0, 2), slice(2, 4))[: len(own) - i]:
                total = functools.reduce(arith.addf, (on_diagonal(numbers[half]) for numbers in results))
                if added_up:
                    total = arith.select(has_one, total, nothing)
                    for distance in (4, 9, 18):  # the threads that have one differ in these
                        total = arith.addf(total, mgpu.utils.shfl_bfly(total, distance))
                totals.append(total)
        at = warp if added_up else row if narrow else arith.addi(arith.muli(warp, constant(8)), row)
        if narrow:
            at = arith.addi(arith.muli(warp, constant(per_row)), at)
        chosen = scf.IfOp(arith.cmpi(equal, lane, constant(0)) if added_up else has_one)
        with ir.InsertionPoint(chosen.then_block):
            for i, total in enumerate(totals):
                place = arith.addi(at, constant(i * per_row * (4 if narrow else 1)))
                llvm.store(total, mgpu.utils.getelementptr(mgpu.utils.memref_ptr(parts), [place], number))
            scf.yield_([])

    multiply(x, w, parts_ref)  # pyright: ignore[reportCallIssue]


def _mma(kind: str, a: list, b: list, c: list) -> list:
    """c + a b of m16n8k16, each thread's numbers of them; Mosaic's own takes whole tiles in its layouts."""
    code = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
    code += "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    number = ir.F32Type.get()
    out: Any = llvm.inline_asm(
        llvm.StructType.get_literal([number] * 4), [*a, *b, *c], code, ",".join(["=f"] * 4 + ["r"] * 6 + ["f"] * 4)
    )
    return [llvm.extractvalue(number, out, [i]) for i in range(4)]


def summed(parts_ref, rows, per_row: int) -> Any:
    """The sums [128] of rows [128], as `ONE_PER_THREAD`, of which `dots` has written the parts."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), ONE_PER_THREAD),
        return_type=plgpu.ShapeDtypeStruct(rows.shape, jnp.float32, layout=ONE_PER_THREAD),
    )
    def add(_, parts, rows):
        number = ir.F32Type.get()
        four, one = (ir.VectorType.get((n,), number) for n in (4, 1))

        def of(row):
            pointer = mgpu.utils.getelementptr(
                mgpu.utils.memref_ptr(parts), [arith.muli(row, arith.constant(row.type, per_row))], number
            )
            fours = [
                llvm.load(four, mgpu.utils.getelementptr(pointer, [4 * i], number), alignment=16)
                for i in range(1 if per_row == _ADDED_UP else per_row // 4 - 1)
            ]
            total: Any = functools.reduce(arith.addf, fours)
            return vector.broadcast(one, vector.reduction(number, vector.CombiningKind.ADD, total))

        return map_elements(rows, of)

    return add(parts_ref, rows)  # pyright: ignore[reportCallIssue]
