"""Every implementation of attention that runs on this GPU, forward and backward, against float64 or the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import latent_attention
from kernels_gradients import gradients_by_parts
from kernels_oracle import attention_oracle
from latent_attention import IMPLEMENTATIONS, resolve
from latent_attention.call_shapes import AttentionShape
from latent_attention.gpu import local_gpu
from tools.bench import float64

EACH = pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS["attention"] if name != "reference"])
SCALE = 0.1
# Relative errors of results whose scores, probabilities and gradients of scores are rounded to these types.
TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3}


def i32(*values):
    return np.array(values, np.int32)


def segments(length, *borders):
    """Two rows of segments that end at the borders."""
    return np.stack([np.searchsorted(b, np.arange(length), side="right") for b in borders]).astype(np.int32)


# (queries, keys, heads, K, V, type, keywords); two rows
CASES = {
    "one token": (1, 1, 2, 128, 128, "bfloat16", {}),
    "ragged": (333, 333, 4, 128, 128, "bfloat16", {}),
    "ragged, 192/128": (333, 333, 3, 192, 128, "bfloat16", {}),
    "ragged, 96/64": (333, 333, 3, 96, 64, "bfloat16", {}),
    "whole blocks, 64/64": (1024, 1024, 2, 64, 64, "float16", {}),
    "whole blocks, 192/128": (512, 512, 2, 192, 128, "float16", {}),
    "lengths": (512, 512, 2, 128, 128, "bfloat16", {"kv_lengths": i32(1, 389)}),
    "segments": (700, 700, 2, 128, 128, "bfloat16", {"segments": [(100, 130, 600), (256, 699)]}),
    "segments, 192/128": (300, 300, 2, 192, 128, "float16", {"segments": [(1, 64), (299,)]}),
    "a chunk against a cache that is seen in full": (128, 600, 2, 128, 128, "bfloat16", {"q_offset": 600}),
    "a chunk against itself and a cache": (200, 712, 2, 128, 128, "bfloat16", {"q_offset": 512}),
    "offsets of each row, lengths": (
        140, 280, 2, 128, 128, "float16", {"q_offset": i32(17, 140), "kv_lengths": i32(0, 280)},
    ),
    "rows that see nothing": (200, 130, 2, 128, 128, "bfloat16", {"q_offset": i32(-150, -500)}),
}  # fmt: skip


def draw(queries, keys, heads, k_width, v_width, dtype, batch=2):
    rng = np.random.default_rng(0)
    shapes = (batch, queries, heads, k_width), (batch, keys, heads, k_width), (batch, keys, heads, v_width)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def close(ours, expected, tolerance, name):
    """Compares norms. The gradients of a single key's scores are zero but for float32's rounding."""
    error, size = np.linalg.norm(np.asarray(ours, np.float64) - expected), np.linalg.norm(expected)
    assert error <= tolerance * size + 1e-5, f"{name}: {error} of {size}"


@functools.cache
def arguments(name: str):
    """(q, k, v, gradients by out and lse, keywords)"""
    *sizes, dtype, options = CASES[name]
    options = dict(options)
    if "segments" in options:
        options["q_segments"] = options["kv_segments"] = segments(sizes[1], *options.pop("segments"))
    q, k, v = draw(*sizes, dtype)
    rng = np.random.default_rng(1)
    d_out, d_lse = rng.normal(size=(*q.shape[:3], v.shape[-1])), rng.normal(size=q.shape[:3])
    return q, k, v, jnp.asarray(d_out, dtype), jnp.asarray(d_lse, jnp.float32), options


def results(implementation: str, arrays, options) -> list[jax.Array]:
    """Out, lse, the gradients where only out is used, and those where lse is used too, as under `merge`."""
    op = functools.partial(latent_attention.attention, scale=SCALE, implementation=implementation, **options)

    @jax.jit
    def all_of_them(q, k, v, d_out, d_lse):
        out, by_out = jax.vjp(op, q, k, v)
        (_, lse), by_both = jax.vjp(functools.partial(op, return_lse=True), q, k, v)
        return [out, lse, *by_out(d_out), *by_both((d_out, jnp.where(lse == -jnp.inf, 0, d_lse)))]

    return all_of_them(*arrays)


@functools.cache
def expected(name: str) -> list[np.ndarray]:
    """Expected `results` for the same rounded inputs: out and lse in float64, gradients of the reference in float32."""
    *arrays, options = arguments(name)
    wide = [x.astype(jnp.float32) for x in arrays]
    gradients = [np.asarray(x, np.float64) for x in results("reference", wide, options)[2:]]
    names = {"q_offset": "offset", "kv_lengths": "lengths"}
    return [
        *attention_oracle(*arrays[:3], scale=SCALE, **{names.get(n, n): x for n, x in options.items()}),
        *gradients,
    ]


@EACH
@pytest.mark.parametrize("name", CASES)
def test_out_lse_and_gradients(name, implementation):
    *arrays, options = arguments(name)
    dtype = arrays[0].dtype
    out, lse, *gradients = results(implementation, arrays, options)
    assert [x.dtype for x in (out, lse, *gradients)] == [dtype, jnp.float32, *[dtype] * 6]
    expected_out, expected_lse, *expected_gradients = expected(name)
    close(out, expected_out, TOLERANCE[dtype.name], "out")
    np.testing.assert_allclose(lse, expected_lse, atol=1e-3)
    names = "dq", "dk", "dv", "dq with lse", "dk with lse", "dv with lse"
    for what, gradient, theirs in zip(names, gradients, expected_gradients, strict=True):
        close(gradient, theirs, TOLERANCE[dtype.name], what)


@EACH
@pytest.mark.parametrize("name", ["a chunk against itself and a cache", "segments"])
def test_gradients_of_parts_of_the_keys_add_up(name, implementation):
    """The merged output and log-sum-exp are rounded as the forward pass rounds them."""
    q, k, v, d_out, _, options = arguments(name)
    border = options.get("q_offset", 256)
    out, lse = jax.jit(functools.partial(latent_attention.attention, scale=SCALE, return_lse=True, **options))(q, k, v)
    op = functools.partial(latent_attention.attention_gradients, scale=SCALE, implementation=implementation)
    ours = gradients_by_parts(op, border, (q, k, v, out, lse, d_out), **{"q_offset": 0, **options})
    for what, gradient, theirs in zip(("dq", "dk", "dv"), ours, expected(name)[2:], strict=False):
        close(gradient, theirs, TOLERANCE[q.dtype.name], what)


@EACH
@pytest.mark.parametrize("k_width", [128, 192])
def test_16k_tokens_forward_and_backward(k_width, implementation):
    tokens, heads, v_width = 2**14, 4, 128
    q, k, v = draw(tokens, tokens, heads, k_width, v_width, "bfloat16", batch=1)
    d_out = jnp.flip(v, 1)

    @jax.jit
    def both(q, k, v, d_out):
        op = functools.partial(latent_attention.attention, scale=SCALE, implementation=implementation)
        out, vjp = jax.vjp(op, q, k, v)
        return out, *vjp(d_out)

    first, second = both(q, k, v, d_out), both(q, k, v, d_out)
    np.testing.assert_array_equal(np.asarray(first[0]), np.asarray(second[0]))
    for head in (0, heads - 1):
        truth = float64.attention(*(x[0, :, head] for x in (q, k, v, d_out)), scale=SCALE)
        for ours, theirs, name in zip(first, truth, ("out", "dq", "dk", "dv"), strict=True):
            close(ours[0, :, head], theirs, TOLERANCE["bfloat16"], name)


@EACH
def test_a_chunk_against_a_million_tokens(implementation):
    """Keys and values of more than 2^32 elements."""
    queries, keys, heads, width = 64, 2**20, 32, 128
    q, k, v = (
        jax.random.normal(jax.random.key(i), (1, tokens, heads, width), jnp.bfloat16)
        for i, tokens in enumerate((queries, keys, keys))
    )
    op = functools.partial(latent_attention.attention, scale=SCALE, q_offset=keys, implementation=implementation)
    out, lse = jax.jit(functools.partial(op, return_lse=True))(q, k, v)
    for head in (0, heads - 1):
        with jax.enable_x64(True):
            q_TK, k_SK, v_SV = (x[0, :, head].astype(jnp.float64) for x in (q, k, v))
            scores_TS = SCALE * q_TK @ k_SK.T
            true_lse = np.asarray(jax.nn.logsumexp(scores_TS, axis=-1))
            true_out = np.asarray(jax.nn.softmax(scores_TS, axis=-1) @ v_SV)
        close(out[0, :, head], true_out, TOLERANCE["bfloat16"], f"head {head}")
        np.testing.assert_allclose(lse[0, :, head], true_lse, atol=2e-3)


@EACH
def test_remat_keeps_the_named_residuals(implementation):
    q, k, v = draw(256, 256, 2, 128, 128, "bfloat16")
    policy = jax.checkpoint_policies.save_only_these_names("latent_attention")

    def loss(q, k, v, checkpoint):
        op = functools.partial(latent_attention.attention, scale=SCALE, implementation=implementation)
        return jnp.sum((jax.checkpoint(op, policy=policy) if checkpoint else op)(q, k, v).astype(jnp.float32) ** 2)

    plain, saved = (jax.jit(jax.grad(functools.partial(loss, checkpoint=c), (0, 1, 2)))(q, k, v) for c in (False, True))
    for a, b in zip(plain, saved, strict=True):
        close(a, np.asarray(b, np.float64), TOLERANCE["bfloat16"], "gradient")


def test_auto_takes_the_fastest():
    gpu = local_gpu()
    assert gpu is not None
    causal = AttentionShape(1, 4096, 4096, 32, 128, 128, "bfloat16", False, False, 0)
    modern = gpu.capability >= (8, 0)
    assert resolve("attention", "auto", causal) == ("cudnn" if modern else "xla")
    assert resolve("attention", "auto", causal._replace(segments=True)) == ("triton" if modern else "xla")
