"""Layouts of matrices in registers and in shared memory, against NumPy's matrix product."""

import ml_dtypes
import numpy as np
import pytest

from ptx.hand_written import execute, launch
from ptx.memory import DYNAMIC_SHARED

RNG = np.random.default_rng(0)
DTYPES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "s8": np.int8}
LANE, WARP = np.arange(128) % 32, np.arange(128) // 32


def draw(kind, *shape):
    """Small integers, of which all sums are exact."""
    return RNG.integers(-8, 9, shape).astype(DTYPES[kind])


@pytest.mark.parametrize("kind", DTYPES)
def test_a_product_of_a_warp(kind):
    """Fragments as the figures of mma.m16n8k16 and mma.m16n8k32 have them, written out here element by element."""
    k, width = (32, 4) if kind == "s8" else (16, 2)
    a, b, c = draw(kind, 4, 16, k), draw(kind, 4, k, 8), RNG.integers(-99, 99, (4, 16, 8))
    row, column = LANE // 4, width * (LANE % 4)
    fragments_a = np.stack(
        [
            np.stack([a[WARP, row + down, column + right + i] for i in range(width)], 1)
            for right in (0, k // 2)
            for down in (0, 8)
        ],
        1,
    )
    fragments_b = np.stack(
        [np.stack([b[WARP, column + down + i, LANE // 4] for i in range(width)], 1) for down in (0, k // 2)], 1
    )
    out_row, out_column = [LANE // 4 + down for down in (0, 0, 8, 8)], [2 * (LANE % 4) + i for i in (0, 1, 0, 1)]
    places = np.stack(out_row, 1), np.stack(out_column, 1)
    accumulator = np.int32 if kind == "s8" else np.float32
    fragments_c = c[WARP[:, None], *places].astype(accumulator)
    types = "s32.s8.s8.s32" if kind == "s8" else f"f32.{kind}.{kind}.f32"
    body = f"""mul.wide.u32 %rd20, %r0, 16; add.s64 %rd21, %rd1, %rd20; add.s64 %rd22, %rd2, %rd20;
        mul.wide.u32 %rd23, %r0, 8; add.s64 %rd23, %rd3, %rd23;
        ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%rd21]; ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%rd22];
        ld.global.v2.b32 {{%r5, %r6}}, [%rd23];
        mma.sync.aligned.m16n8k{k}.row.col.{types} {{%r10, %r11, %r12, %r13}}, {{%r1, %r2, %r3, %r4}}, {{%r5, %r6}},
            {{%r10, %r11, %r12, %r13}};
        st.global.v4.b32 [%rd21], {{%r10, %r11, %r12, %r13}};"""
    got = execute(body, fragments_c, np.ascontiguousarray(fragments_a), np.ascontiguousarray(fragments_b))
    expected = c + a.astype(int) @ b.astype(int)
    np.testing.assert_array_equal(got, expected[WARP[:, None], *places])


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_are_loaded_and_stored(transposed):
    """Each warp loads four matrices of 8 x 8; what threads hold, and what they store elsewhere."""
    tiles = RNG.integers(0, 2**16, (4, 4, 8, 8)).astype(np.uint16)  # warp, matrix, row, column
    trans = ".trans" if transposed else ""
    body = f"""mul.wide.u32 %rd20, %r0, 16; cvt.u32.u64 %r1, %rd20; add.s32 %r1, %r1, {DYNAMIC_SHARED};
        ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r2, %r3, %r4, %r5}}, [%r1]; add.s64 %rd21, %rd1, %rd20;
        st.global.v4.b32 [%rd21], {{%r2, %r3, %r4, %r5}}; add.s32 %r1, %r1, 4096;
        stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r1], {{%r2, %r3, %r4, %r5}};"""
    machine, memory = launch(body, np.zeros((128, 4), np.uint32))
    shared = machine.warpgroups[0].cta.shared[DYNAMIC_SHARED:]
    shared[: tiles.nbytes] = tiles.reshape(-1).view(np.uint8)
    machine.run()
    held = memory[: 128 * 16].view(np.uint16).reshape(4, 32, 4, 2)
    source = tiles.swapaxes(2, 3) if transposed else tiles
    lane = np.arange(32)
    for i in range(2):
        np.testing.assert_array_equal(held[..., i], source[:, :, lane // 4, 2 * (lane % 4) + i].swapaxes(1, 2))
    np.testing.assert_array_equal(shared[4096:][: tiles.nbytes], shared[: tiles.nbytes])


def to_shared(matrix, swizzle_bytes, transposed):
    """Bytes of [rows, k] as tiles of 8 x `swizzle_bytes` of whatever is not contiguous x contiguous, swizzled.

    Tiles follow each other along the contiguous axis first. Also the strides of a descriptor, leading and other.
    """
    lines = (matrix.T if transposed else matrix).copy().view(np.uint8)
    count, width = lines.shape
    tiles = lines.reshape(count // 8, 8, width // swizzle_bytes, swizzle_bytes // 16, 16).transpose(0, 2, 1, 3, 4)
    out = np.empty_like(tiles)
    for row in range(8):
        for unit in range(swizzle_bytes // 16):
            out[:, :, row, unit ^ row * swizzle_bytes // 128] = tiles[:, :, row, unit]
    return out.reshape(-1), 8 * swizzle_bytes, 8 * width


def held_by_threads(accumulator):
    """[threads, N / 2] of the accumulator [64, N] of a wgmma."""
    i = np.arange(accumulator.shape[1] // 2)
    row = (16 * WARP + LANE // 4)[:, None] + 8 * (i // 2 % 2)
    return accumulator[row, 8 * (i // 4) + 2 * (LANE % 4)[:, None] + i % 2]


@pytest.mark.parametrize("swizzle_bytes", [32, 64, 128])
@pytest.mark.parametrize("n", [16, 64, 256])
@pytest.mark.parametrize(
    ("kind", "transposed_a", "transposed_b"),
    [("s8", 0, 0), *((kind, a, b) for kind in ("bf16", "f16") for a in (0, 1) for b in (0, 1))],
)
def test_a_product_of_a_warpgroup(kind, transposed_a, transposed_b, n, swizzle_bytes):
    k = 32 if kind == "s8" else 16
    per_line = swizzle_bytes // np.dtype(DTYPES[kind]).itemsize
    n = max(n, per_line) if transposed_b else n
    # K-major, a line of the tile has several k: the product takes the second part of them.
    a, b = draw(kind, 64, max(per_line, k)), draw(kind, n, max(per_line, k))
    last = a.shape[1] - k
    accumulators, names = n // 2, [f"%r{100 + i}" for i in range(n // 2)]
    descriptors, shared = [], []
    for matrix, transposed, at in ((a, transposed_a, 1024), (b, transposed_b, 32 << 10)):
        raw, leading, stride = to_shared(matrix[:, last:] if transposed else matrix, swizzle_bytes, transposed)
        shared.append((at, raw))
        start = DYNAMIC_SHARED + at + (0 if transposed else last * matrix.itemsize)
        mode = {128: 1, 64: 2, 32: 3}[swizzle_bytes]
        descriptors.append(start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62)
    flags = ", 1, 1" + ("" if kind == "s8" else f", {transposed_a}, {transposed_b}")
    types = "s32.s8.s8" if kind == "s8" else f"f32.{kind}.{kind}"
    product = f"wgmma.mma_async.sync.aligned.m64n{n}k{k}.{types} {{{', '.join(names)}}}, %rd30, %rd31, %p1{flags};"
    body = f"""mov.b64 %rd30, {descriptors[0]}; mov.b64 %rd31, {descriptors[1]}; setp.ne.u32 %p1, %r0, %r0;
        {"".join(f"mov.u32 {name}, 7;" for name in names)} wgmma.fence.sync.aligned; {product}
        setp.eq.u32 %p1, %r0, %r0; {product} wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
        mul.wide.u32 %rd20, %r0, {4 * accumulators}; add.s64 %rd21, %rd1, %rd20;
        {"".join(f"st.global.b32 [%rd21+{4 * i}], {name};" for i, name in enumerate(names))}"""
    machine, memory = launch(body, np.zeros((128, accumulators), np.int32))
    for at, raw in shared:
        machine.warpgroups[0].cta.shared[DYNAMIC_SHARED + at :][: raw.size] = raw
    machine.run()
    got = memory[: 128 * 4 * accumulators].view(np.int32 if kind == "s8" else np.float32).reshape(128, -1)
    expected = 2 * (a[:, last:].astype(int) @ b[:, last:].astype(int).T)  # the first of the two products starts at 0
    np.testing.assert_array_equal(got, held_by_threads(expected))


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_a_product_of_a_warpgroup_with_registers(kind):
    """A in registers: each warp has 16 rows, as in mma.m16n8k16. B is transposed."""
    n, a, b = 64, draw(kind, 64, 16), draw(kind, 64, 16)
    places = [(16 * WARP + LANE // 4 + down, 2 * (LANE % 4) + right) for right in (0, 8) for down in (0, 8)]
    fragments = np.stack([np.stack([a[row, column + i] for i in range(2)], 1) for row, column in places], 1)
    names = [f"%r{100 + i}" for i in range(n // 2)]
    raw, leading, stride = to_shared(b, 128, True)
    descriptor = (DYNAMIC_SHARED + 1024) >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | 1 << 62
    body = f"""mul.wide.u32 %rd20, %r0, 16; add.s64 %rd21, %rd2, %rd20; mov.b64 %rd30, {descriptor};
        ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%rd21]; setp.ne.u32 %p1, %r0, %r0;
        {"".join(f"mov.u32 {name}, 7;" for name in names)} wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} {{{", ".join(names)}}}, {{%r1, %r2, %r3, %r4}}, %rd30,
            %p1, 1, 1, 1;
        wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
        mul.wide.u32 %rd20, %r0, {2 * n}; add.s64 %rd21, %rd1, %rd20;
        {"".join(f"st.global.b32 [%rd21+{4 * i}], {name};" for i, name in enumerate(names))}"""
    machine, memory = launch(body, np.zeros((128, n // 2), np.float32), np.ascontiguousarray(fragments))
    machine.warpgroups[0].cta.shared[DYNAMIC_SHARED + 1024 :][: raw.size] = raw
    machine.run()
    got = memory[: 128 * 2 * n].view(np.float32).reshape(128, -1)
    np.testing.assert_array_equal(got, held_by_threads(a.astype(int) @ b.astype(int).T))


@pytest.mark.parametrize(("statement", "before", "after"), [("", np.nan, 23), ("st.shared.b64 [%r5], 0;", np.nan, 7)])
def test_a_product_of_a_warpgroup_is_done_when_it_is_waited_for(statement, before, after):
    """The accumulator before and after the wait, of 7 + 16 if no thread clears B, all ones as A is, in between."""
    body = f"""mov.b64 %rd30, {1 << 62 | 64 << 32 | (DYNAMIC_SHARED + 4096) >> 4}; setp.eq.u32 %p1, %r0, %r0;
        mov.b64 %rd31, {1 << 62 | 64 << 32 | (DYNAMIC_SHARED + 1024) >> 4}; mov.u32 %r1, 0f40E00000; mov.u32 %r2, %r1;
        mov.u32 %r3, %r1; mov.u32 %r4, %r1; shl.b32 %r5, %r0, 3; add.s32 %r5, %r5, {DYNAMIC_SHARED + 1024};
        wgmma.fence.sync.aligned; wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16
            {{%r1, %r2, %r3, %r4}}, %rd30, %rd31, %p1, 1, 1, 0, 0;
        wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 1; st.global.b32 [%rd11], %r1; {statement}
        wgmma.wait_group.sync.aligned 0; st.global.b32 [%rd11+512], %r1;"""
    machine, memory = launch(body, np.zeros((2, 128), np.float32))
    machine.warpgroups[0].cta.shared.view(ml_dtypes.bfloat16)[:] = 1
    machine.run()
    np.testing.assert_array_equal(memory.view(np.float32)[:256].reshape(2, 128), [[before] * 128, [after] * 128])
