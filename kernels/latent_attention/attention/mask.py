"""Causal, length and segment mask of a call of `attention`, for implementations that compute it themselves."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Mask(NamedTuple):
    """Visibility of keys: query t sees key s if s <= offset + t, s < length and their segments are equal."""

    offset_B: jax.Array
    lengths_B: jax.Array
    q_segments_BT: jax.Array | None
    kv_segments_BS: jax.Array | None


def make_mask(q_BTHK, k_BSHK, q_offset, kv_lengths, q_segments, kv_segments) -> Mask:
    """The mask of a call of `attention`, all int32."""
    batch, queries, keys = *q_BTHK.shape[:2], k_BSHK.shape[1]
    # Clipping changes no mask, and keeps offset + t within int32.
    offset_B = jnp.broadcast_to(jnp.clip(jnp.asarray(q_offset, jnp.int32), -queries, keys), batch)
    lengths_B = jnp.full(batch, keys, jnp.int32)
    if kv_lengths is not None:
        lengths_B = jnp.clip(kv_lengths, 0, keys).astype(jnp.int32)
    if q_segments is not None and kv_segments is not None:
        q_segments, kv_segments = q_segments.astype(jnp.int32), kv_segments.astype(jnp.int32)
    return Mask(offset_B, lengths_B, q_segments, kv_segments)
