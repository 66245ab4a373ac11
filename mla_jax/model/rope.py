"""Rotary positions on the decoupled part of queries and keys, with YaRN (arXiv 2309.00071) as DeepSeek-V3 has it."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax.config import ModelConfig, YarnConfig

TURN = 2**32


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(config: ModelConfig) -> float:
    """Factor of the scores: K^-1/2, times YaRN's mscale_all_dim temperature squared."""
    yarn = config.rope_scaling
    temperature = _mscale(yarn.factor, yarn.mscale_all_dim) if yarn is not None and yarn.mscale_all_dim else 1.0
    return config.qk_head_dim**-0.5 * temperature**2


def amplitude(yarn: YarnConfig | None) -> float:
    """Factor of cos and sin; 1 where mscale equals mscale_all_dim, as in DeepSeek-V3."""
    if yarn is None:
        return 1.0
    if yarn.mscale and yarn.mscale_all_dim:
        return _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)
    return _mscale(yarn.factor, 1.0)


def frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per token of each of the R/2 pairs, float64; "NTK-by-parts" of YaRN where it is configured."""
    width, theta, yarn = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
    pairs = np.arange(width // 2, dtype=np.float64)
    extrapolated = theta ** (-2 * pairs / width)
    if yarn is None:
        return extrapolated

    def pair_turning(times: float) -> float:
        """Index of the pair that turns so many times over the original context."""
        return width * math.log(yarn.original_max_position_embeddings / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_turning(yarn.beta_slow)), width - 1)
    interpolated_share = np.clip((pairs - low) / (high - low or 0.001), 0, 1)
    return extrapolated * (1 - interpolated_share) + extrapolated / yarn.factor * interpolated_share


def rotations(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [..., R/2], of int32 positions [...].

    A float32 product of a position near 2^20 and a frequency is off by up to 0.03 radians. Angles are computed as
    fractions of a turn in 32-bit fixed point instead, where whole turns overflow away: right to 1e-6 at every position.
    """
    turns = frequencies(config) / (2 * np.pi) * TURN
    whole = np.floor(turns)
    p = positions[..., None].astype(jnp.uint32)
    fraction = (p.astype(jnp.float32) * jnp.asarray(turns - whole, jnp.float32)).astype(jnp.uint32)
    angles = (p * jnp.asarray(whole.astype(np.uint32)) + fraction).astype(jnp.int32).astype(jnp.float32)
    angles *= 2 * np.pi / TURN
    size = amplitude(config.rope_scaling)
    return jnp.cos(angles) * size, jnp.sin(angles) * size


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the interleaved pairs (x0, x1), (x2, x3), ... of x [..., R] in float32; cos and sin are [..., R/2]."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
