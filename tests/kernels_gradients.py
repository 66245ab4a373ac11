"""Oracle of the gradients of attention in float64 NumPy, as `kernels_oracle` is of the outputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def attention_gradients_oracle(
    q, k, v, d_out, d_lse, *, scale, offset=0, lengths=None, q_segments=None, kv_segments=None
):
    """(dq, dk, dv) from those by out and lse, all scores at once; see `latent_attention.attention`."""
    q, k, v, d_out, d_lse = (np.asarray(x, np.float64) for x in (q, k, v, d_out, d_lse))
    batch, queries, keys = *q.shape[:2], k.shape[1]
    t, s = np.arange(queries)[:, None], np.arange(keys)
    visible_BTS = s - t <= np.broadcast_to(np.asarray(offset, np.int64), batch)[:, None, None]
    if lengths is not None:
        visible_BTS = visible_BTS & (s < lengths[:, None, None])
        valid_BS11 = (s < lengths[:, None])[..., None, None]
        k, v = (np.where(valid_BS11, x, 0) for x in (k, v))  # entries beyond may be NaN
    if q_segments is not None and kv_segments is not None:
        visible_BTS = visible_BTS & (q_segments[:, :, None] == kv_segments[:, None, :])
    scores = np.where(visible_BTS[:, None], scale * np.einsum("bthk,bshk->bhts", q, k), -np.inf)
    m = scores.max(-1, keepdims=True)
    p = np.exp(scores - np.where(m == -np.inf, 0, m))
    p /= np.maximum(p.sum(-1, keepdims=True), 1e-300)  # a row that sees nothing sums to 0
    d_p = np.einsum("bthv,bshv->bhts", d_out, v)
    mean = np.sum(p * d_p, -1, keepdims=True)
    d_scores = scale * p * (d_p - mean + d_lse.swapaxes(1, 2)[..., None])
    return (
        np.einsum("bhts,bshk->bthk", d_scores, k),
        np.einsum("bhts,bthk->bshk", d_scores, q),
        np.einsum("bhts,bthv->bshv", p, d_out),
    )


def gradients_by_parts(op, border, arrays, *, q_offset, kv_lengths=None, q_segments=None, kv_segments=None, **options):
    """(dq, dk, dv) by two calls of `attention_gradients`, for the keys before `border` and those from there on.

    Args:
        op: `attention_gradients` of an implementation.
        border: where the keys are parted.
        arrays: q, k, v, then out and lse over all keys, and the gradient by out.
        q_offset: the rest is as for attention over all keys.
    """

    @jax.jit
    def run(q, k, v, *rest):
        d_q, of_parts = 0, []
        for start, stop in ((0, border), (border, k.shape[1])):
            mask = {
                "q_offset": q_offset - start,
                "kv_lengths": None if kv_lengths is None else np.clip(kv_lengths - start, 0, stop - start),
                "q_segments": None if q_segments is None else jnp.asarray(q_segments),
                "kv_segments": None if kv_segments is None else jnp.asarray(kv_segments[:, start:stop]),
            }
            part = functools.partial(op, q, k[:, start:stop], v[:, start:stop], *rest)
            d_q_part, *d_kv = part(**mask, **options)
            d_q, of_parts = d_q + d_q_part, [*of_parts, d_kv]
        return d_q, *(jnp.concatenate(x, axis=1) for x in zip(*of_parts, strict=True))

    return run(*arrays)
