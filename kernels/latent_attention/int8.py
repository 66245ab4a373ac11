"""The 8-bit latent cache: int8, with one scale a token for the latent and one for the rotary key."""

import jax
import jax.numpy as jnp

_INT8_MAX = 127
RADIX = 254
"""Base of the two int8 digits of a query, see `split_queries`: the low digit is half of it at most. int32 holds a dot
product of 512 of them, RADIX * 512 * 127 * 127."""


def quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int8 [..., X] and its scale float32 [...]: `x ~ int8 * scale`, off by half a scale at most.

    The scale maps the largest magnitude of the last axis to 127. Zeros give a scale of 0, and so do numbers so small
    that a hundredth of them is subnormal in float32.
    """
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / _INT8_MAX
    units = x / jnp.where(scale == 0, 1, scale)[..., None]
    return jnp.clip(jnp.round(units), -_INT8_MAX, _INT8_MAX).astype(jnp.int8), scale


def dequantize(units: jax.Array, scale: jax.Array, dtype) -> jax.Array:
    """Inverse of `quantize`: int8 [..., X] times its scale [...], as `dtype`."""
    return (units.astype(jnp.float32) * scale[..., None]).astype(dtype)


def quantize_cache(c_PSC: jax.Array, k_rope_PSR: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Quantizes a cache for `decode`: int8 c_PSC and k_rope_PSR, float32 scales_P2S."""
    (c, c_scale), (k_rope, k_rope_scale) = quantize(c_PSC), quantize(k_rope_PSR)
    return c, k_rope, jnp.stack([c_scale, k_rope_scale], axis=1)


def split_queries(q_BRW, row_block: int):
    """Splits queries in two int8 digits, 15 bits and the sign together, whose products with an int8 cache are exact.

    Returns:
        int8 [B, 2R, W], in which the high digits of each block of `row_block` rows precede the low digits, and the
        scale of each row [B, R]: q = scale * (RADIX * high + low).
    """
    batch, _, width = q_BRW.shape
    q_BRW = q_BRW.astype(jnp.float32)
    scale_BR = jnp.max(jnp.abs(q_BRW), axis=-1) / (_INT8_MAX * RADIX)
    units = jnp.round(q_BRW / jnp.where(scale_BR == 0, 1, scale_BR)[..., None])
    high = jnp.clip(jnp.round(units / RADIX), -_INT8_MAX, _INT8_MAX)
    parts = [x.reshape(batch, -1, 1, row_block, width) for x in (high, units - RADIX * high)]
    return jnp.concatenate(parts, axis=2).astype(jnp.int8).reshape(batch, -1, width), scale_BR
