"""How the blocks of a kernel wait for each other, and hand each other vectors; all of them must run at one time.

What a block has written is seen by others behind a fence, which takes 0.5 to 2 us while copies are on their way. So
vectors of 16-bit numbers go from all blocks to all without one, as words of a number and a tag: who reads a word knows
by its tag whether the number is there. That all blocks have counted, if they do, is then only a hint that it is time to
look. Each launch posts one value in every word, so that there is, before, what the launch before has posted with
another tag.
"""

from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf, vector

from latent_attention.hopper.mlir import constant, i32, plus, run, thread, times
from latent_attention.hopper.registers import ONE_BY_ONE, SPLAT

_BARRIER = 15
"""Of the hardware's 16, that `meet_warpgroups` uses; Mosaic uses the first, one for each warpgroup."""


def _load(code: str, counter) -> Any:
    """Loads a counter, as PTX `code` says."""
    return llvm.inline_asm(i32(), [mgpu.utils.memref_ptr(counter)], code, "=r,l", has_side_effects=True)


def counted(counter_ref) -> Any:
    """What a counter is at now."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=SPLAT))
    def count(_, counter):
        now = _load("ld.relaxed.gpu.global.u32 $0, [$1];", counter)
        return mgpu.FragmentedArray.splat(now, (), is_signed=True)

    return count(counter_ref)  # pyright: ignore[reportCallIssue]


def count_up(counter_ref, *, fence: bool) -> None:
    """One thread of the warpgroup adds one to a counter; if with a fence, who sees that sees what it has written."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def count(_, counter):
        with mgpu.utils.single_thread(scope=mgpu.utils.ThreadSubset.WARPGROUP):
            order = "release" if fence else "relaxed"
            run(f"red.{order}.gpu.global.add.u32 [$0], 1;", "l", mgpu.utils.memref_ptr(counter))

    count(counter_ref)  # pyright: ignore[reportCallIssue]


def wait_until(counter_ref, target, *, fence: bool) -> None:
    """One thread of the warpgroup waits until a counter is at `target`."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def wait(_, counter, target):
        with mgpu.utils.single_thread(scope=mgpu.utils.ThreadSubset.WARPGROUP):
            loop = scf.WhileOp([], [])
            with ir.InsertionPoint(loop.before.blocks.append()):
                now = _load(f"ld.{'acquire' if fence else 'relaxed'}.gpu.global.u32 $0, [$1];", counter)
                scf.condition(arith.cmpi(arith.CmpIPredicate.ult, now, target.registers.item()), [])
            with ir.InsertionPoint(loop.after.blocks.append()):
                scf.yield_([])

    wait(counter_ref, target)  # pyright: ignore[reportCallIssue]


def meet_warpgroup() -> None:
    """All warps of the warpgroup are here, and see what any has written to shared memory."""

    @plgpu.inline_mgpu()
    def meet(_):
        mgpu.utils.warpgroup_barrier()

    meet()  # pyright: ignore[reportCallIssue]


def meet_warpgroups(count: int) -> None:
    """So many warpgroups are here, and see what any has written to shared memory."""

    @plgpu.inline_mgpu()
    def meet(_):
        run(f"bar.sync {_BARRIER}, {128 * count};", "~{memory}")

    meet()  # pyright: ignore[reportCallIssue]


def written_is_seen_by_copies() -> None:
    """What this thread knows to be in memory, copies that it starts see too, or overwrite."""

    @plgpu.inline_mgpu()
    def fence(_):
        run("fence.proxy.async;", "")

    fence()  # pyright: ignore[reportCallIssue]


def post(words_ref, at, x, tag) -> None:
    """Writes 16-bit numbers x [128] with a tag to places [128] of an int32 vector, all as `ONE_BY_ONE`."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ONE_BY_ONE, ONE_BY_ONE, plgpu.Layout.WG_SPLAT))
    def write(_, words, at, x, tag):
        for place, register in zip(at.registers.flat, x.registers.flat, strict=True):
            place, number = (vector.extract(y, [], [0]) for y in (place, register))
            number = arith.extui(i32(), mgpu.utils.bitcast(number, ir.IntegerType.get_signless(16)))
            word = arith.ori(arith.shli(number, constant(16)), tag.registers.item())
            pointer = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(words), [place], i32())
            run("st.relaxed.gpu.global.u32 [$0], $1;", "l,r", pointer, word)

    write(words_ref, at, x, tag)  # pyright: ignore[reportCallIssue]


def collect(words_ref, place_ref, tag, threads: int) -> None:
    """Waits for the numbers of a vector of words [width], a multiple of 4, and writes them to shared memory [width].

    So many threads of the block do it, from a multiple of `threads` on; they see all behind a barrier only.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def read(_, words, place, tag):
        target = mgpu.utils.memref_ptr(place)
        for four, numbers in awaited(words, tag, threads):
            llvm.store(numbers, mgpu.utils.getelementptr(target, [times(four, 2)], i32()))

    read(words_ref, place_ref, tag)  # pyright: ignore[reportCallIssue]


def awaited(words, tag, threads: int) -> list[tuple[Any, Any]]:
    """For Mosaic: a thread's part of `collect`, the numbers of four words, as two words, with which four these are."""
    (width,) = ir.MemRefType(words.type).shape
    source, own, last = mgpu.utils.memref_ptr(words), thread(threads), constant(width // 4 - 1)
    fours = [arith.minui(plus(own, constant(first)), last) for first in range(0, width // 4, threads)]
    tag = tag.registers.item()
    tags = arith.ori(arith.shli(tag, constant(16)), tag)
    loop = scf.WhileOp([i32()] * (2 * len(fours)), [])
    with ir.InsertionPoint(loop.before.blocks.append()):
        pairs, missing = [], arith.constant(ir.IntegerType.get_signless(1), 0)
        for four in fours:
            pointer = mgpu.utils.getelementptr(source, [times(four, 4)], i32())
            loaded: Any = llvm.inline_asm(
                llvm.StructType.get_literal([i32()] * 4), [pointer],
                "ld.relaxed.gpu.global.v4.u32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", has_side_effects=True,
            )  # fmt: skip
            four_words = [llvm.extractvalue(i32(), loaded, [i]) for i in range(4)]
            for pair in (four_words[:2], four_words[2:]):
                pairs.append(_halves(pair, "0x7632"))
                other = arith.cmpi(arith.CmpIPredicate.ne, _halves(pair, "0x5410"), tags)
                missing = arith.ori(missing, other)
        scf.condition(missing, pairs)
    with ir.InsertionPoint(loop.after.blocks.append(*[i32()] * (2 * len(fours)))):
        scf.yield_([])
    results = list(loop.results)
    two = ir.VectorType.get((2,), i32())
    return [(four, vector.from_elements(two, results[2 * i : 2 * i + 2])) for i, four in enumerate(fours)]


def _halves(pair: list, selector: str) -> Any:
    """Of two words, those bytes in one."""
    return llvm.inline_asm(i32(), pair, f"prmt.b32 $0, $1, $2, {selector};", "=r,r,r")
