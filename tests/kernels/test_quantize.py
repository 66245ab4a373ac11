"""The 8-bit cache."""

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as arrays

from latent_attention import dequantize, quantize, quantize_cache

FLOATS = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)


@settings(max_examples=50)
@given(arrays.arrays(np.float32, (3, 16), elements=FLOATS))
def test_the_error_is_half_a_unit_at_most(x):
    units, scale = quantize(jnp.asarray(x))
    assert (units.dtype, scale.dtype, scale.shape) == (jnp.int8, jnp.float32, (3,))
    error = np.abs(np.asarray(dequantize(units, scale, jnp.float32), np.float64) - x)
    tiny = 127 * np.finfo(np.float32).tiny  # counts as zero
    assert np.all(error <= np.maximum(np.asarray(scale, np.float64)[:, None] * 0.5001, tiny))


def test_the_extremes_use_all_of_the_range_and_signs_are_kept():
    units, scale = quantize(jnp.array([[-3.0, 0.0, 1.5, 3.0], [5.0, -1.0, 0.0, 2.0]]))
    assert units.tolist() == [[-127, 0, 64, 127], [127, -25, 0, 51]]
    np.testing.assert_allclose(scale, [3 / 127, 5 / 127], rtol=1e-6)


def test_zeros_stay_zeros():
    units, scale = quantize(jnp.zeros((2, 8)))
    assert np.all(np.asarray(units) == 0) and np.all(np.asarray(scale) == 0)
    assert np.all(np.asarray(dequantize(units, scale, jnp.bfloat16)) == 0)


@pytest.mark.parametrize("value", [0.1, -7.0, 1e-30, 6e4])
def test_constant_rows_come_back_as_they_were(value):
    units, scale = quantize(jnp.full((1, 8), value))
    assert np.all(np.asarray(units) == np.sign(value) * 127)
    np.testing.assert_allclose(dequantize(units, scale, jnp.float32), value, rtol=1e-6)


def test_16_bits_are_scaled_in_32():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 64)) * 1e4, jnp.float16)
    units, scale = quantize(x)
    back = dequantize(units, scale, jnp.float16)
    assert back.dtype == jnp.float16 and np.all(np.isfinite(back))
    np.testing.assert_allclose(back, x.astype("float32"), atol=0.51 * np.asarray(scale).max() + 16)


def test_a_cache_has_a_scale_for_each_of_its_two_parts():
    rng = np.random.default_rng(0)
    c, k_rope = (jnp.asarray(rng.normal(size=(3, 5, width)) * size, jnp.bfloat16) for width, size in ((8, 1), (4, 50)))
    c_units, k_rope_units, scales = quantize_cache(c, k_rope)
    assert (c_units.dtype, k_rope_units.dtype, scales.dtype, scales.shape) == ("int8", "int8", "float32", (3, 2, 5))
    for i, (units, x) in enumerate(((c_units, c), (k_rope_units, k_rope))):
        np.testing.assert_allclose(scales[:, i], np.abs(x.astype("float32")).max(-1) / 127, rtol=1e-6)
        error = np.abs(dequantize(units, scales[:, i], jnp.float32) - x.astype("float32"))
        assert np.all(error <= 0.501 * scales[:, i, :, None])
