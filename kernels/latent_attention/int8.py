"""The 8-bit latent cache: int8, with one scale a token for the latent and one for the rotary key."""

import jax
import jax.numpy as jnp

LARGEST = 127
LOW_UNITS = 254
"""What the high part of a query counts; the low part is at most half of that. 127 * 127 * 512 * 254 fits 32 bits."""


def quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int8 [..., X] and its scale float32 [...]: `x ~ int8 * scale`, off by half a scale at most.

    The scale is that of the largest number of the last axis. Zeros give a scale of 0, and so does what is so small that
    a hundredth of it is no normal float32.
    """
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / LARGEST
    units = x / jnp.where(scale == 0, 1, scale)[..., None]
    return jnp.clip(jnp.round(units), -LARGEST, LARGEST).astype(jnp.int8), scale


def dequantize(units: jax.Array, scale: jax.Array, dtype) -> jax.Array:
    """The numbers [..., X] that int8 [..., X] with scale [...] stands for."""
    return (units.astype(jnp.float32) * scale[..., None]).astype(dtype)


def quantize_cache(c_PSC: jax.Array, k_rope_PSR: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The 8-bit form of a cache, as `decode` takes it: (c_PSC, k_rope_PSR, scales_P2S)."""
    (c, c_scale), (k_rope, k_rope_scale) = quantize(c_PSC), quantize(k_rope_PSR)
    return c, k_rope, jnp.stack([c_scale, k_rope_scale], axis=1)


def split_queries(q_BRW, row_block: int):
    """Queries as sums of two int8 numbers, so that products with an int8 cache are exact: 15 bits and the sign.

    Returns:
        int8 [B, 2R, W], in which the high parts of each block of `row_block` rows precede the low parts, and the scale
        of each row [B, R]: q = scale * (LOW_UNITS * high + low).
    """
    batch, _, width = q_BRW.shape
    q_BRW = q_BRW.astype(jnp.float32)
    scale_BR = jnp.max(jnp.abs(q_BRW), axis=-1) / (LARGEST * LOW_UNITS)
    units = jnp.round(q_BRW / jnp.where(scale_BR == 0, 1, scale_BR)[..., None])
    high = jnp.clip(jnp.round(units / LOW_UNITS), -LARGEST, LARGEST)
    parts = [x.reshape(batch, -1, 1, row_block, width) for x in (high, units - LOW_UNITS * high)]
    return jnp.concatenate(parts, axis=2).astype(jnp.int8).reshape(batch, -1, width), scale_BR
