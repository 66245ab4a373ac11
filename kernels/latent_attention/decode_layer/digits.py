"""A vector as two int8 digits, so that `gemv` multiplies it with rows in 8 bits without widening them."""

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
from latent_attention.hopper.mlir import i32
from latent_attention.hopper.registers import ONE_PER_THREAD

RADIX = 256
_LARGEST = 127 * RADIX + 127
"""The largest magnitude of two digits."""
_ROUNDING = 12582912.0
"""1.5 * 2^23. Added to a float32 of magnitude below 2^22, it leaves the nearest integer in the low bits."""
_SMALLEST = 1e-30
"""A vector of smaller elements counts as zeros."""


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
        f32 = ir.F32Type.get()

        def number(value: float) -> Any:
            return arith.constant(f32, float(value))

        elements = [
            arith.extf(f32, vector.extract(register, [], [i]))
            for register in x.registers.flat
            for i in range(ir.VectorType(register.type).shape[0])
        ]
        absmax: Any = functools.reduce(arith.maximumf, map(mlir_math.absf, elements))
        for distance in (1, 2):
            absmax = arith.maximumf(absmax, mgpu.utils.shfl_bfly(absmax, distance))
        is_zero = arith.cmpf(arith.CmpFPredicate.OLT, absmax, number(_SMALLEST))
        inverse_scale = arith.select(is_zero, number(0.0), arith.divf(number(_LARGEST), absmax))

        def nearest(element, plus: int) -> Any:
            """A word with the integer nearest to the element in its low two bytes, plus a number."""
            return arith.bitcast(i32(), mlir_math.fma(element, inverse_scale, number(_ROUNDING + plus)))

        lows = _packed([nearest(element, 0) for element in elements], byte=0)
        highs = _packed([nearest(element, RADIX // 2) for element in elements], byte=1)
        scale = arith.mulf(absmax, number(1 / _LARGEST))
        return Digits(
            _fragments(layout, (width // 4,), highs, signed=True),
            _fragments(layout, (width // 4,), lows, signed=True),
            _fragments(ONE_PER_THREAD, (128,), [scale], signed=None),
        )

    return to_digits(x)  # pyright: ignore[reportCallIssue]


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
