"""Tiles in shared memory and their register layouts for wgmma; in Mosaic GPU (`plgpu.inline_mgpu`) what Pallas cannot.

In the attention kernels a tile of the cache lies on the M axis of wgmma and the query rows on N.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from latent_attention.hopper.mlir import add, constant, divmod_unsigned, i32, mul, thread_index

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


def opaque_zero():
    """0, int32, of which LLVM does not know that it is, so that what depends on it is computed where it is used.

    The wgmma descriptors of constant addresses would be computed before a loop, and take two registers each in it.
    """

    @plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT))
    def move(_):
        zero: Any = llvm.inline_asm(i32(), [], "mov.u32 $0, 0;", "=r", has_side_effects=True)
        return mgpu.FragmentedArray.splat(zero, (), is_signed=True)

    return move()  # pyright: ignore[reportCallIssue]


def store_transposed(ref, x) -> None:
    """Writes a wgmma accumulator [64, N] of float32 to contiguous global memory [N, 64].

    A warp writes whole sectors of 32 bytes: 8 rows of a column.
    """
    rows = x.shape[0]
    assert rows == 64

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
    def write(_, ref, x):
        warp, lane = divmod_unsigned(thread_index(), 32)
        row, quad = divmod_unsigned(lane, 4)
        own = add(mul(quad, 2 * rows), mul(warp, 16), row)
        f32 = ir.F32Type.get()
        pointer = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [own], f32)
        for i, register in enumerate(x.registers.flat):  # two columns of one of the thread's two rows
            for j in range(2):
                offset = constant((i // 2 * 8 + j) * rows + i % 2 * 8)
                llvm.store(vector.extract(register, [], [j]), mgpu.utils.getelementptr(pointer, [offset], f32))

    write(ref, x)  # pyright: ignore[reportCallIssue]


def any_above(x, limit: float):
    """Whether any element of a wgmma accumulator is above the limit, NaN not counted: int32, 1 or 0, in every thread.

    It is a barrier of the warpgroup, and takes less than a maximum across its warps.
    """

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA,),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT),
    )
    def vote(_, x):
        elements = [
            vector.extract(register, [], [i])
            for register in x.registers.flat
            for i in range(ir.VectorType(register.type).shape[0])
        ]
        largest: Any = functools.reduce(arith.maxnumf, elements)
        above = arith.cmpf(arith.CmpFPredicate.OGT, largest, arith.constant(ir.F32Type.get(), float(limit)))
        barrier = add(mgpu.utils.warpgroup_idx(sync=False), constant(1))  # as `mgpu.utils.warpgroup_barrier`
        code = "{ .reg .pred p, q; setp.ne.u32 p, $2, 0; bar.red.or.pred q, $1, 128, p; selp.u32 $0, 1, 0, q; }"
        operands = [barrier, arith.extui(i32(), above)]
        result: Any = llvm.inline_asm(i32(), operands, code, "=r,r,r", has_side_effects=True)
        return mgpu.FragmentedArray.splat(result, (), is_signed=True)

    return vote(x)  # pyright: ignore[reportCallIssue]


def reduce_columns(op: str, x, scratch_ref):
    """Reduces a wgmma accumulator [M, N] over M; Pallas's reduction would share one scratch among all warpgroups."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct(x.shape[1:], x.dtype, layout=PER_COLUMN),
    )
    def reduce(_, x, scratch):
        return x.reduce(op, 0, scratch)

    return reduce(x, scratch_ref)  # pyright: ignore[reportCallIssue]
