"""Vectors handed from CTAs to CTAs without a fence, as in NCCL's LL protocol: each word carries its own flag.

A mailbox is an int32 vector in global memory. Each word holds a 16-bit element in its upper half and the epoch of its
writer in its lower half. A 32-bit store is atomic, so whoever reads the expected epoch has the element too, whatever
the order in which stores become visible: relaxed loads and stores suffice. Release and acquire would take 0.5 to 2 us
while bulk copies are in flight.

Each launch publishes every word once, with an epoch of its own: what is there before it does is of an earlier epoch.
"""

from typing import Any

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf, vector

from latent_attention.hopper.mlir import add, constant, i32, inline_ptx, mul, thread_index
from latent_attention.hopper.registers import ONE_PER_THREAD


def publish(words_ref, indices, x, epoch) -> None:
    """Writes 16-bit elements x [128] with the epoch to words `indices` [128] of a mailbox, both `ONE_PER_THREAD`."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ONE_PER_THREAD, ONE_PER_THREAD, plgpu.Layout.WG_SPLAT))
    def write(_, words, indices, x, epoch):
        for index, element in zip(indices.registers.flat, x.registers.flat, strict=True):
            index, element = (vector.extract(y, [], [0]) for y in (index, element))
            element = arith.extui(i32(), mgpu.utils.bitcast(element, ir.IntegerType.get_signless(16)))
            word = arith.ori(arith.shli(element, constant(16)), epoch.registers.item())
            pointer = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(words), [index], i32())
            inline_ptx("st.relaxed.gpu.global.u32 [$0], $1;", "l,r", pointer, word)

    write(words_ref, indices, x, epoch)  # pyright: ignore[reportCallIssue]


def receive(words_ref, smem_ref, epoch, num_threads: int) -> None:
    """Spins until all words [width], a multiple of 4, are of this epoch; writes their elements to `smem_ref` [width].

    The `num_threads` threads of neighbouring warpgroups, the first of a multiple of `num_threads`, share the work.
    They see each other's elements only after a barrier.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def read(_, words, smem, epoch):
        target = mgpu.utils.memref_ptr(smem)
        for quad, elements in spin_receive(words, epoch, num_threads):
            llvm.store(elements, mgpu.utils.getelementptr(target, [mul(quad, 2)], i32()))

    read(words_ref, smem_ref, epoch)  # pyright: ignore[reportCallIssue]


def spin_receive(words, epoch, num_threads: int) -> list[tuple[Any, Any]]:
    """This thread's part of `receive`, inside `inline_mgpu`: pairs of (index of four words, their elements).

    The four 16-bit elements are packed in a vector of two 32-bit words. All loads of a round are in flight together,
    and the round is repeated until every word has the epoch.
    """
    (width,) = ir.MemRefType(words.type).shape
    source, thread, last = mgpu.utils.memref_ptr(words), thread_index(num_threads), constant(width // 4 - 1)
    quads = [arith.minui(add(thread, constant(first)), last) for first in range(0, width // 4, num_threads)]
    return spin_receive_quads(source, quads, epoch)


def spin_receive_quads(source, quads: list[Any], epoch) -> list[tuple[Any, Any]]:
    """`spin_receive` of four words each at these indices, in fours, behind the pointer `source`."""
    epoch = epoch.registers.item()
    epochs = arith.ori(arith.shli(epoch, constant(16)), epoch)
    loop = scf.WhileOp([i32()] * (2 * len(quads)), [])
    with ir.InsertionPoint(loop.before.blocks.append()):
        packed, missing = [], arith.constant(ir.IntegerType.get_signless(1), 0)
        for quad in quads:
            pointer = mgpu.utils.getelementptr(source, [mul(quad, 4)], i32())
            loaded: Any = llvm.inline_asm(
                llvm.StructType.get_literal([i32()] * 4), [pointer],
                "ld.relaxed.gpu.global.v4.u32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", has_side_effects=True,
            )  # fmt: skip
            four_words = [llvm.extractvalue(i32(), loaded, [i]) for i in range(4)]
            for pair in (four_words[:2], four_words[2:]):
                packed.append(_pack_halves(pair, _UPPER))
                stale = arith.cmpi(arith.CmpIPredicate.ne, _pack_halves(pair, _LOWER), epochs)
                missing = arith.ori(missing, stale)
        scf.condition(missing, packed)
    with ir.InsertionPoint(loop.after.blocks.append(*[i32()] * (2 * len(quads)))):
        scf.yield_([])
    results = list(loop.results)
    two = ir.VectorType.get((2,), i32())
    return [(quad, vector.from_elements(two, results[2 * i : 2 * i + 2])) for i, quad in enumerate(quads)]


_UPPER, _LOWER = "0x7632", "0x5410"
"""Byte selectors of `prmt`: the upper, or the lower, halves of two words."""


def _pack_halves(pair: list, selector: str) -> Any:
    return llvm.inline_asm(i32(), pair, f"prmt.b32 $0, $1, $2, {selector};", "=r,r,r")
