"""The Triton attention kernels in Triton's interpreter, on a CPU, launched by the JAX front end.

`test_triton_attention.py` runs this with TRITON_INTERPRET=1. No bfloat16: the interpreter computes garbage with it.
"""

import os
import sys
import types

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from kernels_gradients import attention_gradients_oracle, gradients_by_parts
from kernels_oracle import attention_oracle
from latent_attention.attention import triton, triton_kernels
from latent_attention.attention.triton import Tiling

assert os.environ.get("TRITON_INTERPRET") == "1", "run test_triton_attention.py"

SCALE = 0.3
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")


def triton_call(*arguments, kernel, out_shape, grid, name, num_warps, num_stages, compute_capability, **constants):
    """Emulates jax_triton.triton_call on a CPU; outputs are NaN before the kernel runs."""

    def run(*arrays):
        arrays = iter(arrays)
        given = [torch.from_numpy(np.array(next(arrays))) if isinstance(x, jax.Array) else float(x) for x in arguments]
        given = [int(x) if isinstance(old, int) else x for x, old in zip(given, arguments, strict=True)]
        outputs = [torch.full(x.shape, torch.nan, dtype=getattr(torch, x.dtype.name)) for x in out_shape]
        kernel[grid](*given, *outputs, **constants)
        return tuple(x.numpy() for x in outputs)

    return jax.pure_callback(run, tuple(out_shape), *(x for x in arguments if isinstance(x, jax.Array)))


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Blocks are small and of different sizes, so that short sequences have many."""
    small = {"forward": Tiling(32, 16, 1, 1), "d_q": Tiling(16, 32, 1, 1), "d_kv": Tiling(32, 16, 1, 1)}
    monkeypatch.setitem(sys.modules, "jax_triton", types.SimpleNamespace(triton_call=triton_call))
    monkeypatch.setattr(triton, "select_tiling", lambda kernel, width, gpu: small[kernel])


def segments(length, *borders):
    return np.stack([np.searchsorted(b, np.arange(length), side="right") for b in borders]).astype(np.int32)


def i32(*values):
    return np.array(values, np.int32)


def check(queries, keys, k_width, v_width, *, heads=1, dtype="float32", scale=SCALE, tolerance=1e-5, seed=0, **options):
    """Two rows: outputs and gradients, where what lies beyond the lengths is NaN."""
    rng = np.random.default_rng(seed)
    shapes = (2, queries, heads, k_width), (2, keys, heads, k_width), (2, keys, heads, v_width)
    q, k, v = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    lengths = options.get("lengths")
    offset = options.get("offset", 0)
    options["offset"] = np.asarray(offset, np.int64)  # the oracle adds to it
    if lengths is not None:
        valid = np.arange(keys)[None, :, None, None] < lengths[:, None, None, None]
        k, v = (jnp.where(valid, x, jnp.nan) for x in (k, v))

    @jax.jit
    def run(q, k, v, d_out, d_lse, offset, lengths, q_segments, kv_segments):
        def op(q, k, v):
            return triton.attention(
                q, k, v, scale=scale, q_offset=offset, kv_lengths=lengths, q_segments=q_segments,
                kv_segments=kv_segments,
            )  # fmt: skip

        (out, lse), vjp = jax.vjp(op, q, k, v)
        return out, lse, *vjp((d_out, d_lse))

    d_out, d_lse = jnp.asarray(rng.normal(size=(*shapes[0][:3], v_width)), dtype), rng.normal(size=shapes[0][:3])
    arrays = options.get("q_segments"), options.get("kv_segments")
    out, lse, *grads = run(
        q, k, v, d_out, jnp.asarray(d_lse, jnp.float32), offset, lengths, *arrays
    )  # fmt: skip
    assert (out.dtype, lse.dtype) == (dtype, jnp.float32)
    expected = attention_oracle(q, k, v, scale=scale, **options)
    np.testing.assert_allclose(out, expected[0], atol=tolerance)
    np.testing.assert_allclose(lse, expected[1], atol=1e-4)
    expected = attention_gradients_oracle(q, k, v, d_out, d_lse, scale=scale, **options)
    for name, ours, right in zip("qkv", grads, expected, strict=True):
        np.testing.assert_allclose(ours, right, atol=2 * tolerance, err_msg=f"d{name}")


CASES = {
    "one token": (1, 1, 16, 16, {}),
    "one block": (16, 16, 16, 16, {}),
    "ragged, widths that are no power of two": (45, 45, 12, 20, {"heads": 3}),
    "a width read as two tiles": (40, 40, 48, 32, {}),
    "192 and 128": (33, 33, 192, 128, {}),
    "lengths 0 and 1": (40, 40, 16, 16, {"lengths": i32(0, 1)}),
    "lengths of a chunk": (40, 70, 16, 16, {"offset": 30, "lengths": i32(70, 33)}),
    "lengths beyond the keys": (9, 30, 16, 16, {"offset": 30, "lengths": i32(99, 30)}),
    "offsets of each row": (40, 70, 24, 32, {"offset": i32(17, 50)}),
    "offset so large that adding overflows": (40, 50, 16, 16, {"offset": i32(2**31 - 1, 2**31 - 40)}),
    "offsets below zero: rows that see nothing": (50, 40, 16, 16, {"offset": i32(-35, -(2**31))}),
    "more queries than keys": (50, 20, 16, 16, {}),
    "segments": (80, 80, 16, 16, {"q_segments": segments(80, (30, 37, 64), (79,))}),
    "segments and lengths": (
        64, 64, 16, 16, {"heads": 2, "q_segments": segments(64, (16, 32), (5,)), "lengths": i32(20, 64)},
    ),
    "segments in any order": (64, 64, 16, 16, {"q_segments": np.random.default_rng(5).integers(0, 3, (2, 64))}),
    "no segment in common": (
        20, 20, 16, 16, {"q_segments": segments(20, (), ()), "kv_segments": segments(20, (0,), (0, 3))},
    ),
    "a scale below zero": (40, 40, 16, 16, {"scale": -SCALE}),
    "float16": (40, 40, 32, 32, {"dtype": "float16", "tolerance": 2e-2}),
}  # fmt: skip


@pytest.mark.parametrize(("queries", "keys", "k_width", "v_width", "options"), CASES.values(), ids=CASES)
def test_outputs_and_gradients_equal_float64(queries, keys, k_width, v_width, options):
    if "q_segments" in options:
        options = {"kv_segments": options["q_segments"], **options}
    check(queries, keys, k_width, v_width, **options)


@settings(max_examples=4)
@given(st.data())
def test_any_shape_and_mask(data):
    queries, keys = (data.draw(st.integers(1, 50)) for _ in range(2))
    options = {"seed": data.draw(st.integers(0, 99))}
    numbers = st.lists(st.integers(0, 3), min_size=2 * (queries + keys), max_size=2 * (queries + keys))
    if data.draw(st.booleans()):
        options["offset"] = i32(*(data.draw(st.integers(-60, 60)) for _ in range(2)))
    if data.draw(st.booleans()):
        options["lengths"] = i32(*(data.draw(st.integers(0, keys)) for _ in range(2)))
    if data.draw(st.booleans()):
        ids = i32(*data.draw(numbers)).reshape(2, -1)
        options |= {"q_segments": ids[:, :queries], "kv_segments": ids[:, queries:]}
    check(queries, keys, data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40)), **options)


@pytest.mark.parametrize("scale", [SCALE, -SCALE])
def test_gradients_of_parts_of_the_keys_add_up(scale):
    """Rows of the second part see nothing of it; the first row ends within the first part."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, n, 2, 16)), jnp.float32) for n in (50, 90, 90))
    ids = {"q_segments": segments(50, (20,), ()), "kv_segments": segments(90, (60,), ())}
    lengths = i32(33, 90)
    out, lse = attention_oracle(q, k, v, scale=scale, offset=40, lengths=lengths, **ids)
    d_out = rng.normal(size=out.shape)
    expected = attention_gradients_oracle(
        q, k, v, d_out, np.zeros(lse.shape), scale=scale, offset=40, lengths=lengths, **ids
    )  # fmt: skip
    arrays = q, k, v, *(jnp.asarray(x, jnp.float32) for x in (out, lse, d_out))
    ours = gradients_by_parts(
        triton.attention_gradients, 45, arrays, scale=scale, q_offset=40, kv_lengths=lengths, **ids
    )  # fmt: skip
    for name, x, right in zip("qkv", ours, expected, strict=True):
        np.testing.assert_allclose(x, right, atol=2e-5, err_msg=f"d{name}")


def test_a_gradient_into_rows_that_see_nothing_goes_nowhere():
    q = jnp.ones((1, 8, 1, 16))

    def op(q):
        return triton.attention(q, q, q, scale=1.0, q_offset=-4, kv_lengths=None, q_segments=None, kv_segments=None)

    (out, lse), vjp = jax.vjp(op, q)
    (grad,) = vjp((jnp.ones_like(out), jnp.full_like(lse, jnp.nan).at[:, 4:].set(1)))
    assert np.all(np.isfinite(grad))


def test_offsets_beyond_32_bits(monkeypatch):
    """Every array has more than 2^31 elements, of which the operating system gives only the pages in use."""
    heads, width, block = 1 << 15, 16, 32
    tokens = 2**31 // (heads * width) + block
    # The interpreter copies results back, here onto themselves: gigabytes.
    monkeypatch.setattr(sys.modules["triton.runtime.interpreter"].GridExecutor, "_restore_args_dev", lambda *_: None)
    arrays = [torch.empty((1, tokens, heads, width), dtype=torch.half) for _ in range(8)]
    q, k, v, out, d_out, d_q, d_k, d_v = arrays
    lse, delta = (torch.empty((1, heads, tokens)) for _ in range(2))
    rng = np.random.default_rng(0)
    last = [rng.normal(size=(1, block, 1, width)).astype(np.float16) for _ in range(4)]
    for x, values in zip((q, k, v, d_out), last, strict=True):
        x[:, -block:, :1] = torch.from_numpy(values)
    blocks = tokens // block
    # All programs but the last visit nothing, and that only its own block.
    ranges = torch.zeros((1, blocks, 4), dtype=torch.int32)
    ranges[:, -1] = torch.tensor([blocks - 1] * 3 + [blocks])
    zero, length = torch.zeros(1, dtype=torch.int32), torch.tensor([tokens], dtype=torch.int32)
    masks = zero, length, ranges, zero, zero
    constants = {
        **triton._widths(width, width), "HEADS": heads, "SEGMENTS": False, "Q_BLOCK": block,
        "KV_BLOCK": block,
    }  # fmt: skip
    log2e = np.log2(np.e)
    grid, numbers = (blocks, 1), (SCALE * log2e, tokens, tokens)
    triton_kernels.forward_kernel[grid](q, k, v, *masks, *numbers, out, lse, **constants)
    q_last, k_last, v_last, d_out_last = last
    expected_out, expected_lse = attention_oracle(q_last, k_last, v_last, scale=SCALE)
    np.testing.assert_allclose(out[:, -block:, :1], expected_out, atol=2e-3)
    np.testing.assert_allclose(lse[0, 0, -block:], expected_lse[0, :, 0], atol=1e-3)

    delta[0, 0, -block:] = torch.from_numpy(np.sum(d_out_last[0, :, 0] * expected_out[0, :, 0], -1))
    lse[0, 0] *= log2e
    rest = d_out, lse, delta, *masks, SCALE, *numbers
    triton_kernels.d_q_kernel[grid](q, k, v, *rest, d_q, **constants)
    triton_kernels.d_kv_kernel[grid](q, k, v, *rest, d_k, d_v, **constants)
    no_d_lse = np.zeros((1, block, 1))
    expected = attention_gradients_oracle(q_last, k_last, v_last, d_out_last, no_d_lse, scale=SCALE)
    for name, ours, right in zip("qkv", (d_q, d_k, d_v), expected, strict=True):
        np.testing.assert_allclose(ours[:, -block:, :1], right, atol=2e-2, err_msg=f"d{name}")


def test_a_remat_policy_keeps_the_residuals_and_spares_the_forward_kernel():
    def launches(policy):
        def loss(x):
            op = jax.checkpoint(
                lambda x: triton.attention(
                    x, x, x, scale=1.0, q_offset=0, kv_lengths=None, q_segments=None, kv_segments=None
                )[0],
                policy=policy,
            )
            return jnp.sum(op(x))

        return str(jax.make_jaxpr(jax.grad(loss))(jnp.ones((1, 8, 1, 16)))).count("pure_callback[")

    assert launches(jax.checkpoint_policies.nothing_saveable) == 4
    assert launches(jax.checkpoint_policies.save_only_these_names("latent_attention")) == 3
