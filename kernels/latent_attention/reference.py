"""Reference implementation in float32: both ops written out, all scores in memory; for tests and for reading."""

import functools

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


def _masked_scores(q_BTHK, k_BSHK, v_BSHV, scale, q_offset, kv_lengths, q_segments, kv_segments):
    """Scores [B, H, T, S], -inf where masked, q, and k and v without what lies beyond the lengths; float32."""
    q, k, v = (x.astype(jnp.float32) for x in (q_BTHK, k_BSHK, v_BSHV))
    t, s = jnp.arange(q.shape[1])[:, None], jnp.arange(k.shape[1])[None, :]
    offset_B11 = jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), q.shape[:1])[:, None, None]
    visible_BTS = s - t <= offset_B11
    if kv_lengths is not None:
        visible_BTS &= s < kv_lengths[:, None, None]
        # Entries beyond the length may be NaN, and 0 x NaN is NaN.
        k, v = (jnp.where((s < kv_lengths[:, None])[:, :, None, None], x, 0) for x in (k, v))
    if q_segments is not None:
        visible_BTS &= q_segments[:, :, None] == kv_segments[:, None, :]
    scores_BHTS = scale * jnp.einsum("bthk,bshk->bhts", q, k, precision="highest")
    return jnp.where(visible_BTS[:, None], scores_BHTS, -jnp.inf), q, k, v


def _probs(scores_BHTS, lse_BHT):
    """exp(scores - lse); 0 in rows that see nothing."""
    return jnp.exp(scores_BHTS - jnp.where(lse_BHT == -jnp.inf, 0, lse_BHT)[..., None])


def attention(q_BTHK, k_BSHK, v_BSHV, *, scale, **mask):
    """Softmax attention; see `latent_attention.attention`. Returns (out_BTHV, lse_BTH)."""
    scores_BHTS, _, _, v = _masked_scores(q_BTHK, k_BSHK, v_BSHV, scale, **mask)
    lse_BHT = jax.nn.logsumexp(scores_BHTS, axis=-1)
    out_BTHV = jnp.einsum("bhts,bshv->bthv", _probs(scores_BHTS, lse_BHT), v, precision="highest")
    return out_BTHV.astype(q_BTHK.dtype), lse_BHT.swapaxes(1, 2)


def attention_gradients(q_BTHK, k_BSHK, v_BSHV, out_BTHV, lse_BTH, d_out_BTHV, *, scale, **mask):
    """Derivative of the softmax, written out; see `latent_attention.attention_gradients`. Returns (dq, dk, dv)."""
    einsum = functools.partial(jnp.einsum, precision="highest")
    scores_BHTS, q, k, v = _masked_scores(q_BTHK, k_BSHK, v_BSHV, scale, **mask)
    out, d_out = (x.astype(jnp.float32) for x in (out_BTHV, d_out_BTHV))
    probs_BHTS = _probs(scores_BHTS, lse_BTH.swapaxes(1, 2))
    delta_BHT1 = jnp.sum(out * d_out, axis=-1).swapaxes(1, 2)[..., None]
    d_scores_BHTS = scale * probs_BHTS * (einsum("bthv,bshv->bhts", d_out, v) - delta_BHT1)
    d_q = einsum("bhts,bshk->bthk", d_scores_BHTS, k)
    d_k = einsum("bhts,bthk->bshk", d_scores_BHTS, q)
    d_v = einsum("bhts,bthv->bshv", probs_BHTS, d_out)
    return tuple(x.astype(q_BTHK.dtype) for x in (d_q, d_k, d_v))


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
