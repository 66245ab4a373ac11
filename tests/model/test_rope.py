"""Rotary positions against float64 and transformers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import DeepseekV3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mla_jax.config import YarnConfig
from mla_jax.model.rope import apply_rope, inv_freq, rope_cos_sin, softmax_scale
from tiny import MODEL

DEEPSEEK_V3 = {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0}
YARNS = {
    "DeepSeek-V3": DEEPSEEK_V3,
    "no mscale": DEEPSEEK_V3 | {"mscale": None, "mscale_all_dim": None},
    "mscale alone": DEEPSEEK_V3 | {"mscale": 0.7, "mscale_all_dim": None},
    "mscale_all_dim alone": DEEPSEEK_V3 | {"mscale": None, "mscale_all_dim": 0.7},
    "unequal": DEEPSEEK_V3 | {"mscale": 0.7, "mscale_all_dim": 1.3},
    "other betas": DEEPSEEK_V3 | {"beta_fast": 8.0, "beta_slow": 2.0},
    "a short original context": DEEPSEEK_V3 | {"original_max_position_embeddings": 8},
    "factor 1": DEEPSEEK_V3 | {"factor": 1.0},
}


def model(**changes):
    return dataclasses.replace(MODEL, qk_rope_head_dim=64, rope_theta=10_000.0, **changes)


@pytest.mark.parametrize("yarn", YARNS.values(), ids=YARNS)
def test_yarn_is_that_of_transformers(yarn):
    config = model(rope_scaling=YarnConfig(**yarn))
    parameters = {"rope_type": "yarn", "rope_theta": 10_000.0, **{k: v for k, v in yarn.items() if v is not None}}
    theirs = DeepseekV3Config(rope_parameters=parameters, qk_rope_head_dim=64, max_position_embeddings=163_840)
    expected, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](theirs)
    np.testing.assert_allclose(inv_freq(config), expected.double().numpy(), rtol=1e-6)
    assert rope_cos_sin(config, jnp.array(0))[0] == pytest.approx(attention_factor)


def test_softmax_scale_holds_mscale_all_dim_squared():
    plain = config_scale = (MODEL.qk_nope_head_dim + 64) ** -0.5
    assert softmax_scale(model()) == pytest.approx(plain)
    assert softmax_scale(model(rope_scaling=YarnConfig(**YARNS["mscale alone"]))) == pytest.approx(config_scale)
    temperature = 0.1 * 0.7 * np.log(40) + 1
    yarn = YarnConfig(**YARNS["mscale_all_dim alone"])
    assert softmax_scale(model(rope_scaling=yarn)) == pytest.approx(plain * temperature**2)


@pytest.mark.parametrize("theta", [100.0, 10_000.0, 1e7])
def test_cos_and_sin_are_exact_at_far_positions(theta):
    config = dataclasses.replace(model(), rope_theta=theta)
    positions = np.array([0, 1, 2, 1000, 65_537, 2**20 - 1, 2**20, 12_345_678, 2**31 - 1])
    angles = positions[:, None] * inv_freq(config)
    cos, sin = jax.jit(rope_cos_sin, static_argnums=0)(config, jnp.asarray(positions, jnp.int32))
    # float64 holds the largest angle to 5e-7.
    np.testing.assert_allclose(cos, np.cos(angles), atol=1.5e-6)
    np.testing.assert_allclose(sin, np.sin(angles), atol=1.5e-6)


def test_apply_rope_multiplies_interleaved_pairs_by_a_unit_complex_number():
    rng = np.random.default_rng(0)
    x, angles = rng.normal(size=(2, 5, 3, 8)), rng.normal(size=(2, 5, 1, 4))
    expected = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)
    ours = apply_rope(jnp.asarray(x, jnp.float32), jnp.cos(angles), jnp.sin(angles))
    np.testing.assert_allclose(ours[..., 0::2], expected.real, atol=1e-6)
    np.testing.assert_allclose(ours[..., 1::2], expected.imag, atol=1e-6)
    assert apply_rope(jnp.asarray(x, jnp.bfloat16), jnp.cos(angles), jnp.sin(angles)).dtype == jnp.bfloat16
