"""Vectors and rows of matrices in the registers of a warpgroup; in Mosaic GPU itself where Pallas has no words.

A vector [width] lies over the 128 threads of a warpgroup, `vec` neighbouring numbers each in turn.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, vector

from latent_attention.hopper.smem_tiles import layout_of, read

COLUMNS = 64
"""Of a tile that `over_rows` sums."""
SPLAT = plgpu.Layout.WG_SPLAT


def row_tile(vec: int) -> Any:
    """[rows, width]; every thread has a part of each row."""
    return layout_of((1, 128 * vec), (1, 32 * vec), (1, vec), warps=(-5,), lanes=(-3,))


TILE = layout_of((8, COLUMNS), (2, COLUMNS), (1, 4), warps=(-6,), lanes=(-4, -3))
"""[a multiple of 8, COLUMNS]."""
ONE_BY_ONE = row_tile(1).reduce((0,))
"""A vector [a multiple of 128], a number a thread in turn."""


def vec_of(width: int) -> int:
    """Neighbouring numbers of a row, a multiple of 256, that a thread reads at a time."""
    return next(vec for vec in (8, 4, 2) if width % (128 * vec) == 0)


def along(width: int) -> Any:
    """The layout of a vector."""
    return row_tile(vec_of(width)).reduce((0,))


def _each_warp(width: int, vec: int) -> Any:
    lanes = width // vec
    copies = (plgpu.Replicated(32 // lanes),) if lanes < 32 else ()
    return layout_of((width,), (vec,), warps=(plgpu.Replicated(4),), lanes=(*copies, -2))


def pairs(width: int) -> Any:
    """[width], 64 at most, a pair a thread, in every warp."""
    return _each_warp(width, 2)


def angles(width: int) -> Any:
    """[width / 2], a number for each of `pairs`."""
    return _each_warp(width // 2, 1)


def load(ref, layout) -> Any:
    """float32 numbers at a reference."""
    return read(ref, layout).astype(jnp.float32)


def store(ref, x, layout) -> None:
    """Writes x, which has this layout, to memory."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout))
    def write(_, ref, x):
        x.store_untiled(ref, optimized=False)

    write(ref, x)  # pyright: ignore[reportCallIssue]


def store_apart(ref, x, layout) -> None:
    """Writes x, which has this layout, to memory where its numbers do not lie side by side."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout))
    def write(_, ref, x):
        x.foreach(lambda number, at: memref.store(number, ref, at))

    write(ref, x)  # pyright: ignore[reportCallIssue]


def _reduce(op: str, x, axis: int, layout, to, scratch_ref) -> Any:
    shape = x.shape[:axis] + x.shape[axis + 1 :]

    @plgpu.inline_mgpu(
        arg_types=(layout, plgpu.RefType()), return_type=plgpu.ShapeDtypeStruct(shape, x.dtype, layout=to)
    )
    def reduce(_, x, scratch):
        return x.reduce(op, axis, scratch)

    return reduce(x, scratch_ref)  # pyright: ignore[reportCallIssue]


def total(x, layout, scratch_ref) -> Any:
    """The sum of a vector, a scalar."""
    return _reduce("add", x, 0, layout, SPLAT, scratch_ref)


def largest(x, layout, scratch_ref) -> Any:
    """The largest number of a vector."""
    return _reduce("max", x, 0, layout, SPLAT, scratch_ref)


def over_rows(x, factors, scratch_ref) -> Any:
    """[COLUMNS], as `TILE.reduce((0,))`: the sum of the rows of x [rows, COLUMNS], each times its factor."""
    factors = plgpu.layout_cast(lax.broadcast_in_dim(factors, x.shape, [0]), TILE)
    return _reduce("add", x * factors, 0, TILE, TILE.reduce((0,)), scratch_ref)


def numbers(count: int = 128) -> Any:
    """0 to count - 1, as `ONE_BY_ONE`."""
    return plgpu.broadcasted_iota(jnp.int32, (count,), 0, layout=ONE_BY_ONE)


def gathered(ref, at) -> Any:
    """float32 numbers of a vector in shared memory, at places [128] as `ONE_BY_ONE`."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), ONE_BY_ONE),
        return_type=plgpu.ShapeDtypeStruct(at.shape, ref.dtype, layout=ONE_BY_ONE),
    )
    def gather(_, ref, at):
        kind = ir.MemRefType(ref.type).element_type

        def of(place):
            pointer = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [place], kind)
            return vector.broadcast(ir.VectorType.get((1,), kind), llvm.load(kind, pointer))

        return each(at, of)

    return gather(ref, at).astype(jnp.float32)  # pyright: ignore[reportCallIssue]


def scatter(ref, at, x) -> None:
    """Writes x [128] to places [128] of a vector in memory, both as `ONE_BY_ONE`."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ONE_BY_ONE, ONE_BY_ONE))
    def write(_, ref, at, x):
        kind = ir.MemRefType(ref.type).element_type
        for place, register in zip(at.registers.flat, x.registers.flat, strict=True):
            pointer = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [vector.extract(place, [], [0])], kind)
            llvm.store(vector.extract(register, [], [0]), pointer)

    write(ref, at, x)  # pyright: ignore[reportCallIssue]


def each(x: Any, function) -> Any:
    """function(number) of each of a thread's numbers, vectors of one."""
    registers = np.empty_like(x.registers)
    for i, register in enumerate(x.registers.flat):
        registers.flat[i] = function(vector.extract(register, [], [0]))
    return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)


def turned(x, cos, sin) -> Any:
    """x [R], as `pairs`, each pair (x0, x1) turned by an angle: (x0 cos - x1 sin, x1 cos + x0 sin)."""
    layout, of_angles = pairs(x.size), angles(x.size)

    @plgpu.inline_mgpu(
        arg_types=(layout, of_angles, of_angles),
        return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=layout),
    )
    def turn(_, x, cos, sin):
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

    return turn(x, cos, sin)  # pyright: ignore[reportCallIssue]
