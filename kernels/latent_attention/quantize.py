"""The 8-bit latent cache: int8, with one scale a token for the latent and one for the rotary key."""

import jax
import jax.numpy as jnp

LARGEST = 127


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
