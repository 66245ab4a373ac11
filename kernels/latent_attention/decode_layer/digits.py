"""Vectors as two int8 digits: for `gemv` with rows in 8 bits, and queries for a cache in 8 bits.

Neither the rows nor the cache are widened then, and their products with the digits are exact.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxlib.mlir.dialects import math as mlir_math

from latent_attention.decode_layer.layouts import operand_layout, words_layout
from latent_attention.hopper.int8_tiles import SWIZZLE
from latent_attention.hopper.mailbox import spin_receive_quads
from latent_attention.hopper.mlir import add, constant, divmod_unsigned, i8, i32, mul, thread_index
from latent_attention.hopper.registers import ONE_PER_THREAD

RADIX = 256
_LARGEST = 127 * RADIX + 127
"""The largest magnitude of two digits."""
_ROUNDING = 12582912.0
"""1.5 * 2^23. Added to a float32 of magnitude below 2^22, it leaves the nearest integer in the low bits."""
_SMALLEST = 1e-30
"""A vector of smaller elements counts as zeros."""
_ATOM = 8 * SWIZZLE
"""Bytes of a swizzle atom of an int8 tile: 8 rows of 64 columns."""


class Digits(NamedTuple):
    """scale * (RADIX * high + low): the digits are the bytes of a 16-bit integer, the low one signed as well."""

    high: Any
    """int32 words [width / 4], of four digits each, in `words_layout` without rows."""
    low: Any
    scale: Any
    """float32 [128], `ONE_PER_THREAD`: of all elements that the thread's group of four lanes has.

    `gemv` adds up their products on one place of the diagonal, so no warp has to wait for the others' absmax.
    """


def split(x) -> Digits:
    """Splits a vector [width] of 16 bits in `operand_layout`. What is not finite makes the group's scale NaN or inf."""
    (width,) = x.shape
    layout = words_layout(width).reduce((0,))
    words = plgpu.ShapeDtypeStruct((width // 4,), jnp.int32, layout=layout)
    scales = plgpu.ShapeDtypeStruct((128,), jnp.float32, layout=ONE_PER_THREAD)

    @plgpu.inline_mgpu(arg_types=(operand_layout(width),), return_type=Digits(words, words, scales))
    def to_digits(_, x):
        elements = [element for register in x.registers.flat for element in _elements(register)]
        highs, lows, scale = _to_digits(elements, (1, 2))
        return Digits(
            _fragments(layout, (width // 4,), highs, signed=True),
            _fragments(layout, (width // 4,), lows, signed=True),
            _fragments(ONE_PER_THREAD, (128,), [scale], signed=None),
        )

    return to_digits(x)  # pyright: ignore[reportCallIssue]


def _elements(register) -> list:
    """The elements of a vector of 16 bits, as float32."""
    f32 = ir.F32Type.get()
    return [arith.extf(f32, vector.extract(register, [], [i])) for i in range(ir.VectorType(register.type).shape[0])]


def _to_digits(elements: list, distances: tuple[int, ...]) -> tuple[list, list, Any]:
    """The high and the low digits of a thread's elements, as words of four, and the scale that lanes share.

    The lanes are those whose indices differ in the bits `distances`.
    """
    f32 = ir.F32Type.get()

    def number(value: float) -> Any:
        return arith.constant(f32, float(value))

    absmax: Any = functools.reduce(arith.maximumf, map(mlir_math.absf, elements))
    for distance in distances:
        absmax = arith.maximumf(absmax, mgpu.utils.shfl_bfly(absmax, distance))
    is_zero = arith.cmpf(arith.CmpFPredicate.OLT, absmax, number(_SMALLEST))
    inverse_scale = arith.select(is_zero, number(0.0), arith.divf(number(_LARGEST), absmax))

    def nearest(element, plus: int) -> Any:
        """A word with the integer nearest to the element in its low two bytes, plus a number."""
        return arith.bitcast(i32(), mlir_math.fma(element, inverse_scale, number(_ROUNDING + plus)))

    lows = _packed([nearest(element, 0) for element in elements], byte=0)
    highs = _packed([nearest(element, RADIX // 2) for element in elements], byte=1)
    return highs, lows, arith.mulf(absmax, number(1 / _LARGEST))


def _packed(words: list, byte: int) -> list:
    """One byte of every four words as one word, the first one's lowest."""

    def prmt(a, b, selector: int) -> Any:
        return llvm.inline_asm(i32(), [a, b], f"prmt.b32 $0, $1, $2, {selector};", "=r,r,r")

    both = 0x40 + 0x11 * byte
    return [prmt(prmt(a, b, both), prmt(c, d, both), 0x5410) for a, b, c, d in zip(*[iter(words)] * 4, strict=True)]


def _fragments(layout, shape: tuple[int, ...], elements: list, signed: bool | None) -> Any:
    """A thread's elements as an array in this layout."""
    layout = layout.to_mgpu()
    registers = np.empty(layout.registers_shape(shape), object)
    each = len(elements) // registers.size
    kind = ir.VectorType.get((each,), elements[0].type)
    for i in range(registers.size):
        registers.flat[i] = vector.from_elements(kind, elements[each * i : each * (i + 1)])
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=signed)


def receive_queries(words_ref, tile_refs, scales_ref, dtype, epoch, num_warps: int) -> None:
    """`mailbox.receive` of queries [rows, 256 + 64] of this 16-bit type, as digits in shared memory, for wgmma.

    Warps take rows in turn, so that a shuffle gives the largest magnitude of a row. Other threads see the digits after
    `plgpu.commit_smem` and a barrier.

    Args:
        words_ref: the mailbox.
        tile_refs: int8 tiles [2 rows, 256] and [2 rows, 64], of the content and the rotary part: the high digits of all
            rows, then the low ones.
        scales_ref: float32 [rows], for query = scale * (RADIX * high + low).
        dtype: of the queries.
        epoch: see `mailbox.receive`.
        num_warps: that receive, the first ones of the CTA; 8, as rows of a swizzle atom.
    """
    rows, width = tile_refs[0].shape[0] // 2, sum(ref.shape[1] for ref in tile_refs)
    assert [ref.shape[1] for ref in tile_refs] == [256, 64] and num_warps == 8 and rows % num_warps == 0
    tile_type = plgpu.RefType((plgpu.TilingTransform((8, SWIZZLE)), plgpu.SwizzleTransform(SWIZZLE)))

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), tile_type, tile_type, plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def receive(_, words, c, rope, scales, epoch):
        four = ir.VectorType.get((4,), mgpu.utils.dtype_to_ir_type(jnp.dtype(dtype)))
        warp, lane = divmod_unsigned(thread_index(32 * num_warps), 32)
        half, lane_16 = divmod_unsigned(lane, 16)
        # A lane has columns 4 lane to 4 lane + 3 of each 128 of the content part, and 4 lane_16 to 4 lane_16 + 3 of the
        # rotary part, like the lane with the same lane_16.
        starts = [lane, add(lane, constant(32)), add(lane_16, constant(64))]
        quads = [
            add(mul(warp, width // 4), constant(first * width // 4), start)
            for first in range(0, rows, num_warps)
            for start in starts
        ]
        received = [elements for _, elements in spin_receive_quads(mgpu.utils.memref_ptr(words), quads, epoch)]
        # Byte in an atom of 8 rows of 64 columns: the row in it is the warp, the 16-byte unit is lane_16 / 4.
        unit, word = divmod_unsigned(lane_16, 4)
        unit = arith.xori(unit, arith.divui(warp, constant(2)))
        in_atom = add(mul(warp, SWIZZLE), mul(unit, 16), mul(word, 4))
        in_row = [add(mul(half, _ATOM), in_atom), add(mul(half, _ATOM), in_atom, constant(2 * _ATOM)), in_atom]
        targets = [(c, in_row[0], 4), (c, in_row[1], 4), (rope, in_row[2], 1)]
        for i in range(rows // num_warps):
            parts = [mgpu.utils.bitcast(part, four) for part in received[3 * i : 3 * i + 3]]
            elements = [element for part in parts for element in _elements(part)]
            *digits, scale = _to_digits(elements, (1, 2, 4, 8, 16))
            for rows_before, words_of_digit in zip((0, rows), digits, strict=True):
                for (tile, start, chunks), word_of_digit in zip(targets, words_of_digit, strict=True):
                    offset = add(start, constant((rows_before // 8 + i) * chunks * _ATOM))
                    pointer = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(tile), [offset], i8())
                    llvm.store(word_of_digit, pointer, alignment=4)
            row = add(warp, constant(num_warps * i))
            llvm.store(scale, mgpu.utils.getelementptr(mgpu.utils.memref_ptr(scales), [row], ir.F32Type.get()))

    receive(words_ref, *tile_refs, scales_ref, epoch)  # pyright: ignore[reportCallIssue]
