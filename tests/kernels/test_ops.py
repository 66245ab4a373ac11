"""Every implementation of the ops against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import latent_attention
from latent_attention import IMPLEMENTATIONS, merge

BATCH, HEADS, K, V = 2, 3, 12, 20
SCALE = 0.3
BLOCK = 128  # on a CPU: sizes below, at and above it take different paths


def oracle(q, k, v, *, offset=0, lengths=None, q_segments=None, kv_segments=None):
    """Attention in float64, a row at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (batch, queries, heads, _), keys = q.shape, k.shape[1]
    out, lse = np.zeros((batch, queries, heads, v.shape[-1])), np.full((batch, queries, heads), -np.inf)
    offset = np.broadcast_to(offset, batch)
    for b in range(batch):
        for t in range(queries):
            seen = np.arange(keys) <= offset[b] + t
            if lengths is not None:
                seen &= np.arange(keys) < lengths[b]
            if q_segments is not None and kv_segments is not None:
                seen &= kv_segments[b] == q_segments[b, t]
            if seen.any():
                scores = np.einsum("hk,shk->hs", q[b, t], k[b, seen]) * SCALE
                peak = scores.max(-1, keepdims=True)
                weights = np.exp(scores - peak)
                lse[b, t] = peak[:, 0] + np.log(weights.sum(-1))
                out[b, t] = np.einsum("hs,shv->hv", weights / weights.sum(-1, keepdims=True), v[b, seen])
    return out, lse


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
    "offsets below zero: rows that see nothing": (200, 130, {"offset": i32(-150, -500)}),
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


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("queries", "keys", "options"), CASES.values(), ids=CASES)
def test_attention_equals_float64(queries, keys, options, implementation):
    q, k, v = draw(queries, keys)
    for_oracle, for_op = arguments(queries, keys, options)
    expected_out, expected_lse = oracle(q, k, v, **for_oracle)
    if for_op["kv_lengths"] is not None:  # what is not held must not matter
        held = np.arange(keys)[None, :, None, None] < for_op["kv_lengths"][:, None, None, None]
        k, v = jnp.where(held, k, jnp.nan), jnp.where(held, v, jnp.nan)
    op = functools.partial(latent_attention.attention, scale=SCALE, implementation=implementation, return_lse=True)
    out, lse = jax.jit(op)(q, k, v, **for_op)
    np.testing.assert_allclose(out, expected_out, atol=3e-6)
    np.testing.assert_allclose(lse, expected_lse, atol=3e-6)


def test_a_query_that_sees_nothing_gives_zero():
    q, k, v = draw(200, 150)
    op = jax.jit(functools.partial(latent_attention.attention, scale=SCALE, q_offset=-20, return_lse=True))
    for held in (i32(0, 0), i32(0, 150)):
        out, lse = (np.asarray(x) for x in op(q, k, v, kv_lengths=held))
        assert np.all(out[0] == 0) and np.all(out[:, :20] == 0)
        assert np.all(np.isneginf(lse[0])) and np.all(np.isneginf(lse[:, :20]))
    assert np.all(np.isfinite(lse[1, 20:])) and np.all(out[1, 20:] != 0)


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
    """Of a function that weighs out and lse at random."""
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(*q.shape[:3], V)), rng.normal(size=q.shape[:3])

    def loss(q, k, v):
        out, lse = op(q, k, v, scale=SCALE, return_lse=True, **options)
        return jnp.sum(out * weights[0]) + jnp.sum(jnp.where(jnp.isneginf(lse), 0, lse) * weights[1])

    return jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)


@pytest.mark.parametrize(("queries", "keys", "options"), CASES.values(), ids=CASES)
def test_gradients_equal_those_jax_derives_from_the_reference(queries, keys, options):
    q, k, v = draw(queries, keys)
    _, options = arguments(queries, keys, options)
    ours = gradients(functools.partial(latent_attention.attention, implementation="xla"), q, k, v, options)
    expected = gradients(functools.partial(latent_attention.attention, implementation="reference"), q, k, v, options)
    for name, a, b in zip("qkv", ours, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=f"d{name}")


@pytest.mark.parametrize("length", [30, 160])
def test_gradients_equal_finite_differences(length):
    q, k, v = draw(length, length)
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


def test_memory_grows_with_the_length_not_with_its_square():
    def temporaries(length):
        q, k, v = (jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32) for _ in range(3))
        op = functools.partial(latent_attention.attention, scale=SCALE, implementation="xla", return_lse=True)
        grad = jax.jit(jax.grad(lambda *x: jnp.sum(op(*x)[0]), (0, 1, 2)))
        analysis = grad.lower(q, k, v).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    assert temporaries(4096) < 2.2 * temporaries(2048)


def draw_latents(queries, capacity, width=24, rope=8, dtype="float32"):
    rng = np.random.default_rng(3)
    batch = 4
    shapes = (batch, queries, HEADS, width + rope), (batch, capacity, width), (batch, capacity, rope)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("queries", "capacity"), [(1, 1), (1, 77), (3, 77), (1, 5000), (2, 4096), (5, 2049)])
def test_decode_equals_float64(queries, capacity, implementation):
    q, c, k_rope = draw_latents(queries, capacity)
    lengths = i32(0, queries, capacity // 2, capacity)
    held = np.arange(capacity)[None, :, None] < lengths[:, None, None]
    key = np.where(held, np.concatenate([c, k_rope], -1), 0)[:, :, None].repeat(HEADS, 2)
    expected = oracle(q, key, key[..., : c.shape[-1]], offset=lengths - queries, lengths=lengths)
    op = jax.jit(functools.partial(latent_attention.decode, scale=SCALE, implementation=implementation))
    out, lse = op(q, jnp.where(held, c, jnp.nan), jnp.where(held, k_rope, jnp.nan), lengths)
    np.testing.assert_allclose(out, expected[0], atol=5e-6)
    np.testing.assert_allclose(lse, expected[1], atol=5e-6)


def test_decode_treats_a_length_beyond_the_cache_as_all_of_it():
    q, c, k_rope = draw_latents(2, 40)
    ours, expected = (
        jax.jit(functools.partial(latent_attention.decode, scale=SCALE, implementation=name))(
            q, c, k_rope, jnp.full(4, 42)
        )
        for name in ("xla", "reference")
    )
    np.testing.assert_allclose(ours[0], expected[0], atol=3e-6)


def test_decode_in_bfloat16_differs_by_rounding_only():
    q, c, k_rope = draw_latents(2, 3000, dtype="bfloat16")
    lengths = jnp.array([3000, 17, 2, 0])
    op = jax.jit(functools.partial(latent_attention.decode, scale=SCALE), static_argnames="implementation")
    out, lse = op(q, c, k_rope, lengths, implementation="xla")
    expected = op(*(x.astype("float32") for x in (q, c, k_rope)), lengths, implementation="reference")
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(out.astype("float32"), expected[0], atol=2e-2)
    np.testing.assert_allclose(lse, expected[1], atol=1e-5)


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
