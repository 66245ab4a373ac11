"""Oracle of the gradients of attention in float64 NumPy, as `kernels_oracle` is of the outputs."""

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
