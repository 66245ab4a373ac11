"""The fused decoder layer for Hopper against the Triton kernels around `decode`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import latent_attention
from decode_layer_oracle import ExactLayer
from decode_layer_weights import random_weights
from latent_attention import jax_triton_loader
from latent_attention.call_shapes import LayerShape
from latent_attention.decode_layer import mosaic as mosaic_layer
from latent_attention.decode_layer import triton as kernels
from latent_attention.gpu import local_gpu

SMALL = LayerShape(D=1280, Q=512, C=256, R=64, N=32, V=128, H=16, F=1536)
TWO_UNITS = SMALL._replace(V=256, H=32)
"""A CTA has up to two units of the value projection, of different heads."""
FEW_HEADS, SOME_HEADS = SMALL._replace(H=8, V=192), SMALL._replace(H=24)
WORDS = SMALL._replace(D=1536)
"""Rows are whole words for each thread in 8 bits, as they are of INFINITE_1B."""
WIDE = SMALL._replace(Q=1536, N=128, H=32)
"""Rows of the up-projection of queries are not narrow, see `layouts.is_narrow`."""
INFINITE_1B = LayerShape(D=2560, Q=768, C=256, R=64, N=64, V=128, H=32, F=7680)
EPS, SCALE = 1e-6, 0.1
KEYS = jax.random.split(jax.random.key(0), 5)


def unfused(shape, weights, h, cos, sin, length, cache):
    """The same layer on the Triton kernels and `decode`."""
    counter = kernels.init_counter()
    q, cache, counter = kernels.before_attention(shape, weights, h, cos, sin, length, cache, counter, eps=EPS)
    c, k_rope, scales = cache
    out, _ = latent_attention.decode(q, c, k_rope, length + 1, scale=SCALE, scales_P2S=scales)
    return kernels.after_attention(shape, weights, h, out, counter, eps=EPS)[0], cache


@functools.cache
def functions(shape, num_sms):
    """The layer in one kernel and in several, compiled for this many SMs."""
    gpu = local_gpu()._replace(num_sms=num_sms)

    def fused(*args):
        with pytest.MonkeyPatch.context() as patch:  # while this is traced
            patch.setattr(mosaic_layer, "local_gpu", lambda: gpu)
            return mosaic_layer.decode_layer(shape, *args, eps=EPS, scale=SCALE)

    return jax.jit(fused), jax.jit(functools.partial(unfused, shape))


# A tile is 64 tokens; with 132 CTAs, one has a second tile from 64 x 132 + 1 tokens on and a third from 128 x 132 + 1.
SHORT = [(1024, n) for n in (0, 1, 63, 64, 65, 1000, 1023, 1024)]
LONG = [(32768, n) for n in (8448, 8449, 16897, 20000, 32768)]


@pytest.mark.parametrize(
    ("shape", "capacity", "kv_len"),
    [(SMALL, *case) for case in SHORT + LONG]
    + [
        (shape, *case)
        for shape in (INFINITE_1B, TWO_UNITS, FEW_HEADS, SOME_HEADS, WIDE)
        for case in (SHORT[0], SHORT[5], LONG[3])
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_fused_layer_matches_unfused(dtype, shape, capacity, kv_len):
    check(dtype, shape, capacity, kv_len, local_gpu())


@pytest.mark.parametrize("shape", [WORDS, INFINITE_1B, WIDE._replace(D=2048)])
@pytest.mark.parametrize(("capacity", "kv_len"), [(1024, 0), (1024, 1000), (32768, 20_000)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_fused_layer_matches_unfused_in_8_bit_weights(dtype, shape, capacity, kv_len):
    check(dtype, shape, capacity, kv_len, local_gpu(), int8=True)


@pytest.mark.parametrize(
    ("shape", "capacity", "kv_len"),
    [(WORDS, *case) for case in SHORT + LONG] + [(INFINITE_1B, *case) for case in (SHORT[0], SHORT[5], LONG[3])],
)
@pytest.mark.parametrize("int8", [False, True], ids=["16-bit weights", "int8 weights"])
def test_fused_layer_matches_unfused_with_an_8_bit_cache(shape, capacity, kv_len, int8):
    check("bfloat16", shape, capacity, kv_len, local_gpu(), int8, int8_cache=True)


@pytest.mark.parametrize("shape", [INFINITE_1B, TWO_UNITS, FEW_HEADS, SOME_HEADS, WIDE])
@pytest.mark.parametrize(("capacity", "kv_len"), [(32768, 1000), (32768, 20_000)])
def test_fused_layer_matches_unfused_with_an_8_bit_cache_in_float16(shape, capacity, kv_len):
    check("float16", shape, capacity, kv_len, local_gpu(), int8_cache=True)


@pytest.mark.parametrize("kv_len", [65, 1000, 20_000])
def test_attention_over_an_8_bit_cache_is_that_over_its_numbers(kv_len):
    """The layer in float64 on the dequantised cache, whose tokens differ in size, and the latest grow."""
    weights, h, cos, sin, length, cache = inputs("bfloat16", WORDS, 32768, kv_len, local_gpu(), int8_cache=True)
    token = jnp.arange(32768)
    growth = jnp.where((token < kv_len) & (token % 7 > 0), 2.0 ** (token % 11 - 8) * (1 + 3 * token / kv_len), 0.0)
    c, k_rope, scales = cache
    cache = c, k_rope, jnp.where(token < kv_len, scales * growth, jnp.nan)
    fused, unfused = functions(WORDS, local_gpu().num_sms)
    args = weights, h, cos, sin, length, cache
    out, (c, k_rope, scales), _ = fused(*args, mosaic_layer.init_workspace(WORDS))
    numbers = [np.asarray(x[0, : kv_len + 1], np.float64) for x in (c, k_rope)]
    numbers = [x * np.asarray(y[: kv_len + 1], np.float64)[:, None] for x, y in zip(numbers, scales[0], strict=True)]
    h, cos, sin = (np.asarray(x, np.float64) for x in (h, cos, sin))
    expected = ExactLayer(WORDS, weights, EPS, SCALE).output(h, cos, sin, *numbers)

    def error(out):
        return np.linalg.norm(np.asarray(out, np.float64) - expected) / np.linalg.norm(expected - h)

    assert error(out) < 1.5 * error(unfused(*args)[0]) + 1e-3 < 0.1


@pytest.mark.parametrize("int8_cache", [False, True])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("kv_len", [1000, 20_000])
def test_with_fewer_ctas_each_has_several_units(kv_len, int8, int8_cache):
    gpu = local_gpu()
    check("bfloat16", INFINITE_1B, 32768, kv_len, gpu and gpu._replace(num_sms=78), int8, int8_cache)


@pytest.mark.parametrize("int8_cache", [False, True])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("place", [0, -1])
def test_nan_in_the_hidden_state_reaches_all_of_the_output(place, int8, int8_cache):
    gpu = local_gpu()
    weights, h, *others = inputs("bfloat16", WORDS, 1024, 1000, gpu, int8, int8_cache)
    fused, unfused = functions(WORDS, gpu.num_sms)
    args = weights, h.at[place].set(jnp.nan), *others
    for out, *_ in (fused(*args, mosaic_layer.init_workspace(WORDS)), unfused(*args)):
        assert np.isnan(np.asarray(out, np.float32)).all()


def inputs(dtype, shape, capacity, kv_len, gpu, int8=False, int8_cache=False):
    """Arguments of `functions`; skips the test where the kernels do not run."""
    cache_dtype = "int8" if int8_cache else dtype
    reason = mosaic_layer.why_not(shape, dtype, cache_dtype, capacity, gpu, int8) or jax_triton_loader.why_not()
    if reason:
        pytest.skip(reason)
    weights = random_weights(shape, dtype, KEYS[0], int8)
    h = jax.random.normal(KEYS[1], (shape.D,)).astype(dtype)
    angles = jax.random.normal(KEYS[2], (shape.R // 2,))
    empty = jnp.arange(capacity)[:, None] >= kv_len  # these may hold anything, even NaN
    normal = [
        jax.random.normal(key, (1, capacity, width)) for key, width in zip(KEYS[3:], (shape.C, shape.R), strict=True)
    ]
    cache = *(jnp.where(empty, jnp.nan, x).astype(dtype) for x in normal), None
    if int8_cache:  # there, scales may be NaN, and numbers anything
        c, k_rope, scales = latent_attention.quantize_cache(*normal)
        cache = *(jnp.where(empty, -128, x) for x in (c, k_rope)), jnp.where(empty[:, 0], jnp.nan, scales)
    return weights, h, jnp.cos(angles), jnp.sin(angles), jnp.full(1, kv_len, jnp.int32), cache


def check(dtype, shape, capacity, kv_len, gpu, int8=False, int8_cache=False):
    args = inputs(dtype, shape, capacity, kv_len, gpu, int8, int8_cache)
    h = args[1]
    fused, unfused = functions(shape, gpu.num_sms)
    out, after, workspace = fused(*args, mosaic_layer.init_workspace(shape))
    expected, expected_after = unfused(*args)
    # Both round at the same places, except for the attention's output; sums are in another order.
    exact, change = np.asarray(expected, np.float64), np.asarray(expected, np.float64) - np.asarray(h, np.float64)
    assert np.linalg.norm(np.asarray(out, np.float64) - exact) < 0.01 * np.linalg.norm(change)
    before = args[-1]
    for x, y, old in zip(*map(jax.tree.leaves, (after, expected_after, before)), strict=True):
        is_scales = x.shape[1] == 2
        x, y, old = (np.asarray(z, np.float32)[0].T if is_scales else np.asarray(z, np.float32)[0] for z in (x, y, old))
        others = np.arange(capacity) != kv_len
        np.testing.assert_array_equal(x[others], old[others])
        # Of int8, numbers may be rounded to the next one: sums before them are in another order.
        atol = (0 if is_scales else 2) if int8_cache else 0.02
        np.testing.assert_allclose(x[kv_len : kv_len + 1], y[kv_len : kv_len + 1], atol=atol, rtol=0.01)
    assert workspace[0] == 4 * gpu.num_sms


@pytest.mark.parametrize("layers_before", [0, 1, 16_370])
@pytest.mark.parametrize("shape", [SMALL, INFINITE_1B])
def test_layers_that_share_a_workspace_do_not_see_earlier_epochs(shape, layers_before):
    """After 16,370 layers, epochs wrap around to 0 on the way."""
    reason = mosaic_layer.why_not(shape, "bfloat16", "bfloat16", 1024, local_gpu())
    if reason:
        pytest.skip(reason)
    weights = random_weights(shape, "bfloat16", KEYS[0])
    hs = jax.random.normal(KEYS[1], (20, shape.D)).astype(jnp.bfloat16)
    cache = *(jnp.ones((1, 1024, width), jnp.bfloat16) for width in (shape.C, shape.R)), None
    rest = jnp.ones(shape.R // 2), jnp.zeros(shape.R // 2), jnp.full(1, 500, jnp.int32), cache
    layer, _ = functions(shape, local_gpu().num_sms)
    empty = mosaic_layer.init_workspace(shape)
    used = jnp.full_like(empty, 0x7FC0 << 16 | 4 * (layers_before - 1) + 1) if layers_before else empty  # NaN
    used = used.at[0].set(4 * layers_before * local_gpu().num_sms)

    @jax.jit
    def one_after_another(hs):
        def next_layer(workspace, h):
            out, _, workspace = layer(weights, h, *rest, workspace)
            return workspace, out

        return jax.lax.scan(next_layer, used, hs)[1]

    alone = jnp.stack([layer(weights, h, *rest, empty)[0] for h in hs])
    np.testing.assert_array_equal(one_after_another(hs), alone)


@pytest.mark.parametrize("num_sms", [None, 78])
@pytest.mark.parametrize("shape", [SMALL, INFINITE_1B])
@pytest.mark.parametrize("int8_cache", [False, True])
def test_a_layer_may_start_before_the_previous_one_has_ended(shape, num_sms, int8_cache):
    """With fewer CTAs than SMs, the other SMs run CTAs of the next layer meanwhile (programmatic dependent launch)."""
    gpu = local_gpu()
    cache_dtype = "int8" if int8_cache else "bfloat16"
    reason = mosaic_layer.why_not(
        shape, "bfloat16", cache_dtype, 1024, gpu and gpu._replace(num_sms=num_sms or gpu.num_sms)
    )
    if reason:
        pytest.skip(reason)
    layer, _ = functions(shape, num_sms or local_gpu().num_sms)
    weights = [random_weights(shape, "bfloat16", key) for key in jax.random.split(KEYS[0], 6)]
    h = jax.random.normal(KEYS[1], (shape.D,)).astype(jnp.bfloat16)
    normal = [jax.random.normal(key, (1, 1024, n)) for key, n in zip(KEYS[3:], (shape.C, shape.R), strict=True)]
    cache = latent_attention.quantize_cache(*normal) if int8_cache else (*(x.astype("bfloat16") for x in normal), None)
    caches = [cache for _ in weights]
    angles, length = jax.random.normal(KEYS[2], (shape.R // 2,)), jnp.full(1, 500, jnp.int32)
    cos, sin = jnp.cos(angles), jnp.sin(angles)  # once: XLA's are not the same to the last bit in every program

    def all_layers(h, caches, workspace):
        for i, w in enumerate(weights):
            h, caches[i], workspace = layer(w, h, cos, sin, length, caches[i], workspace)
        return h, caches, workspace

    apart = all_layers(h, list(caches), mosaic_layer.init_workspace(shape))
    copies = jax.tree.map(jnp.copy, caches)
    together = jax.jit(all_layers, donate_argnums=1)(h, copies, mosaic_layer.init_workspace(shape))
    for x, y in zip(jax.tree.leaves(apart), jax.tree.leaves(together), strict=True):
        np.testing.assert_array_equal(x, y)
