"""Both attention ops in float64, on the device, in chunks: the reference of the benchmarks.

Independent of the tests' oracle, which holds all scores at once.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_DECODE_CHUNK = 2**16
_QUERY_CHUNK = 256


def relative_error(out: Any, expected: np.ndarray) -> float:
    """The norm of the difference over the norm of what is expected; `out` is an array of JAX or PyTorch."""
    if hasattr(out, "detach"):
        out = out.detach().double().cpu().numpy()
    out = np.asarray(out).astype(np.float64).reshape(expected.shape)
    return float(np.linalg.norm(out - expected) / np.linalg.norm(expected))


def decode(q_BTHW, c_PSC, k_rope_PSR, block_table_BN, *, scale: float, scales_P2S=None) -> np.ndarray:
    """out_BTHC of one query token (T = 1) that sees all pages of its row, in full."""
    with jax.enable_x64(True):
        return np.asarray(_decode(q_BTHW, c_PSC, k_rope_PSR, block_table_BN, scales_P2S, scale=scale))


@functools.partial(jax.jit, static_argnames="scale")
def _decode(q_BTHW, c_PSC, k_rope_PSR, block_table_BN, scales_P2S, *, scale):
    (pages_per_row, page_size), c_width = (block_table_BN.shape[1], c_PSC.shape[1]), c_PSC.shape[2]
    chunk = math.gcd(pages_per_row, max(_DECODE_CHUNK // page_size, 1))

    def keys(x_PSX, scale_index, pages):
        x = x_PSX[pages].astype(jnp.float64)
        if scales_P2S is not None:
            x *= scales_P2S[pages, scale_index][..., None]
        return x.reshape(-1, x.shape[-1])

    def row(q_and_pages):
        q_HW, pages_N = q_and_pages

        def one_chunk(state, pages):
            m, total, acc = state
            c_SC, k_rope_SR = keys(c_PSC, 0, pages), keys(k_rope_PSR, 1, pages)
            scores_HS = scale * (q_HW[:, :c_width] @ c_SC.T + q_HW[:, c_width:] @ k_rope_SR.T)
            new_m = jnp.maximum(m, scores_HS.max(-1))
            p_HS, alpha = jnp.exp(scores_HS - new_m[:, None]), jnp.exp(m - new_m)
            return (new_m, total * alpha + p_HS.sum(-1), acc * alpha[:, None] + p_HS @ c_SC), None

        heads = len(q_HW)
        start = jnp.full(heads, -jnp.inf), jnp.zeros(heads), jnp.zeros((heads, c_width))
        (_, total, acc), _ = jax.lax.scan(one_chunk, start, pages_N.reshape(-1, chunk))
        return acc / total[:, None]

    out_BHC = jax.lax.map(row, (q_BTHW[:, 0].astype(jnp.float64), block_table_BN))
    return out_BHC[:, None]


def attention(q_TK, k_TK, v_TV, d_out_TV, *, scale: float) -> tuple[np.ndarray, ...]:
    """(out, dq, dk, dv) of causal attention, one head; d_out is the gradient with respect to out."""
    with jax.enable_x64(True):
        return tuple(np.asarray(x) for x in _attention(q_TK, k_TK, v_TV, d_out_TV, scale=scale))


@functools.partial(jax.jit, static_argnames="scale")
def _attention(q_TK, k_TK, v_TV, d_out_TV, *, scale):
    q, k, v, d_out = (x.astype(jnp.float64) for x in (q_TK, k_TK, v_TV, d_out_TV))
    tokens = len(q)
    chunk = math.gcd(tokens, _QUERY_CHUNK)

    def one_chunk(state, first):
        dk, dv = state
        q_t, d_out_t = (jax.lax.dynamic_slice_in_dim(x, first, chunk) for x in (q, d_out))
        seen = jnp.arange(tokens)[None] <= first + jnp.arange(chunk)[:, None]
        p = jax.nn.softmax(jnp.where(seen, scale * q_t @ k.T, -jnp.inf), axis=-1)
        out_t = p @ v
        d_scores = scale * p * (d_out_t @ v.T - (d_out_t * out_t).sum(-1, keepdims=True))
        return (dk + d_scores.T @ q_t, dv + p.T @ d_out_t), (out_t, d_scores @ k)

    (dk, dv), (out, dq) = jax.lax.scan(one_chunk, (jnp.zeros_like(k), jnp.zeros_like(v)), jnp.arange(0, tokens, chunk))
    return out.reshape(v.shape), dq.reshape(q.shape), dk, dv
