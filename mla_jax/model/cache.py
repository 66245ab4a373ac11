"""The latent cache: one latent and one rotary key per token and layer, for all heads (DeepSeek-V2, section 2.1).

Each layer has arrays of its own: they are updated in place, and grown one layer after the other.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from latent_attention import dequantize, quantize
from mla_jax import mesh
from mla_jax.config import ModelConfig

SCALE_BYTES = 2 * 4
"""Bytes of an int8 cache, per token and layer, for the float32 scales of the latent and of the rotary key."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """The cache of one layer. Valid are the first tokens of axis S; their number is kept elsewhere.

    The int8 form is that of `latent_attention.quantize_cache`: a scale a token for the latent, one for the rotary key.
    """

    c_BSC: jax.Array
    k_rope_BSR: jax.Array
    scales_B2S: jax.Array | None

    @property
    def capacity(self) -> int:
        """Tokens that fit in a row."""
        return self.c_BSC.shape[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentCache:
    """The caches of all layers; row b has `lengths_B[b]` valid tokens in each."""

    layers: tuple[LayerCache, ...]
    lengths_B: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def init_layer(config: ModelConfig, batch: int, capacity: int, dtype: str | None = None) -> LayerCache:
    """An empty cache of one layer, of `dtype` (default: the compute type); on a mesh, its rows are sharded."""
    dtype = dtype or config.dtype

    def empty(*shape: int, dtype: str = dtype) -> jax.Array:
        return mesh.shard_batch(jnp.zeros(shape, dtype))

    return LayerCache(
        c_BSC=empty(batch, capacity, config.kv_lora_rank),
        k_rope_BSR=empty(batch, capacity, config.qk_rope_head_dim),
        scales_B2S=empty(batch, 2, capacity, dtype="float32") if dtype == "int8" else None,
    )


def bytes_per_token(config: ModelConfig, dtype: str | None = None) -> int:
    """Bytes that a token takes in all layers of a cache of `dtype` (default: the compute type)."""
    size = jnp.dtype(dtype or config.dtype).itemsize
    return config.cache_bytes_per_token(size) + (SCALE_BYTES * config.num_hidden_layers if dtype == "int8" else 0)


def write(
    cache: LayerCache, lengths_B: jax.Array, c_BTC: jax.Array, k_rope_BTR: jax.Array, valid_B: jax.Array
) -> LayerCache:
    """Appends the first `valid_B` of T tokens to the `lengths_B` tokens of their row.

    Tokens that do not fit are dropped; valid tokens are never overwritten.
    """

    def put(new_BTX: jax.Array, cached: jax.Array, axis: int = 1) -> jax.Array:
        def scatter(new_BTX: jax.Array, cached: jax.Array, lengths_B: jax.Array, valid_B: jax.Array) -> jax.Array:
            t = jnp.arange(new_BTX.shape[1])
            # Out of bounds, hence dropped.
            slots_BT = jnp.where(t < valid_B[:, None], lengths_B[:, None] + t, cached.shape[axis])
            rows_B1 = jnp.arange(new_BTX.shape[0])[:, None]
            places = cached.at[rows_B1, slots_BT] if axis == 1 else cached.at[rows_B1, :, slots_BT]
            return places.set(new_BTX.astype(cached.dtype), mode="drop")

        return mesh.per_device(scatter, new_BTX, cached, lengths_B, valid_B)

    scales_B2S = cache.scales_B2S
    if scales_B2S is not None:
        (c_BTC, c_scale_BT), (k_rope_BTR, k_rope_scale_BT) = quantize(c_BTC), quantize(k_rope_BTR)
        scales_B2S = put(jnp.stack([c_scale_BT, k_rope_scale_BT], axis=-1), scales_B2S, axis=2)
    return LayerCache(put(c_BTC, cache.c_BSC), put(k_rope_BTR, cache.k_rope_BSR), scales_B2S)


def read(cache: LayerCache, start: jax.Array, size: int, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array]:
    """Latents [B, size, C] and rotary keys [B, size, R] in slots [start, start + size); past the capacity, anything."""
    # A slice at the end starts early (it may not overrun); rolling moves what was asked for to the front again.
    first = jnp.minimum(start, cache.capacity - size)

    def window(x: jax.Array, axis: int) -> jax.Array:
        return jnp.roll(jax.lax.dynamic_slice_in_dim(x, first, size, axis), first - start, axis)

    c_BsC, k_rope_BsR = window(cache.c_BSC, 1), window(cache.k_rope_BSR, 1)
    if cache.scales_B2S is None:
        return c_BsC.astype(dtype), k_rope_BsR.astype(dtype)
    scales_B2s = window(cache.scales_B2S, 2)
    return dequantize(c_BsC, scales_B2s[:, 0], dtype), dequantize(k_rope_BsR, scales_B2s[:, 1], dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def resize(cache: LayerCache, batch: int, capacity: int) -> LayerCache:
    """A copy of `capacity`, no smaller than now; if `batch` is larger than the cache's single row, that is repeated."""

    def copy(x: jax.Array, axis: int) -> jax.Array:
        more = [(0, capacity - cache.capacity if i == axis else 0) for i in range(x.ndim)]
        x = jnp.pad(x, more)
        return jnp.repeat(x, batch, axis=0, out_sharding=mesh.sharding_of(x)) if len(x) < batch else x

    scales = None if cache.scales_B2S is None else copy(cache.scales_B2S, 2)
    return LayerCache(copy(cache.c_BSC, 1), copy(cache.k_rope_BSR, 1), scales)
