"""Vectors and rows of matrices in the registers of a warpgroup: layouts, loads and stores, reductions, RoPE.

A vector [width] is distributed over the 128 threads of a warpgroup, `vec` contiguous elements per thread, round after
round. What Pallas cannot express is written in Mosaic GPU (`plgpu.inline_mgpu`).
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, vector

from latent_attention.hopper.smem_tiles import load_as, tiled_layout

VECMAT_COLUMNS = 64
"""Columns of a matrix tile in `vecmat`."""
SPLAT = plgpu.Layout.WG_SPLAT


def rows_layout(vec: int) -> Any:
    """The layout of [rows, width] in which each row is distributed over all threads, `vec` elements at a time."""
    return tiled_layout((1, 128 * vec), (1, 32 * vec), (1, vec), warps=(-5,), lanes=(-3,))


VECMAT_TILE = tiled_layout((8, VECMAT_COLUMNS), (2, VECMAT_COLUMNS), (1, 4), warps=(-6,), lanes=(-4, -3))
"""The layout of a matrix tile [a multiple of 8, VECMAT_COLUMNS] in `vecmat`."""
ONE_PER_THREAD = rows_layout(1).reduce((0,))
"""The layout of a vector [a multiple of 128] whose element i is in thread i mod 128."""


def vector_length(width: int) -> int:
    """Contiguous elements of a row that a thread loads at a time; the width is a multiple of 256."""
    return next(vec for vec in (8, 4, 2) if width % (128 * vec) == 0)


def vector_layout(width: int) -> Any:
    """The layout of a vector [width] over all threads."""
    return rows_layout(vector_length(width)).reduce((0,))


def _replicated_in_warps(width: int, vec: int) -> Any:
    lanes = width // vec
    copies = (plgpu.Replicated(32 // lanes),) if lanes < 32 else ()
    return tiled_layout((width,), (vec,), warps=(plgpu.Replicated(4),), lanes=(*copies, -2))


def rope_pairs_layout(width: int) -> Any:
    """The layout of [width], 64 at most: a pair of elements per thread, the same in every warp."""
    return _replicated_in_warps(width, 2)


def rope_angles_layout(width: int) -> Any:
    """The layout of [width / 2] that gives each thread the element of its pair in `rope_pairs_layout`."""
    return _replicated_in_warps(width // 2, 1)


def load_f32(ref, layout) -> Any:
    """Loads into this layout, as float32."""
    return load_as(ref, layout).astype(jnp.float32)


def store(ref, x, layout) -> None:
    """Writes x, which has this layout, to contiguous memory."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout))
    def write(_, ref, x):
        x.store_untiled(ref, optimized=False)

    write(ref, x)  # pyright: ignore[reportCallIssue]


def store_int8(ref, x, layout) -> None:
    """Writes whole numbers x, float32 of magnitude 127 at most in this layout, to contiguous memory, as int8."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout))
    def write(_, ref, x):
        registers = np.empty_like(x.registers)
        for i, register in enumerate(x.registers.flat):
            kind = ir.VectorType.get(ir.VectorType(register.type).shape, ir.IntegerType.get_signless(8))
            registers.flat[i] = arith.fptosi(kind, register)
        as_int8 = mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=True)
        as_int8.store_untiled(ref, optimized=False)

    write(ref, x)  # pyright: ignore[reportCallIssue]


def store_strided(ref, x, layout) -> None:
    """Writes x, which has this layout, to a reference with any strides, an element at a time."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout))
    def write(_, ref, x):
        x.foreach(lambda element, index: memref.store(element, ref, index))

    write(ref, x)  # pyright: ignore[reportCallIssue]


def _reduce(op: str, x, axis: int, layout, to, scratch_ref) -> Any:
    shape = x.shape[:axis] + x.shape[axis + 1 :]

    @plgpu.inline_mgpu(
        arg_types=(layout, plgpu.RefType()), return_type=plgpu.ShapeDtypeStruct(shape, x.dtype, layout=to)
    )
    def reduce(_, x, scratch):
        return x.reduce(op, axis, scratch)

    return reduce(x, scratch_ref)  # pyright: ignore[reportCallIssue]


def reduce_sum(x, layout, scratch_ref) -> Any:
    """The sum of a vector, in every thread."""
    return _reduce("add", x, 0, layout, SPLAT, scratch_ref)


def reduce_max(x, layout, scratch_ref) -> Any:
    """The maximum of a vector, in every thread."""
    return _reduce("max", x, 0, layout, SPLAT, scratch_ref)


def quantize(x, layout, scratch_ref) -> tuple[Any, Any]:
    """Whole numbers and their scale, both float32, by the rule of `int8.quantize`: of a vector in this layout."""
    x = x.astype(jnp.float32)
    scale = reduce_max(jnp.abs(x), layout, scratch_ref) / 127
    units = lax.round(x / jnp.where(scale == 0, 1.0, scale), lax.RoundingMethod.TO_NEAREST_EVEN)
    return jnp.clip(units, -127, 127), scale


def rms_norm(x, gamma, eps: float, layout, scratch_ref) -> Any:
    """RMSNorm of a vector x in this layout, computed in float32, in the type of x."""
    dtype, x = x.dtype, x.astype(jnp.float32)
    factor = lax.rsqrt(reduce_sum(x * x, layout, scratch_ref) / x.size + eps)
    return (x * factor * gamma).astype(dtype)


def vecmat(x, matrix, scratch_ref) -> Any:
    """x [rows] times a matrix [rows, VECMAT_COLUMNS]: [VECMAT_COLUMNS], in `VECMAT_TILE.reduce((0,))`."""
    factors = plgpu.layout_cast(lax.broadcast_in_dim(x, matrix.shape, [0]), VECMAT_TILE)
    return _reduce("add", matrix * factors, 0, VECMAT_TILE, VECMAT_TILE.reduce((0,)), scratch_ref)


def element_indices(count: int = 128) -> Any:
    """0 to count - 1, `ONE_PER_THREAD`."""
    return plgpu.broadcasted_iota(jnp.int32, (count,), 0, layout=ONE_PER_THREAD)


def gather(ref, indices) -> Any:
    """Elements `indices` [128] of a vector in memory, as float32; both `ONE_PER_THREAD`."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), ONE_PER_THREAD),
        return_type=plgpu.ShapeDtypeStruct(indices.shape, ref.dtype, layout=ONE_PER_THREAD),
    )
    def read(_, ref, indices):
        dtype = ir.MemRefType(ref.type).element_type

        def load_element(index):
            pointer = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [index], dtype)
            return vector.broadcast(ir.VectorType.get((1,), dtype), llvm.load(dtype, pointer))

        return map_elements(indices, load_element)

    return read(ref, indices).astype(jnp.float32)  # pyright: ignore[reportCallIssue]


def scatter(ref, indices, x) -> None:
    """Writes x [128] to elements `indices` [128] of a vector in memory, both `ONE_PER_THREAD`."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ONE_PER_THREAD, ONE_PER_THREAD))
    def write(_, ref, indices, x):
        dtype = ir.MemRefType(ref.type).element_type
        for index, register in zip(indices.registers.flat, x.registers.flat, strict=True):
            pointer = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [vector.extract(index, [], [0])], dtype)
            llvm.store(vector.extract(register, [], [0]), pointer)

    write(ref, indices, x)  # pyright: ignore[reportCallIssue]


def map_elements(x: Any, function) -> Any:
    """Inside `inline_mgpu`: function(element) of each of a thread's registers, which are vectors of length 1."""
    registers = np.empty_like(x.registers)
    for i, register in enumerate(x.registers.flat):
        registers.flat[i] = function(vector.extract(register, [], [0]))
    return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)


def apply_rope(x, cos, sin) -> Any:
    """RoPE of x [R] on interleaved pairs: (x0 cos - x1 sin, x1 cos + x0 sin), float32.

    x is in `rope_pairs_layout`, cos and sin [R/2] are in `rope_angles_layout`.
    """
    layout, angles_layout = rope_pairs_layout(x.size), rope_angles_layout(x.size)

    @plgpu.inline_mgpu(
        arg_types=(layout, angles_layout, angles_layout),
        return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=layout),
    )
    def rotate(_, x, cos, sin):
        (pair,), (c,), (s,) = (part.registers.flat for part in (x, cos, sin))
        (even, odd), c, s = (
            (vector.extract(pair, [], [i]) for i in (0, 1)),
            *(vector.extract(y, [], [0]) for y in (c, s)),
        )
        first = arith.subf(arith.mulf(even, c), arith.mulf(odd, s))
        second = arith.addf(arith.mulf(odd, c), arith.mulf(even, s))
        registers = np.empty_like(x.registers)
        registers.flat[0] = vector.from_elements(pair.type, [first, second])
        return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

    return rotate(x, cos, sin)  # pyright: ignore[reportCallIssue]
