"""Instructions on registers, in each of 128 threads, against NumPy and Python's integers."""

import ml_dtypes
import numpy as np
import pytest

from ptx.hand_written import execute

RNG = np.random.default_rng(0)
INTEGERS = np.array([0, 1, -1, 2, 31, 32, 33, -(2**31), 2**31 - 1, *RNG.integers(-(2**31), 2**31, 119)], np.int32)
FLOATS = np.array(
    [0, 1, -1.5, np.nan, np.inf, -np.inf, 1 + 2**-8, 1 + 3 * 2**-8, 2.5, 3.5, -0.5, *RNG.normal(size=117) * 100],
    np.float32,
)


def apply(opcode, *inputs):
    """One instruction of 32-bit operands, in each of 128 threads."""
    loads = "".join(f"ld.global.b32 %r{i + 1}, [%rd{i + 12}];" for i in range(len(inputs)))
    operands = ", ".join(f"%r{i + 1}" for i in range(len(inputs)))
    body = f"{loads} {opcode} %r9, {operands}; st.global.b32 [%rd11], %r9;"
    return execute(body, np.zeros(128, inputs[0].dtype), *inputs)


def wrapped(function, unsigned=False):
    """A function of Python's integers, modulo 2^32."""

    def apply(*inputs):
        inputs = [x.view(np.uint32) if unsigned else x for x in inputs]
        return np.array([function(*map(int, each)) % 2**32 for each in zip(*inputs, strict=True)], np.uint32)

    return apply


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("add.s32", wrapped(lambda x, y: x + y)),
        ("sub.s32", wrapped(lambda x, y: x - y)),
        ("mul.lo.s32", wrapped(lambda x, y: x * y)),
        ("mul.hi.s32", wrapped(lambda x, y: x * y >> 32)),
        ("mul.hi.u32", wrapped(lambda x, y: x * y >> 32, unsigned=True)),
        ("min.s32", wrapped(min)),
        ("min.relu.s32", wrapped(lambda x, y: max(min(x, y), 0))),
        ("max.u32", wrapped(max, unsigned=True)),
        ("and.b32", wrapped(lambda x, y: x & y)),
        ("xor.b32", wrapped(lambda x, y: x ^ y)),
        ("shl.b32", wrapped(lambda x, y: x << min(y, 32), unsigned=True)),
        ("shr.u32", wrapped(lambda x, y: x >> min(y, 32), unsigned=True)),
        ("shr.s32", wrapped(lambda x, y: x >> min(y % 2**32, 32))),
    ],
)
def test_integers_are_as_in_python(opcode, expected):
    others = RNG.permutation(INTEGERS)
    others[:40] = np.arange(40)  # and shifts below and above the width
    np.testing.assert_array_equal(apply(opcode, INTEGERS, others).view(np.uint32), expected(INTEGERS, others))


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("add.rn.f32", np.add),
        ("mul.f32", np.multiply),
        ("div.full.f32", np.divide),
        ("max.f32", np.fmax),
        ("max.NaN.f32", np.maximum),
        ("min.NaN.f32", np.minimum),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_floats_are_as_in_numpy(opcode, expected):
    others = RNG.permutation(FLOATS)
    np.testing.assert_array_equal(apply(opcode, FLOATS, others), expected(FLOATS, others))


def test_fma_rounds_once():
    x = np.full(128, 1 + 2**-12, np.float32)
    np.testing.assert_array_equal(apply("fma.rn.f32", x, x, np.float32(-1) * x), np.float32(2**-12 + 2**-24))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("kind", "dtype"), [("bf16", ml_dtypes.bfloat16), ("f16", np.float16)])
def test_two_floats_are_packed_with_the_first_on_top(kind, dtype):
    others = RNG.permutation(FLOATS)
    packed = apply(f"cvt.rn.{kind}x2.f32", FLOATS, others).view(dtype).reshape(-1, 2).astype(np.float32)
    np.testing.assert_array_equal(packed, np.stack([others, FLOATS], 1).astype(dtype).astype(np.float32))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_floats_become_integers():
    finite = np.clip(np.nan_to_num(FLOATS), -(2.0**31), 2.0**31 - 129)
    np.testing.assert_array_equal(apply("cvt.rni.f32.f32", FLOATS), np.rint(FLOATS))
    np.testing.assert_array_equal(apply("cvt.rzi.s32.f32", finite).view(np.int32), np.trunc(finite).astype(np.int32))
    edges = np.resize(np.array([np.nan, np.inf, -np.inf, 3e9, 1.9], np.float32), 128)
    expected = np.resize(np.array([0, 2**31 - 1, -(2**31), 2**31 - 1, 1], np.int32), 128)
    np.testing.assert_array_equal(apply("cvt.rzi.s32.f32", edges).view(np.int32), expected)


def test_bytes_are_extended_by_their_sign_and_permuted():
    np.testing.assert_array_equal(apply("cvt.s8.s32", INTEGERS), INTEGERS.astype(np.int8).astype(np.int32))
    body = "ld.global.s8 %r1, [%rd12]; st.global.b32 [%rd11], %r1;"
    np.testing.assert_array_equal(execute(body, np.zeros(128, np.int32), INTEGERS), INTEGERS.astype(np.int8))
    fields = apply("bfe.s32", INTEGERS, np.full(128, 4, np.int32), np.full(128, 8, np.int32))
    np.testing.assert_array_equal(fields, (INTEGERS >> 4).astype(np.int8).astype(np.int32))
    # Bytes 6 (of b), 0 (of a), the sign of byte 3, and byte 3.
    picked = apply("prmt.b32", INTEGERS, INTEGERS[::-1].copy(), np.full(128, 0x3B06, np.int32)).view(np.uint8)
    a, b = INTEGERS.view(np.uint8).reshape(-1, 4), INTEGERS[::-1].copy().view(np.uint8).reshape(-1, 4)
    expected = np.stack([b[:, 2], a[:, 0], np.where(a[:, 3] > 127, 255, 0), a[:, 3]], 1)
    np.testing.assert_array_equal(picked.reshape(-1, 4), expected)


def test_halves_of_a_register_are_separate():
    body = (
        "ld.global.b32 %r1, [%rd12]; mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r2, {%rs2, %rs1}; st.global.b32 [%rd11], %r2;"
    )
    x = INTEGERS.view(np.uint32)
    np.testing.assert_array_equal(execute(body, np.zeros_like(x), x), x >> 16 | x << 16)


def test_comparisons_of_nan():
    body = """ld.global.b32 %r1, [%rd12]; setp.lt.f32 %p1, %r1, 0f00000000; setp.ltu.f32 %p2, %r1, 0f00000000;
        selp.b32 %r2, 1, 0, %p1; selp.b32 %r3, 2, 0, %p2; or.b32 %r4, %r2, %r3; st.global.b32 [%rd11], %r4;"""
    expected = np.where(np.isnan(FLOATS), 2, np.where(FLOATS < 0, 3, 0))
    np.testing.assert_array_equal(execute(body, np.zeros(128, np.uint32), FLOATS), expected)
