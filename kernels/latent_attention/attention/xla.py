"""Expanded attention in plain XLA: blockwise with online softmax (FlashAttention-2, arXiv 2307.08691).

Loops run only over blocks that some query of the batch can see, so causal attention does half of the work. Arrays are
heads-first inside this file (q_BHTK), so that every einsum is a batched matmul. Scores, softmax and accumulators are
float32; matmuls take their operands in the type of the inputs.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from latent_attention.attention.mask import Mask, make_mask
from latent_attention.call_shapes import AttentionShape
from latent_attention.gpu import Gpu, local_gpu


def _block() -> int:
    """Size of query and key blocks: the scores of one fit the caches of a CPU, or occupy a GPU."""
    return 128 if local_gpu() is None else 512


def _fits_one_block(q: jax.Array, k: jax.Array) -> bool:
    return q.shape[2] * k.shape[2] <= _block() ** 2


def dot(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Einsum that accumulates in float32."""
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _slice(x: jax.Array, start: jax.Array | int, size: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def _visible(mask: Mask, t0: jax.Array | int, rows: int, s0: jax.Array | int, columns: int) -> jax.Array:
    """Mask of the block of scores at (t0, s0): bool [B, 1, rows, columns]."""
    t, s = t0 + jnp.arange(rows)[:, None], s0 + jnp.arange(columns)[None, :]
    # s - t cannot overflow; offset + t could.
    visible = (s - t <= mask.offset_B[:, None, None]) & (s < mask.lengths_B[:, None, None])
    if mask.q_segments_BT is not None and mask.kv_segments_BS is not None:
        q_segments = _slice(mask.q_segments_BT, t0, rows, 1)
        visible &= q_segments[:, :, None] == _slice(mask.kv_segments_BS, s0, columns, 1)[:, None, :]
    return visible[:, None]


def finite(lse: jax.Array) -> jax.Array:
    """Replaces -inf (a row that sees nothing) so that exp(-inf - it) is 0, not NaN."""
    return jnp.where(lse == -jnp.inf, 0.0, lse)


def _blocks(end: jax.Array, size: int) -> jax.Array:
    """Number of blocks of `size` that cover [0, end)."""
    return (jnp.maximum(end, 0) + size - 1) // size


def online_softmax(scores: jax.Array, m_i: jax.Array, l_i: jax.Array):
    """One online softmax step over a block of scores [..., S], from running maxima m_i and row sums l_i [...].

    Returns:
        p = exp(scores - m'), alpha = exp(m_i - m') by which the accumulator is rescaled, and the new m' and l_i.
    """
    new_m_i = jnp.maximum(m_i, jnp.max(scores, axis=-1))
    p = jnp.exp(scores - finite(new_m_i)[..., None])
    alpha = jnp.exp(m_i - finite(new_m_i))
    return p, alpha, new_m_i, l_i * alpha + jnp.sum(p, axis=-1)


def normalize(acc: jax.Array, m_i: jax.Array, l_i: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(out, lse) of an accumulator [..., V], running maxima and row sums [...]; 0 and -inf where nothing is seen."""
    return acc / jnp.where(l_i == 0, 1.0, l_i)[..., None], finite(m_i) + jnp.log(l_i)


def _unblocked(x: jax.Array) -> jax.Array:
    """[blocks, B, H, block, ...] -> [B, H, blocks * block, ...]."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _whole_forward(q, k, v, mask: Mask, scale: float):
    """All scores at once. Returns out_BHTV float32 and lse_BHT."""
    scores = dot("bhtk,bhsk->bhts", q, k) * scale
    scores = jnp.where(_visible(mask, 0, q.shape[2], 0, k.shape[2]), scores, -jnp.inf)
    m_i = jnp.max(scores, axis=-1)
    p = jnp.exp(scores - finite(m_i)[..., None])
    return normalize(dot("bhts,bhsv->bhtv", p.astype(v.dtype), v), m_i, jnp.sum(p, axis=-1))


def _block_backward(q, k, v, d_out, visible, lse, delta, scale):
    """Gradients (dq, dk, dv), float32, of one block of scores; algorithm 2 of FlashAttention-2."""
    scores = dot("bhtk,bhsk->bhts", q, k) * scale
    p = jnp.exp(jnp.where(visible, scores, -jnp.inf) - lse[..., None])
    d_v = dot("bhts,bhtv->bhsv", p.astype(v.dtype), d_out)
    d_p = dot("bhtv,bhsv->bhts", d_out, v)
    d_scores = (p * (d_p - delta[..., None]) * scale).astype(q.dtype)
    return dot("bhts,bhsk->bhtk", d_scores, k), dot("bhts,bhtk->bhsk", d_scores, q), d_v


def _pad(x: jax.Array, axis: int, multiple: int, value: float = 0) -> jax.Array:
    if x.shape[axis] % multiple == 0:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths, constant_values=value)


def _padded(mask: Mask, block: int) -> Mask:
    """Pads the segments to whole blocks. Padded keys lie beyond every length, whatever their segment."""
    if mask.q_segments_BT is None or mask.kv_segments_BS is None:
        return mask
    return mask._replace(
        q_segments_BT=_pad(mask.q_segments_BT, 1, block), kv_segments_BS=_pad(mask.kv_segments_BS, 1, block)
    )


def _blocked_forward(q, k, v, mask: Mask, scale: float):
    """Loops over query blocks and, for each, the key blocks it can see. Returns out_BHTV float32 and lse_BHT."""
    queries, keys, block = q.shape[2], k.shape[2], _block()
    q, k, v = (_pad(x, 2, block) for x in (q, k, v))
    mask = _padded(mask, block)
    last_offset, last_length = jnp.minimum(jnp.max(mask.offset_B), keys), jnp.max(mask.lengths_B)

    def query_block(i):
        t0 = i * block
        q_i = _slice(q, t0, block, 2)

        def key_block(j, carry):
            acc, m_i, l_i = carry
            s0 = j * block
            k_j, v_j = (_slice(x, s0, block, 2) for x in (k, v))
            scores = dot("bhtk,bhsk->bhts", q_i, k_j) * scale
            scores = jnp.where(_visible(mask, t0, block, s0, block), scores, -jnp.inf)
            p, alpha, m_i, l_i = online_softmax(scores, m_i, l_i)
            return acc * alpha[..., None] + dot("bhts,bhsv->bhtv", p.astype(v.dtype), v_j), m_i, l_i

        rows = (*q.shape[:2], block)
        start = jnp.zeros((*rows, v.shape[-1])), jnp.full(rows, -jnp.inf), jnp.zeros(rows)
        end = jnp.minimum(last_offset + t0 + block, last_length)
        return normalize(*jax.lax.fori_loop(0, _blocks(end, block), key_block, start))

    out_lse = jax.lax.map(query_block, jnp.arange(q.shape[2] // block))
    return tuple(_unblocked(x)[:, :, :queries] for x in out_lse)


def _blocked_backward(q, k, v, d_out, mask: Mask, lse, delta, scale: float):
    """Loops over key blocks and, for each, the query blocks that can see it. Returns (dq, dk, dv) float32."""
    queries, keys, block = q.shape[2], k.shape[2], _block()
    last_offset, last_length = jnp.minimum(jnp.max(mask.offset_B), keys), jnp.max(mask.lengths_B)
    q, k, v, d_out, delta = (_pad(x, 2, block) for x in (q, k, v, d_out, delta))
    lse = _pad(lse, 2, block, jnp.inf)  # so that p is 0 for padded queries
    mask = _padded(mask, block)
    q_blocks = q.shape[2] // block

    def key_block(d_q, j):
        s0 = j * block
        k_j, v_j = (_slice(x, s0, block, 2) for x in (k, v))

        def query_block(i, carry):
            d_q, d_k, d_v = carry
            t0 = i * block
            visible = _visible(mask, t0, block, s0, block)
            q_i, d_out_i, lse_i, delta_i = (_slice(x, t0, block, 2) for x in (q, d_out, lse, delta))
            d_q_i, d_k_i, d_v_i = _block_backward(q_i, k_j, v_j, d_out_i, visible, lse_i, delta_i, scale)
            d_q_i += _slice(d_q, t0, block, 2)
            return jax.lax.dynamic_update_slice_in_dim(d_q, d_q_i, t0, 2), d_k + d_k_i, d_v + d_v_i

        first = jnp.where(s0 < last_length, jnp.clip((s0 - last_offset) // block, 0, q_blocks), q_blocks)
        start = d_q, jnp.zeros(k_j.shape, jnp.float32), jnp.zeros(v_j.shape, jnp.float32)
        d_q, d_k, d_v = jax.lax.fori_loop(first, q_blocks, query_block, start)
        return d_q, (d_k, d_v)

    d_q, (d_k, d_v) = jax.lax.scan(key_block, jnp.zeros(q.shape, jnp.float32), jnp.arange(k.shape[2] // block))
    return d_q[:, :, :queries], _unblocked(d_k)[:, :, :keys], _unblocked(d_v)[:, :, :keys]


def _attend(q, k, v, mask: Mask, scale: float) -> tuple[jax.Array, jax.Array]:
    """Forward pass over heads-first arrays: (out_BHTV, lse_BHT)."""
    out, lse = (_whole_forward if _fits_one_block(q, k) else _blocked_forward)(q, k, v, mask, scale)
    return out.astype(q.dtype), lse


_attention = jax.custom_vjp(_attend, nondiff_argnums=(4,))


def _attention_forward(q, k, v, mask: Mask, scale: float):
    # Named, so that a remat policy can save them: the backward pass then does not recompute the forward pass.
    out, lse = (checkpoint_name(x, "latent_attention") for x in _attend(q, k, v, mask, scale))
    return (out, lse), (q, k, v, mask, out, lse)


def _attention_backward(scale: float, residuals, cotangents):
    q, k, v, mask, out, lse = residuals
    d_out, d_lse = cotangents
    d_lse = jnp.where(lse == -jnp.inf, 0, d_lse)  # a query that sees nothing has no gradient, whatever its cotangent
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - d_lse
    if _fits_one_block(q, k):
        visible = _visible(mask, 0, q.shape[2], 0, k.shape[2])
        grads = _block_backward(q, k, v, d_out, visible, finite(lse), delta, scale)
    else:
        grads = _blocked_backward(q, k, v, d_out, mask, finite(lse), delta, scale)
    d_q, d_k, d_v = (g.astype(x.dtype) for g, x in zip(grads, (q, k, v), strict=True))
    return d_q, d_k, d_v, None


_attention.defvjp(_attention_forward, _attention_backward)


def _heads_first(q_BTHK, k_BSHK, v_BSHV, q_offset, kv_lengths, q_segments, kv_segments):
    """q, k, v, heads-first and without what lies beyond the lengths, and the mask."""
    q, k, v = (x.swapaxes(1, 2) for x in (q_BTHK, k_BSHK, v_BSHV))
    if kv_lengths is not None:
        valid_B1S1 = (jnp.arange(k.shape[2]) < kv_lengths[:, None])[:, None, :, None]
        k, v = (jnp.where(valid_B1S1, x, 0) for x in (k, v))  # entries beyond the length may be NaN, and 0 x NaN is NaN
    return q, k, v, make_mask(q_BTHK, k_BSHK, q_offset, kv_lengths, q_segments, kv_segments)


def attention(q_BTHK, k_BSHK, v_BSHV, *, scale, **mask):
    """See `latent_attention.attention`. Returns (out_BTHV, lse_BTH)."""
    out, lse = _attention(*_heads_first(q_BTHK, k_BSHK, v_BSHV, **mask), scale)
    return out.swapaxes(1, 2), lse.swapaxes(1, 2)


def attention_gradients(q_BTHK, k_BSHK, v_BSHV, out_BTHV, lse_BTH, d_out_BTHV, d_lse_BTH=0.0, *, scale, **mask):
    """See `latent_attention.attention_gradients`; `d_lse_BTH` is the gradient by `lse_BTH`."""
    out, lse, d_out = (x.swapaxes(1, 2) for x in (out_BTHV, lse_BTH, d_out_BTHV))
    d_lse = jnp.broadcast_to(d_lse_BTH, lse_BTH.shape).swapaxes(1, 2)
    residuals = *_heads_first(q_BTHK, k_BSHK, v_BSHV, **mask), out, lse
    d_q, d_k, d_v, _ = _attention_backward(scale, residuals, (d_out, d_lse))
    return tuple(x.swapaxes(1, 2) for x in (d_q, d_k, d_v))


def why_not_attention(shape: AttentionShape, gpu: Gpu | None) -> str | None:
    """None: XLA runs everywhere."""
    return None
