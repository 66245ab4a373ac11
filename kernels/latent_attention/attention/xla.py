"""Expanded attention in plain XLA: online softmax over blocks (FlashAttention-2, arXiv 2307.08691), one if that is all.

Loops run only over blocks that some query of the batch can see, so causal attention does half of the work. Heads lead
inside this file (q_BHTK), so that every product is a batch of plain matrix products. Scores, softmax and all sums are
float32; the products read their operands in the type of the inputs.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from latent_attention.attention.mask import Mask, make_mask
from latent_attention.call_shapes import AttentionShape
from latent_attention.gpu import Gpu, local_gpu


def _block() -> int:
    """Queries and keys of a block: scores that fit the caches of a CPU, or that keep a GPU busy."""
    return 128 if local_gpu() is None else 512


def _fits_one_block(q: jax.Array, k: jax.Array) -> bool:
    return q.shape[2] * k.shape[2] <= _block() ** 2


def dot(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Product that sums in float32."""
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _slice(x: jax.Array, start: jax.Array | int, size: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def _visible(mask: Mask, t0: jax.Array | int, rows: int, s0: jax.Array | int, columns: int) -> jax.Array:
    """bool [B, 1, rows, columns] of the block at (t0, s0)."""
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
    """How many blocks of `size` cover [0, end)."""
    return (jnp.maximum(end, 0) + size - 1) // size


def online_softmax(scores: jax.Array, peak: jax.Array, total: jax.Array):
    """One more block of scores [..., S]: (its weights, shrink factor of what was summed before, peak, total)."""
    new_peak = jnp.maximum(peak, jnp.max(scores, axis=-1))
    weights = jnp.exp(scores - finite(new_peak)[..., None])
    shrink = jnp.exp(peak - finite(new_peak))
    return weights, shrink, new_peak, total * shrink + jnp.sum(weights, axis=-1)


def normalised(out: jax.Array, peak: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(out, lse) of sums of weights relative to exp(peak); 0 and -inf where nothing was seen."""
    return out / jnp.where(total == 0, 1.0, total)[..., None], finite(peak) + jnp.log(total)


def _unblocked(x: jax.Array) -> jax.Array:
    """[blocks, B, H, block, ...] -> [B, H, blocks * block, ...]."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _whole_forward(q, k, v, mask: Mask, scale: float):
    """All scores at once. Returns out_BHTV float32 and lse_BHT."""
    scores = dot("bhtk,bhsk->bhts", q, k) * scale
    scores = jnp.where(_visible(mask, 0, q.shape[2], 0, k.shape[2]), scores, -jnp.inf)
    peak = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - finite(peak)[..., None])
    out = dot("bhts,bhsv->bhtv", weights.astype(v.dtype), v)
    return normalised(out, peak, jnp.sum(weights, axis=-1))


def _block_backward(q, k, v, d_out, visible, lse, delta, scale):
    """Gradients (dq, dk, dv), float32, of one block of scores; algorithm 2 of FlashAttention-2."""
    scores = dot("bhtk,bhsk->bhts", q, k) * scale
    weights = jnp.exp(jnp.where(visible, scores, -jnp.inf) - lse[..., None])
    d_v = dot("bhts,bhtv->bhsv", weights.astype(v.dtype), d_out)
    d_weights = dot("bhtv,bhsv->bhts", d_out, v)
    d_scores = (weights * (d_weights - delta[..., None]) * scale).astype(q.dtype)
    return dot("bhts,bhsk->bhtk", d_scores, k), dot("bhts,bhtk->bhsk", d_scores, q), d_v


def _pad(x: jax.Array, axis: int, multiple: int, value: float = 0) -> jax.Array:
    if x.shape[axis] % multiple == 0:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths, constant_values=value)


def _padded(mask: Mask, block: int) -> Mask:
    """Padded keys lie beyond every length, so the value of their segments does not matter."""
    if mask.q_segments_BT is None or mask.kv_segments_BS is None:
        return mask
    return mask._replace(
        q_segments_BT=_pad(mask.q_segments_BT, 1, block), kv_segments_BS=_pad(mask.kv_segments_BS, 1, block)
    )


def _blocked_forward(q, k, v, mask: Mask, scale: float):
    """Query blocks in turn, each over the key blocks it can see. Returns out_BHTV float32 and lse_BHT."""
    queries, keys, block = q.shape[2], k.shape[2], _block()
    q, k, v = (_pad(x, 2, block) for x in (q, k, v))
    mask = _padded(mask, block)
    last_offset, last_length = jnp.minimum(jnp.max(mask.offset_B), keys), jnp.max(mask.lengths_B)

    def query_block(i):
        t0 = i * block
        q_i = _slice(q, t0, block, 2)

        def key_block(j, carry):
            out, peak, total = carry
            s0 = j * block
            k_j, v_j = (_slice(x, s0, block, 2) for x in (k, v))
            scores = dot("bhtk,bhsk->bhts", q_i, k_j) * scale
            scores = jnp.where(_visible(mask, t0, block, s0, block), scores, -jnp.inf)
            weights, shrink, peak, total = online_softmax(scores, peak, total)
            return out * shrink[..., None] + dot("bhts,bhsv->bhtv", weights.astype(v.dtype), v_j), peak, total

        rows = (*q.shape[:2], block)
        start = jnp.zeros((*rows, v.shape[-1])), jnp.full(rows, -jnp.inf), jnp.zeros(rows)
        end = jnp.minimum(last_offset + t0 + block, last_length)
        return normalised(*jax.lax.fori_loop(0, _blocks(end, block), key_block, start))

    out_lse = jax.lax.map(query_block, jnp.arange(q.shape[2] // block))
    return tuple(_unblocked(x)[:, :, :queries] for x in out_lse)


def _blocked_backward(q, k, v, d_out, mask: Mask, lse, delta, scale: float):
    """Key blocks in turn, each over the query blocks that can see it. Returns (dq, dk, dv) float32."""
    queries, keys, block = q.shape[2], k.shape[2], _block()
    last_offset, last_length = jnp.minimum(jnp.max(mask.offset_B), keys), jnp.max(mask.lengths_B)
    q, k, v, d_out, delta = (_pad(x, 2, block) for x in (q, k, v, d_out, delta))
    lse = _pad(lse, 2, block, jnp.inf)  # so that padded queries weigh nothing
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
    """(out_BHTV, lse_BHT) of heads-first arrays."""
    out, lse = (_whole_forward if _fits_one_block(q, k) else _blocked_forward)(q, k, v, mask, scale)
    return out.astype(q.dtype), lse


_attention = jax.custom_vjp(_attend, nondiff_argnums=(4,))


def _attention_forward(q, k, v, mask: Mask, scale: float):
    # Named, so that a remat policy can keep them and spare the backward pass this computation.
    out, lse = (checkpoint_name(x, "latent_attention") for x in _attend(q, k, v, mask, scale))
    return (out, lse), (q, k, v, mask, out, lse)


def _attention_backward(scale: float, residuals, cotangents):
    q, k, v, mask, out, lse = residuals
    d_out, d_lse = cotangents
    d_lse = jnp.where(lse == -jnp.inf, 0, d_lse)  # a row that sees nothing has no gradient, whatever comes in
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - d_lse
    if _fits_one_block(q, k):
        visible = _visible(mask, 0, q.shape[2], 0, k.shape[2])
        grads = _block_backward(q, k, v, d_out, visible, finite(lse), delta, scale)
    else:
        grads = _blocked_backward(q, k, v, d_out, mask, finite(lse), delta, scale)
    d_q, d_k, d_v = (g.astype(x.dtype) for g, x in zip(grads, (q, k, v), strict=True))
    return d_q, d_k, d_v, None


_attention.defvjp(_attention_forward, _attention_backward)


def attention(q_BTHK, k_BSHK, v_BSHV, *, scale, q_offset, kv_lengths, q_segments, kv_segments):
    """See `latent_attention.attention`. Returns (out_BTHV, lse_BTH)."""
    q, k, v = (x.swapaxes(1, 2) for x in (q_BTHK, k_BSHK, v_BSHV))
    mask = make_mask(q_BTHK, k_BSHK, q_offset, kv_lengths, q_segments, kv_segments)
    if kv_lengths is not None:
        held_B1S1 = (jnp.arange(k.shape[2]) < kv_lengths[:, None])[:, None, :, None]
        k, v = (jnp.where(held_B1S1, x, 0) for x in (k, v))  # what is not held may be NaN, and 0 x NaN is NaN
    out, lse = _attention(q, k, v, mask, scale)
    return out.swapaxes(1, 2), lse.swapaxes(1, 2)


def gradients(q_BTHK, k_BSHK, v_BSHV, out_BTHV, lse_BHT, d_out_BTHV, d_lse_BHT, *, scale, q_offset, kv_lengths):
    """(dq, dk, dv) for another implementation's forward pass. What lies beyond the lengths must not be NaN."""
    q, k, v, out, d_out = (x.swapaxes(1, 2) for x in (q_BTHK, k_BSHK, v_BSHV, out_BTHV, d_out_BTHV))
    residuals = q, k, v, make_mask(q_BTHK, k_BSHK, q_offset, kv_lengths), out, lse_BHT
    d_q, d_k, d_v, _ = _attention_backward(scale, residuals, (d_out, d_lse_BHT))
    return tuple(x.swapaxes(1, 2) for x in (d_q, d_k, d_v))


def why_not_attention(shape: AttentionShape, gpu: Gpu | None) -> str | None:
    """It runs everywhere."""
    return None
