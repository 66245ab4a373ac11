"""The latent cache: one latent and one rotary key per token and layer, for all heads (DeepSeek-V2, section 2.1)."""

import dataclasses

import jax
import jax.numpy as jnp

from mla_jax import mesh
from mla_jax.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentCache:
    """Row b holds `lengths_B[b]` tokens from the start of axis S; what lies beyond is stale."""

    c_LBSC: jax.Array
    k_rope_LBSR: jax.Array
    lengths_B: jax.Array

    @property
    def capacity(self) -> int:
        """Tokens that fit in a row."""
        return self.c_LBSC.shape[2]


def init_cache(config: ModelConfig, batch: int, capacity: int, dtype: str | None = None) -> LatentCache:
    """An empty cache of `dtype` (default: the compute type); on a mesh, rows of the batch are spread over it."""
    shape, dtype = (config.num_hidden_layers, batch, capacity), dtype or config.dtype
    return LatentCache(
        c_LBSC=mesh.shard_batch(jnp.zeros((*shape, config.kv_lora_rank), dtype), axis=1),
        k_rope_LBSR=mesh.shard_batch(jnp.zeros((*shape, config.qk_rope_head_dim), dtype), axis=1),
        lengths_B=mesh.shard_batch(jnp.zeros(batch, jnp.int32)),
    )


def write(
    cache: LatentCache, layer: jax.Array, c_BTC: jax.Array, k_rope_BTR: jax.Array, valid_B: jax.Array
) -> LatentCache:
    """Puts the first `valid_B` of T tokens behind the tokens of their row in one layer; leaves the lengths as they are.

    Tokens that do not fit are dropped: nothing that is held is ever overwritten.
    """

    def scatter(new_BTX, cached_LBSX, lengths_B, valid_B, layer):
        t = jnp.arange(new_BTX.shape[1])
        # Out of bounds, hence dropped.
        slots_BT = jnp.where(t < valid_B[:, None], lengths_B[:, None] + t, cached_LBSX.shape[2])
        rows_B1 = jnp.arange(new_BTX.shape[0])[:, None]
        return cached_LBSX.at[layer, rows_B1, slots_BT].set(new_BTX.astype(cached_LBSX.dtype), mode="drop")

    def put(new_BTX, cached_LBSX):
        return mesh.per_device(scatter, new_BTX, cached_LBSX, cache.lengths_B, valid_B, layer, out_axes=1)

    return dataclasses.replace(cache, c_LBSC=put(c_BTC, cache.c_LBSC), k_rope_LBSR=put(k_rope_BTR, cache.k_rope_LBSR))


def read(cache_LBSX: jax.Array, layer: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """Slots [start, start + size) of one layer, [B, size, X]; those beyond the capacity hold anything."""
    _, batch, capacity, width = cache_LBSX.shape
    # A slice at the end starts early (it may not overrun); rolling moves what was asked for to the front again.
    first = jnp.minimum(start, capacity - size)
    slots_1BSX = jax.lax.dynamic_slice(cache_LBSX, (layer, 0, first, 0), (1, batch, size, width))
    return jnp.roll(slots_1BSX[0], first - start, axis=1)
