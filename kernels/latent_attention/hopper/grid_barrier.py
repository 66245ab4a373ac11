"""The grid-wide barrier: a counter in global memory on which all CTAs arrive. All CTAs must be resident at one time.

The counter only grows: the barrier is passed when it reaches the number of CTAs times the number of barriers so far, so
nothing has to be reset, and it goes on from one launch to the next.

With release and acquire, global memory written before a CTA arrives is visible to all that have waited. That fence
takes 0.5 to 2 us while bulk copies are in flight. Where vectors travel through a `mailbox`, which needs no fence,
relaxed order suffices: passing the barrier is then only a hint that it is time to look.
"""

from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

from latent_attention.hopper.mlir import i32, inline_ptx
from latent_attention.hopper.registers import SPLAT


def _load(ptx: str, counter) -> Any:
    return llvm.inline_asm(i32(), [mgpu.utils.memref_ptr(counter)], ptx, "=r,l", has_side_effects=True)


def load_counter(counter_ref) -> Any:
    """The counter's value now, by a relaxed load."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=SPLAT))
    def load(_, counter):
        value = _load("ld.relaxed.gpu.global.u32 $0, [$1];", counter)
        return mgpu.FragmentedArray.splat(value, (), is_signed=True)

    return load(counter_ref)  # pyright: ignore[reportCallIssue]


def arrive(counter_ref, *, release: bool) -> None:
    """One thread of the warpgroup adds 1 to the counter, with release semantics or relaxed.

    Writes of the other threads are released too if a `warpgroup_barrier` comes before.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def add_one(_, counter):
        with mgpu.utils.single_thread(scope=mgpu.utils.ThreadSubset.WARPGROUP):
            order = "release" if release else "relaxed"
            inline_ptx(f"red.{order}.gpu.global.add.u32 [$0], 1;", "l", mgpu.utils.memref_ptr(counter))

    add_one(counter_ref)  # pyright: ignore[reportCallIssue]


def wait(counter_ref, target, *, acquire: bool) -> None:
    """One thread of the warpgroup spins until the counter reaches `target`, with acquire semantics or relaxed.

    The other threads need a barrier within the CTA after it. (Bulk copies are started by the same thread.)
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def spin(_, counter, target):
        with mgpu.utils.single_thread(scope=mgpu.utils.ThreadSubset.WARPGROUP):
            loop = scf.WhileOp([], [])
            with ir.InsertionPoint(loop.before.blocks.append()):
                value = _load(f"ld.{'acquire' if acquire else 'relaxed'}.gpu.global.u32 $0, [$1];", counter)
                scf.condition(arith.cmpi(arith.CmpIPredicate.ult, value, target.registers.item()), [])
            with ir.InsertionPoint(loop.after.blocks.append()):
                scf.yield_([])

    spin(counter_ref, target)  # pyright: ignore[reportCallIssue]
