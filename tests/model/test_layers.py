"""Building blocks against plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mla_jax.model.layers import matmul, rms_norm


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6)])
def test_matmul_and_its_gradients_are_those_of_jnp(shape):
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in (shape, (6, 4)))
    weights = rng.normal(size=(*shape[:-1], 4))
    ours = jax.value_and_grad(lambda x, w: jnp.sum(weights * matmul(x, nnx.Param(w))), (0, 1))(x, w)
    plain = jax.value_and_grad(lambda x, w: jnp.sum(weights * (x @ w)), (0, 1))(x, w)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, plain)


def test_matmul_in_bfloat16_gives_float32_gradients_of_float32_weights():
    """The gradient is summed in float32, not in bfloat16 and cast."""
    x, w = jnp.ones((1000, 6), jnp.bfloat16), jnp.full((6, 4), 1 / 3)
    out, vjp = jax.vjp(lambda x, w: matmul(x, nnx.Param(w)), x, w)
    d_x, d_w = vjp(jnp.ones_like(out))
    assert (out.dtype, d_x.dtype, d_w.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(d_w, 1000)


def test_rms_norm_is_computed_in_float32():
    x, scale = np.random.default_rng(0).normal(size=(3, 64)) * 1e4, np.linspace(0.5, 1.5, 64)
    expected = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * scale
    for dtype, tolerance in (("float32", 1e-6), ("bfloat16", 1e-2)):
        out = rms_norm(jnp.asarray(x, dtype), nnx.Param(jnp.asarray(scale, "float32")), 1e-6)
        assert out.dtype == dtype
        np.testing.assert_allclose(out.astype("float32"), expected, rtol=tolerance)
    tiny = jnp.full((1, 4), 1e-3)
    np.testing.assert_allclose(rms_norm(tiny, nnx.Param(jnp.ones(4)), 1e-6), 0.70710678, rtol=1e-5)
