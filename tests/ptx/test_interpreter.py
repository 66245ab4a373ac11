"""Control flow, barriers, copies and errors of the interpreter, in kernels written by hand."""

import numpy as np
import pytest

from ptx.hand_written import execute, launch
from ptx.machine import DeadlockError
from ptx.memory import DYNAMIC_SHARED, GLOBAL, AccessError, MBarrier, swizzle
from ptx.parser import UnsupportedError

RNG = np.random.default_rng(0)


def test_threads_diverge_and_meet_again():
    """Each thread has its own number of turns; labels and registers of two blocks have the same names."""
    loop = """{ .reg .pred again; mov.u32 %r2, %r0;
        NEXT: add.s32 %r1, %r1, 1; setp.gt.s32 again, %r2, 0; sub.s32 %r2, %r2, 1; @again bra NEXT; }"""
    body = f"""mov.u32 %r1, 0; {loop} {loop} setp.lt.u32 %p1, %r0, 5; @%p1 add.s32 %r1, %r1, 1000;
        @!%p1 bra $END; add.s32 %r1, %r1, 500; $END: st.global.b32 [%rd11], %r1;"""
    thread = np.arange(128)
    np.testing.assert_array_equal(
        execute(body, np.zeros(128, np.int32)), 2 * (thread + 1) + np.where(thread < 5, 1500, 0)
    )


def test_a_table_of_branches():
    body = """T: .branchtargets $A, $B, $C; and.b32 %r1, %r0, 3; min.u32 %r1, %r1, 2; brx.idx %r1, T;
        $A: mov.u32 %r2, 10; bra $END; $B: mov.u32 %r2, 20; bra $END; $C: mov.u32 %r2, 30;
        $END: st.global.b32 [%rd11], %r2;"""
    assert execute(body, np.zeros(128, np.int32))[:8].tolist() == [10, 20, 30, 30] * 2


def test_shuffles_stay_in_a_warp():
    butterfly = "".join(
        f"shfl.sync.bfly.b32 %r2, %r1, {step}, 31, -1; add.s32 %r1, %r1, %r2;" for step in (16, 8, 4, 2, 1)
    )
    body = f"""mov.u32 %r1, %r0; {butterfly} shfl.sync.idx.b32 %r3, %r0, 5, 31, -1; shl.b32 %r3, %r3, 16;
        or.b32 %r1, %r1, %r3; st.global.b32 [%rd11], %r1;"""
    warps = np.arange(128).reshape(4, 32)
    expected = np.repeat(warps.sum(1) | warps[:, 5] << 16, 32)
    np.testing.assert_array_equal(execute(body, np.zeros(128, np.int32)), expected)


def test_a_shuffle_waits_for_the_whole_warp():
    body = """mov.u32 %r1, %r0; setp.lt.u32 %p1, %r0, 7; @!%p1 bra $AWAY;
        $MEET: shfl.sync.bfly.b32 %r2, %r1, 31, 31, -1; st.global.b32 [%rd11], %r2; bra $END;
        $AWAY: add.s32 %r1, %r1, 100; bra $MEET; $END:"""
    values = np.arange(128) + np.where(np.arange(128) < 7, 0, 100)
    expected = values.reshape(4, 32)[:, ::-1].reshape(-1)
    np.testing.assert_array_equal(execute(body, np.zeros(128, np.int32)), expected)


def test_one_thread_of_each_warp_is_elected_and_adds_atomically():
    body = """setp.ne.u32 %p1, %r0, %r0; setp.gt.u32 %p2, %r0, 3; @%p2 elect.sync %r1|%p1, -1;
        @%p1 red.relaxed.gpu.global.add.u32 [%rd1], %r0;"""
    assert execute(body, np.zeros(1, np.uint32), grid=(3, 2, 1))[0] == 6 * (4 + 32 + 64 + 96)


def test_a_barrier_of_two_warpgroups_orders_them_and_reduces():
    """Warpgroup 1 reads what warpgroup 0 has written, whichever runs first."""
    body = f"""shl.b32 %r1, %r0, 2; add.s32 %r1, %r1, {DYNAMIC_SHARED}; st.shared.b32 [%r1], %r0;
        bar.sync 3, 256; xor.b32 %r2, %r1, 512; ld.shared.b32 %r3, [%r2];
        setp.eq.u32 %p1, %r0, 77; bar.red.or.pred %p2, 1, 256, %p1; @%p2 add.s32 %r3, %r3, 1000;
        setp.gt.u32 %p1, %r0, 255; bar.red.or.pred %p2, 1, 256, %p1; @%p2 mov.u32 %r3, 0;
        st.global.b32 [%rd11], %r3;"""
    for seed in range(4):
        machine, memory = launch(body, np.zeros(256, np.int32), block=256)
        machine.run(seed)
        np.testing.assert_array_equal(memory.view(np.int32)[:256], (np.arange(256) ^ 128) + 1000)


PHASES = f"""setp.eq.u32 %p1, %r0, 0; mov.u32 %r20, {DYNAMIC_SHARED + 8}; mov.u32 %r21, {DYNAMIC_SHARED + 1024};
    @%p1 mbarrier.init.shared.b64 [%r20], 1; bar.sync 0; mov.u32 %r5, 0; mov.u32 %r6, 0;
    $NEXT: mul.wide.u32 %rd20, %r5, 512; add.s64 %rd21, %rd2, %rd20;
    @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r20], 512;
    @%p1 cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r21], [%rd21], 512, [%r20];
    and.b32 %r7, %r5, 1;
    {{ .reg .pred done; WAIT: mbarrier.try_wait.parity.shared.b64 done, [%r20], %r7; @!done bra WAIT; }}
    shl.b32 %r8, %r0, 2; and.b32 %r8, %r8, 511; add.s32 %r8, %r8, %r21; ld.shared.b32 %r9, [%r8];
    add.s32 %r6, %r6, %r9; bar.sync 0; add.s32 %r5, %r5, 1; setp.lt.u32 %p2, %r5, TURNS; @%p2 bra $NEXT;
    st.global.b32 [%rd11], %r6;"""


@pytest.mark.parametrize("seed", range(3))
def test_copies_complete_one_phase_of_an_mbarrier_after_the_other(seed):
    source = RNG.integers(0, 1000, (5, 128)).astype(np.int32)
    machine, memory = launch(PHASES.replace("TURNS", "5"), np.zeros(256, np.int32), source, block=256)
    machine.run(seed)
    np.testing.assert_array_equal(memory.view(np.int32)[:256], np.tile(source.sum(0), 2))


def test_a_copy_arrives_after_it_was_issued():
    """Without the wait, the first turn reads what was in shared memory before."""
    source = RNG.integers(0, 1000, (1, 128)).astype(np.int32)
    body = PHASES.replace("TURNS", "1").replace("@!done bra WAIT;", "")
    assert execute(body, np.zeros(128, np.int32), source).tolist() == [-1] * 128


def test_a_phase_ends_with_its_last_arrival_and_byte():
    barrier = MBarrier(2)
    assert barrier.has_completed(1) and not barrier.has_completed(0)
    barrier.arrive(1, expected_bytes=64)
    barrier.arrive(1)
    barrier.arrive(copied_bytes=48)
    assert not barrier.has_completed(0)
    barrier.arrive(copied_bytes=16)
    assert barrier.has_completed(0) and not barrier.has_completed(1)
    barrier.arrive(copied_bytes=16)  # ahead of who expects them
    barrier.arrive(2)
    assert not barrier.has_completed(1)
    barrier.arrive(expected_bytes=16)
    assert barrier.has_completed(1)


def test_a_deadlock_names_who_waits_and_where():
    body = f"""setp.eq.u32 %p1, %r0, 0; mov.u32 %r1, {DYNAMIC_SHARED}; @%p1 mbarrier.init.shared.b64 [%r1], 2;
        bar.sync 0; setp.lt.u32 %p2, %r0, 128; @%p2 ret; @%p1 mbarrier.arrive.shared.b64 _, [%r1], 1;
        {{ .reg .pred done; WAIT: mbarrier.try_wait.parity.shared.b64 done, [%r1], 0; @!done bra WAIT; }} bar.sync 1;"""
    machine, _ = launch(body, np.zeros(1, np.int32), block=384, grid=(2, 1, 1))
    with pytest.raises(DeadlockError) as raised:
        machine.run()
    lines = str(raised.value).splitlines()[1:]
    assert [line.split(":")[0] for line in lines] == [f"CTA ({i}, 0, 0), warpgroup {j}" for i in (0, 1) for j in (1, 2)]
    assert all("128 threads at `mbarrier.try_wait" in line for line in lines)
    body = "setp.lt.u32 %p1, %r0, 64; @%p1 bra $END; bar.sync 2, 128; $END:"
    with pytest.raises(DeadlockError, match="warpgroup 0: 64 threads at `bar.sync 2, 128`"):
        execute(body, np.zeros(1, np.int32))


@pytest.mark.parametrize(
    ("statement", "error", "message"),
    [
        (
            "ld.global.b32 %r1, [%rd1+1024];",
            AccessError,
            "out of bounds: 4 bytes.*CTA .*warpgroup 0: 128 threads at `ld",
        ),
        ("ld.global.b32 %r1, [%rd1+2];", AccessError, "not aligned to 4 bytes"),
        ("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1+8];", AccessError, "not aligned to 16 bytes"),
        ("mov.u32 %r1, 1024; mbarrier.arrive.shared.b64 _, [%r1], 1;", AccessError, "no mbarrier.*0x400"),
        (
            "mov.u32 %r1, 1024; setp.eq.u32 %p1, %r0, 0; @%p1 mbarrier.init.shared.b64 [%r1], 2;"
            "mbarrier.arrive.shared.b64 _, [%r1], 3;",
            AccessError,
            "of 2 arrivals has one too many",
        ),
        ("popc.b32 %r1, %r2;", UnsupportedError, "popc.b32 %r1, %r2"),
        ("add.sat.s32 %r1, %r2, %r3;", UnsupportedError, "add.sat.s32 .*: sat"),
        ("atom.global.add.u32 %r1, [%rd1], 1;", UnsupportedError, "atom.global.add.u32"),
        ("ld.weak.global.b32 %r1, [%rd1];", UnsupportedError, "weak"),
        ("mov.u32 %r1, %clock;", UnsupportedError, "%clock"),
        ("setp.lt.u32 %p1, %r0, 9; @%p1 shfl.sync.bfly.b32 %r2, %r0, 1, 31, -1;", UnsupportedError, "a part of one"),
    ],
)
def test_what_is_wrong_or_unknown_is_named(statement, error, message):
    with pytest.raises(error, match=message):
        execute(statement, np.zeros(256, np.int32))


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_a_tensor_copy_swizzles_and_fills_with_zeros(mode):
    """A box of [8, 64 bytes or so] at row 4, column -2: rows 4 to 11 of 10, the first two columns outside."""
    width = {0: 32, 1: 32, 2: 64, 3: 128}[mode]
    columns, tensor = width // 2, RNG.integers(1, 2**16, (10, 96)).astype(np.uint16)
    words = [np.array([GLOBAL + 2048, 96, 10, 0, 0, 0, 192, 0, 0, 0], np.uint64).view(np.uint8)]
    words.append(np.array([columns, 8, 0, 0, 0, 2, 1, mode], np.uint32).view(np.uint8))
    raw = np.concatenate(words).tobytes().ljust(128, b"\0")
    body = f"""mov.u32 %r1, {DYNAMIC_SHARED + 1024}; mov.u32 %r2, {DYNAMIC_SHARED}; setp.eq.u32 %p1, %r0, 0;
        @%p1 mbarrier.init.shared.b64 [%r2], 1; mov.b64 %rd30, p2; cvta.param.u64 %rd31, %rd30; mov.u32 %r3, -2;
        @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r2], {8 * width};
        @%p1 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes
            [%r1], [%rd31, {{%r3, 4}}], [%r2];
        {{ .reg .pred done; WAIT: mbarrier.try_wait.parity.shared.b64 done, [%r2], 0; @!done bra WAIT; }}"""
    machine, _ = launch(body, np.zeros(512, np.int32), tensor, params=[raw])
    machine.run()
    got = machine.warpgroups[0].cta.shared[DYNAMIC_SHARED + 1024 :][: 8 * width].reshape(8, -1, 16)
    expected = np.zeros((8, columns), np.uint16)
    expected[:6, 2:] = tensor[4:, : columns - 2]
    expected = expected.view(np.uint8).reshape(8, -1, 16)
    for row in range(8):
        for unit in range(width // 16):
            # The ISA's figures: units of a row are XORed with the row's number in an atom of 8 x 128 bytes.
            moved = unit ^ {0: 0, 1: row // 4 % 2, 2: row // 2 % 4, 3: row}[mode]
            np.testing.assert_array_equal(got[row, moved], expected[row, unit])


def test_swizzles_are_permutations():
    addresses = np.arange(4096)
    for width in (32, 64, 128):
        np.testing.assert_array_equal(np.sort(swizzle(addresses, width)), addresses)
