"""The fused decoder layer for Hopper, its PTX interpreted, against the layer in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

import latent_attention
from decode_layer_oracle import ExactLayer
from decode_layer_weights import random_weights
from latent_attention.call_shapes import LayerShape
from latent_attention.decode_layer import mosaic
from latent_attention.gpu import make_gpu
from ptx.pallas import interpreted

pytestmark = pytest.mark.ptx

SHAPE = LayerShape(D=1536, Q=256, C=256, R=64, N=16, V=96, H=16, F=1536)
"""The smallest that the kernel takes, in 16 bits and 8."""
NUM_SMS = 17
EPS, SCALE = 1e-6, 0.1
KEYS = jax.random.split(jax.random.key(0), 5)


def inputs(dtype, capacity, kv_len, int8, int8_cache):
    h = jax.random.normal(KEYS[0], (SHAPE.D,)).astype(dtype)
    angles = jax.random.normal(KEYS[1], (SHAPE.R // 2,))
    empty = jnp.arange(capacity)[:, None] >= kv_len  # these may hold anything, even NaN
    normal = [jax.random.normal(key, (1, capacity, n)) for key, n in zip(KEYS[2:4], (SHAPE.C, SHAPE.R), strict=True)]
    if int8_cache:
        c, k_rope, scales = latent_attention.quantize_cache(*normal)
        cache = *(jnp.where(empty, -128, x) for x in (c, k_rope)), jnp.where(empty[:, 0], jnp.nan, scales)
    else:
        cache = *(jnp.where(empty, jnp.nan, x).astype(dtype) for x in normal), None
    weights = random_weights(SHAPE, dtype, KEYS[4], int8)
    return weights, h, jnp.cos(angles), jnp.sin(angles), jnp.full(1, kv_len, jnp.int32), cache


def dequantized(cache):
    """float64 latents [S, C] and rotary keys [S, R]."""
    *arrays, scales = (x if x is None else np.asarray(x, np.float64)[0] for x in cache)
    return [x if scales is None else x * scales[i][:, None] for i, x in enumerate(arrays)]


def check(monkeypatch, dtype, capacity, kv_len, int8, int8_cache):
    gpu = make_gpu((9, 0), NUM_SMS)
    assert mosaic.why_not(SHAPE, dtype, "int8" if int8_cache else dtype, capacity, gpu, int8) is None
    monkeypatch.setattr(mosaic, "local_gpu", lambda: gpu)
    monkeypatch.setattr(pl, "kernel", interpreted(pl.kernel, NUM_SMS, seed=kv_len))
    weights, h, cos, sin, length, cache = inputs(dtype, capacity, kv_len, int8, int8_cache)
    workspace = mosaic.init_workspace(SHAPE)
    out, after, workspace = mosaic.decode_layer(
        SHAPE, weights, h, cos, sin, length, cache, workspace, eps=EPS, scale=SCALE
    )
    exact = ExactLayer(SHAPE, weights, EPS, SCALE)
    h, cos, sin = (np.asarray(x, np.float64) for x in (h, cos, sin))
    kept, written = dequantized(cache), dequantized(after)
    others = np.arange(capacity) != kv_len
    for old, new in zip(jax.tree.leaves(cache), jax.tree.leaves(after), strict=True):
        axis = 2 if new.shape[1] == 2 else 1
        old, new = (np.compress(others, np.asarray(x, np.float32), axis) for x in (old, new))
        np.testing.assert_array_equal(new, old)
    if kv_len < capacity:
        for got, want in zip(written, exact.new_token(h, cos, sin), strict=True):
            atol = np.abs(want).max() / (100 if int8_cache else 200)
            np.testing.assert_allclose(got[kv_len], want, atol=atol, rtol=0.01)
    # Over the cache as it is: what is compared is the kernel, not rounding to 8 bits.
    tokens = [np.concatenate([x[:kv_len], y[kv_len : kv_len + 1]]) for x, y in zip(kept, written, strict=True)]
    expected = exact.output(h, cos, sin, *tokens)
    assert np.linalg.norm(np.asarray(out, np.float64) - expected) < 0.01 * np.linalg.norm(expected - h)
    assert workspace[0] == 4 * NUM_SMS


@pytest.mark.parametrize("int8_cache", [False, True], ids=["16-bit cache", "int8 cache"])
@pytest.mark.parametrize("kv_len", [0, 1, 63, 64, 65, 1023, 1024])
def test_lengths_around_tiles(monkeypatch, kv_len, int8_cache):
    check(monkeypatch, "bfloat16", 1024, kv_len, False, int8_cache)


@pytest.mark.parametrize("int8_cache", [False, True], ids=["16-bit cache", "int8 cache"])
@pytest.mark.parametrize(("dtype", "int8"), [("bfloat16", True), ("float16", False)], ids=["int8 weights", "float16"])
def test_types(monkeypatch, dtype, int8, int8_cache):
    check(monkeypatch, dtype, 1024, 1000, int8, int8_cache)


@pytest.mark.parametrize("int8_cache", [False, True], ids=["16-bit cache", "int8 cache"])
def test_ctas_with_several_tiles_of_the_cache(monkeypatch, int8_cache):
    """The first few have three of 64 tokens, the others two."""
    check(monkeypatch, "bfloat16", 4096, 128 * NUM_SMS + 100, False, int8_cache)
