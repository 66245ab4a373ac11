"""Reference implementation in float32: both ops written out, all scores in memory; for tests and for reading."""

import jax
import jax.numpy as jnp

from latent_attention.call_shapes import AttentionShape, DecodeShape
from latent_attention.gpu import Gpu
from latent_attention.int8 import dequantize

MAX_SCORE_BYTES = 4 << 30


def why_not_attention(shape: AttentionShape, gpu: Gpu | None) -> str | None:
    """Why the reference cannot run at this shape, or None if it can."""
    return _too_large(shape.batch * shape.heads * shape.queries * shape.keys)


def why_not_decode(shape: DecodeShape, gpu: Gpu | None) -> str | None:
    """Why the reference cannot run at this shape, or None if it can."""
    return _too_large(shape.batch * shape.heads * shape.queries * shape.pages_per_row * shape.page_size)


def _too_large(scores: int) -> str | None:
    if 4 * scores <= MAX_SCORE_BYTES:
        return None
    return f"it would hold {scores / 2**28:.1f} GiB of scores at once (at most {MAX_SCORE_BYTES >> 30}); use 'xla'"


def attention(q_BTHK, k_BSHK, v_BSHV, *, scale, q_offset, kv_lengths, q_segments, kv_segments):
    """Softmax attention; see `latent_attention.attention`. Returns (out_BTHV, lse_BTH)."""
    q, k, v = (x.astype(jnp.float32) for x in (q_BTHK, k_BSHK, v_BSHV))
    t, s = jnp.arange(q.shape[1])[:, None], jnp.arange(k.shape[1])[None, :]
    offset_B11 = jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), q.shape[:1])[:, None, None]
    visible_BTS = s - t <= offset_B11
    if kv_lengths is not None:
        visible_BTS &= s < kv_lengths[:, None, None]
        v = jnp.where((s < kv_lengths[:, None])[:, :, None, None], v, 0)  # entries beyond the length may be NaN
    if q_segments is not None:
        visible_BTS &= q_segments[:, :, None] == kv_segments[:, None, :]
    scores_BHTS = scale * jnp.einsum("bthk,bshk->bhts", q, k, precision="highest")
    scores_BHTS = jnp.where(visible_BTS[:, None], scores_BHTS, -jnp.inf)
    lse_BHT = jax.nn.logsumexp(scores_BHTS, axis=-1)
    probs_BHTS = jnp.exp(scores_BHTS - jnp.where(lse_BHT == -jnp.inf, 0, lse_BHT)[..., None])
    out_BTHV = jnp.einsum("bhts,bshv->bthv", probs_BHTS, v, precision="highest")
    return out_BTHV.astype(q_BTHK.dtype), lse_BHT.swapaxes(1, 2)


def decode(q_BTHW, c_PSC, k_rope_PSR, lengths_B, *, scale, block_table_BN, scales_P2S):
    """Attention whose heads all share the key [c | k_rope] and the value c; see `latent_attention.decode`."""
    if scales_P2S is not None:
        c_PSC, k_rope_PSR = (dequantize(x, scales_P2S[:, i], jnp.float32) for i, x in enumerate((c_PSC, k_rope_PSR)))
    if block_table_BN is not None:
        # Entries that no token needs may be anything; clamped ones lie beyond the length.
        c_BSC, k_rope_BSR = (
            jnp.take(x, block_table_BN, axis=0, mode="clip").reshape(len(lengths_B), -1, x.shape[-1])
            for x in (c_PSC, k_rope_PSR)
        )
    else:
        c_BSC, k_rope_BSR = c_PSC, k_rope_PSR
    heads, queries = q_BTHW.shape[2], q_BTHW.shape[1]
    k_BSHW = jnp.repeat(jnp.concatenate([c_BSC, k_rope_BSR], axis=-1)[:, :, None], heads, axis=2)
    v_BSHC = jnp.repeat(c_BSC[:, :, None], heads, axis=2)
    return attention(
        q_BTHW, k_BSHW, v_BSHC, scale=scale, q_offset=lengths_B - queries, kv_lengths=lengths_B,
        q_segments=None, kv_segments=None,
    )  # fmt: skip
