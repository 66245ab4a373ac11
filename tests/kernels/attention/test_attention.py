"""Every implementation of attention that runs on a CPU against float64."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import latent_attention
from kernels_gradients import attention_gradients_oracle, gradients_by_parts
from kernels_oracle import attention_oracle
from latent_attention import merge

BATCH, HEADS, K, V = 2, 3, 12, 20
SCALE = 0.3
BLOCK = 128  # on a CPU: sizes below, at and above it take different paths


oracle = functools.partial(attention_oracle, scale=SCALE)


def draw(queries, keys, dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = (BATCH, queries, HEADS, K), (BATCH, keys, HEADS, K), (BATCH, keys, HEADS, V)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def segments(length, borders):
    return np.stack([np.searchsorted(b, np.arange(length), side="right") for b in borders]).astype(np.int32)


def i32(*values):
    return np.array(values, np.int32)


CASES = {
    "one token": (1, 1, {}),
    "one block": (40, 40, {}),
    "exactly one block": (BLOCK, BLOCK, {}),
    "whole blocks": (2 * BLOCK, 2 * BLOCK, {}),
    "ragged blocks": (BLOCK + 70, BLOCK + 70, {}),
    "lengths 0 and 1": (200, 200, {"lengths": i32(0, 1)}),
    "lengths of a chunk": (150, 300, {"offset": 150, "lengths": i32(300, 171)}),
    "lengths beyond the keys": (9, 30, {"offset": 30, "lengths": i32(99, 30)}),
    "offsets of each row": (140, 280, {"offset": i32(17, 140)}),
    "offset so large that adding overflows": (140, 150, {"offset": 2**31 - 1}),
    "offsets below zero: rows that see nothing": (200, 130, {"offset": i32(-150, -(2**31))}),
    "segments": (40, 40, {"segments": [(10, 30), (25,)]}),
    "segments over blocks": (300, 300, {"segments": [(100, 130, 260), (299,)]}),
    "no segment in common": (20, 20, {"q_segments": segments(20, [(), ()]), "kv_segments": segments(20, [(), (0,)])}),
}


def arguments(queries, keys, options):
    """(oracle's arguments, the op's arguments)"""
    options = dict(options)
    if "segments" in options:
        options["q_segments"] = options["kv_segments"] = segments(keys, options.pop("segments"))
    op = {"q_offset": options.get("offset", 0), "kv_lengths": options.get("lengths")}
    return options, op | {name: options.get(name) for name in ("q_segments", "kv_segments")}


def results(op, q, k, v, d_out, d_lse, options):
    """Out, lse, dq, dk, dv."""

    @jax.jit
    def run(q, k, v, d_out, d_lse, options):
        op_with_lse = functools.partial(op, scale=SCALE, return_lse=True, **options)
        (out, lse), vjp = jax.vjp(op_with_lse, q, k, v)
        return out, lse, *vjp((d_out, jnp.where(lse == -jnp.inf, 0, d_lse)))

    # A static offset is another program than a traced one.
    static = {n: x for n, x in options.items() if isinstance(x, int)}
    op = functools.partial(op, **static)
    return run(q, k, v, d_out, d_lse, {n: x for n, x in options.items() if n not in static})


@pytest.mark.parametrize(("queries", "keys", "options"), CASES.values(), ids=CASES)
def test_outputs_and_gradients_equal_float64(queries, keys, options):
    q, k, v = draw(queries, keys)
    for_oracle, for_op = arguments(queries, keys, options)
    rng = np.random.default_rng(1)
    d_out, d_lse = (rng.normal(size=(*q.shape[:3], *rest)) for rest in ((V,), ()))
    expected = oracle(q, k, v, **for_oracle)
    expected += attention_gradients_oracle(q, k, v, d_out, d_lse, scale=SCALE, **for_oracle)
    if for_op["kv_lengths"] is not None:  # entries beyond the length must not matter
        valid = np.arange(keys)[None, :, None, None] < for_op["kv_lengths"][:, None, None, None]
        k, v = jnp.where(valid, k, jnp.nan), jnp.where(valid, v, jnp.nan)
    op = functools.partial(latent_attention.attention, implementation="xla")
    ours = results(op, q, k, v, jnp.asarray(d_out, jnp.float32), jnp.asarray(d_lse, jnp.float32), for_op)
    for name, x, right in zip(("out", "lse", "dq", "dk", "dv"), ours, expected, strict=True):
        np.testing.assert_allclose(x, right, atol=3e-6 if name in ("out", "lse") else 1e-5, err_msg=name)


@pytest.mark.parametrize(("queries", "keys", "options"), CASES.values(), ids=CASES)
def test_the_reference_equals_float64(queries, keys, options):
    q, k, v = draw(queries, keys)
    for_oracle, for_op = arguments(queries, keys, options)
    expected = oracle(q, k, v, **for_oracle)
    if for_op["kv_lengths"] is not None:
        valid = np.arange(keys)[None, :, None, None] < for_op["kv_lengths"][:, None, None, None]
        k, v = jnp.where(valid, k, jnp.nan), jnp.where(valid, v, jnp.nan)
    op = functools.partial(latent_attention.attention, scale=SCALE, implementation="reference", return_lse=True)
    for x, right in zip(jax.jit(op)(q, k, v, **for_op), expected, strict=True):
        np.testing.assert_allclose(x, right, atol=3e-6)


def test_a_query_that_sees_nothing_gives_zero():
    q, k, v = draw(200, 150)
    op = jax.jit(functools.partial(latent_attention.attention, scale=SCALE, q_offset=-20, return_lse=True))
    for lengths in (i32(0, 0), i32(0, 150)):
        out, lse = (np.asarray(x) for x in op(q, k, v, kv_lengths=lengths))
        assert np.all(out[0] == 0) and np.all(out[:, :20] == 0)
        assert np.all(np.isneginf(lse[0])) and np.all(np.isneginf(lse[:, :20]))
    assert np.all(np.isfinite(lse[1, 20:])) and np.all(out[1, 20:] != 0)


PARTED = "ragged blocks", "lengths of a chunk", "offsets below zero: rows that see nothing", "segments over blocks"


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("name", PARTED)
def test_gradients_of_parts_of_the_keys_add_up(name, implementation):
    queries, keys, options = CASES[name]
    q, k, v = draw(queries, keys)
    for_oracle, for_op = arguments(queries, keys, options)
    for_op["q_offset"] = np.asarray(for_op["q_offset"], np.int64).clip(-(2**30))  # so that 77 can be taken off
    out, lse = oracle(q, k, v, **for_oracle)
    d_out = np.random.default_rng(1).normal(size=out.shape)
    expected = attention_gradients_oracle(q, k, v, d_out, np.zeros(lse.shape), scale=SCALE, **for_oracle)
    if for_op["kv_lengths"] is not None:  # entries beyond the length must not matter
        valid = np.arange(keys)[None, :, None, None] < for_op["kv_lengths"][:, None, None, None]
        k, v = jnp.where(valid, k, jnp.nan), jnp.where(valid, v, jnp.nan)
    op = functools.partial(latent_attention.attention_gradients, implementation=implementation)
    arrays = q, k, v, *(jnp.asarray(x, jnp.float32) for x in (out, lse, d_out))
    ours = gradients_by_parts(op, 77, arrays, scale=SCALE, **for_op)
    for gradient, x, right in zip(("dq", "dk", "dv"), ours, expected, strict=True):
        np.testing.assert_allclose(x, right, atol=1e-5, err_msg=gradient)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2e-2), ("float16", 3e-3)])
@pytest.mark.parametrize("length", [50, 200])
def test_attention_in_16_bits_differs_by_rounding_only(length, dtype, tolerance):
    q, k, v = draw(length, length, dtype)
    out, lse = jax.jit(functools.partial(latent_attention.attention, scale=SCALE, return_lse=True))(q, k, v)
    assert (out.dtype, lse.dtype) == (dtype, jnp.float32)
    expected_out, expected_lse = oracle(q, k, v)
    np.testing.assert_allclose(out.astype("float32"), expected_out, atol=tolerance)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-5)


def gradients(op, q, k, v, options):
    """Gradients of a random linear function of out and lse."""
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(*q.shape[:3], V)), rng.normal(size=q.shape[:3])

    def loss(q, k, v):
        out, lse = op(q, k, v, scale=SCALE, return_lse=True, **options)
        return jnp.sum(out * weights[0]) + jnp.sum(jnp.where(jnp.isneginf(lse), 0, lse) * weights[1])

    return jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)


@pytest.mark.parametrize("name", ["one block", "lengths of a chunk", "segments over blocks"])
def test_gradients_equal_those_jax_derives_from_the_reference(name):
    queries, keys, options = CASES[name]
    q, k, v = draw(queries, keys)
    _, options = arguments(queries, keys, options)
    ours = gradients(functools.partial(latent_attention.attention, implementation="xla"), q, k, v, options)
    expected = gradients(functools.partial(latent_attention.attention, implementation="reference"), q, k, v, options)
    for name, a, b in zip("qkv", ours, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=f"d{name}")


def test_gradients_equal_finite_differences():
    q, k, v = draw(30, 30)
    # Along one random direction, in float64: float32 differences would drown in rounding.
    rng = np.random.default_rng(2)
    weights, *steps = (rng.normal(size=x.shape) for x in (v, q, k, v))
    sizes = [1e-6 * step for step in steps]

    def loss(sign):
        moved = (np.asarray(x, np.float64) + sign * size for x, size in zip((q, k, v), sizes, strict=True))
        return np.sum(oracle(*moved)[0] * weights)

    def ours(q, k, v):
        return jnp.sum(latent_attention.attention(q, k, v, scale=SCALE, implementation="xla") * weights)

    grads = jax.jit(jax.grad(ours, (0, 1, 2)))(q, k, v)
    slope = sum(np.sum(np.asarray(g, np.float64) * step) for g, step in zip(grads, steps, strict=True))
    np.testing.assert_allclose(slope, (loss(1) - loss(-1)) / 2e-6, rtol=1e-4)


def test_gradients_in_bfloat16_differ_by_rounding_only():
    q, k, v = draw(200, 200, "bfloat16")
    op = functools.partial(latent_attention.attention, implementation="xla")
    full = gradients(op, *(x.astype("float32") for x in (q, k, v)), options={})
    for ours, expected in zip(gradients(op, q, k, v, {}), full, strict=True):
        assert ours.dtype == jnp.bfloat16
        error = jnp.linalg.norm(ours.astype("float32") - expected) / jnp.linalg.norm(expected)
        assert error < 0.02


@pytest.mark.parametrize("length", [30, 160])
def test_a_gradient_into_rows_that_see_nothing_goes_nowhere(length):
    q, k, v = draw(length, length)
    op = functools.partial(latent_attention.attention, scale=SCALE, q_offset=-4, implementation="xla", return_lse=True)

    @jax.jit
    def grads(q, k, v):
        (out, lse), vjp = jax.vjp(op, q, k, v)
        return vjp((jnp.ones_like(out), jnp.ones_like(lse).at[:, :4].set(jnp.nan)))

    assert all(np.all(np.isfinite(x)) and np.any(x) for x in grads(q, k, v))


def test_a_million_tokens_overflow_no_index():
    """Arrays of more than 2^32 elements: XLA indexes by axis, and no integer of the program is as large as 2^31."""
    tokens, heads = 1 << 20, 32
    q, k, v = (jax.ShapeDtypeStruct((1, tokens, heads, width), jnp.bfloat16) for width in (192, 192, 128))
    ids, length = jax.ShapeDtypeStruct((1, tokens), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    op = functools.partial(latent_attention.attention, scale=SCALE, implementation="xla")

    def loss(q, k, v, ids, length):
        return jnp.sum(jnp.asarray(op(q, k, v, kv_lengths=length, q_segments=ids, kv_segments=ids), jnp.float32))

    text = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, v, ids, length).lower(lowering_platforms=("cuda",)).as_text()
    numbers = [int(x) for x in re.findall(r"dense<(-?\d+)> : tensor<i32>", text)]
    numbers = [x for x in numbers if x != -(2**31)]  # what a maximum starts from
    assert max(numbers) <= tokens and min(numbers) >= -tokens
    assert f"tensor<1x{heads}x{tokens}x192xf32>" in text  # the program is that of the blocks


def test_memory_grows_with_the_length_not_with_its_square():
    def temporaries(length):
        q, k, v = (jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32) for _ in range(3))
        op = functools.partial(latent_attention.attention, scale=SCALE, implementation="xla", return_lse=True)
        grad = jax.jit(jax.grad(lambda *x: jnp.sum(op(*x)[0]), (0, 1, 2)))
        analysis = grad.lower(q, k, v).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    assert temporaries(4096) < 2.2 * temporaries(2048)


@pytest.mark.parametrize("border", [1, 33, 59])
def test_merge_of_two_sets_of_keys_is_attention_over_both(border):
    q, k, v = draw(60, 60)
    op = functools.partial(latent_attention.attention, scale=SCALE, return_lse=True)

    @jax.jit
    def in_two(q, k, v):
        first = op(q, k[:, :border], v[:, :border])
        return merge(*first, *op(q, k[:, border:], v[:, border:], q_offset=-border))

    out, lse = in_two(q, k, v)
    expected_out, expected_lse = oracle(q, k, v)
    np.testing.assert_allclose(out, expected_out, atol=3e-6)
    np.testing.assert_allclose(lse, expected_lse, atol=3e-6)


def test_merge_of_nothing_with_nothing_is_nothing():
    out, lse = merge(jnp.zeros((2, 3)), jnp.full(2, -jnp.inf), jnp.zeros((2, 3)), jnp.full(2, -jnp.inf))
    assert np.all(out == 0) and np.all(np.isneginf(lse))
