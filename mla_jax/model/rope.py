"""Rotary positions on the decoupled part of queries and keys, with YaRN (arXiv 2309.00071) as DeepSeek-V3 has it."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax.config import ModelConfig, YarnConfig

_REVOLUTION = 2**32
"""A full rotation of 2 pi radians in 32-bit fixed point."""
CosSin = tuple[jax.Array, jax.Array]
"""cos and sin of the angles of some positions, see `rope_cos_sin`."""


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(config: ModelConfig) -> float:
    """Factor of the attention scores: K^-1/2, times YaRN's mscale_all_dim temperature squared."""
    yarn = config.rope_scaling
    temperature = _mscale(yarn.factor, yarn.mscale_all_dim) if yarn is not None and yarn.mscale_all_dim else 1.0
    return config.qk_head_dim**-0.5 * temperature**2


def attention_factor(yarn: YarnConfig | None) -> float:
    """YaRN's factor of cos and sin; 1 where mscale equals mscale_all_dim, as in DeepSeek-V3."""
    if yarn is None:
        return 1.0
    if yarn.mscale and yarn.mscale_all_dim:
        return _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)
    return _mscale(yarn.factor, 1.0)


def inv_freq(config: ModelConfig) -> np.ndarray:
    """Radians per token of each of the R/2 pairs, float64; "NTK-by-parts" of YaRN where it is configured."""
    width, theta, yarn = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
    pairs = np.arange(width // 2, dtype=np.float64)
    extrapolated = theta ** (-2 * pairs / width)
    if yarn is None:
        return extrapolated

    def correction_dim(rotations: float) -> float:
        """Index of the pair that makes so many full rotations over the original context."""
        return (
            width * math.log(yarn.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(theta))
        )

    low = max(math.floor(correction_dim(yarn.beta_fast)), 0)
    high = min(math.ceil(correction_dim(yarn.beta_slow)), width - 1)
    ramp = np.clip((pairs - low) / (high - low or 0.001), 0, 1)
    return extrapolated * (1 - ramp) + extrapolated / yarn.factor * ramp


def rope_cos_sin(config: ModelConfig, positions: jax.Array) -> CosSin:
    """cos and sin, float32 [..., R/2], of int32 positions [...].

    A float32 product of a position near 2^20 and a frequency is off by up to 0.03 radians. Angles are computed as
    fractions of a full rotation in 32-bit fixed point instead, where whole rotations overflow: right to 1e-6 at every
    position.
    """
    units = inv_freq(config) / (2 * np.pi) * _REVOLUTION
    whole = np.floor(units)
    p = positions[..., None].astype(jnp.uint32)
    fraction = (p.astype(jnp.float32) * jnp.asarray(units - whole, jnp.float32)).astype(jnp.uint32)
    angles = (p * jnp.asarray(whole.astype(np.uint32)) + fraction).astype(jnp.int32).astype(jnp.float32)
    angles *= 2 * np.pi / _REVOLUTION
    factor = attention_factor(config.rope_scaling)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the interleaved pairs (x0, x1), (x2, x3), ... of x [..., R] in float32; cos and sin are [..., R/2]."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)
