"""Expanded attention in Triton, launched from JAX by jax-triton; computes which blocks the kernels visit."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from latent_attention import jax_triton_loader
from latent_attention.attention.mask import Mask, make_mask
from latent_attention.call_shapes import AttentionShape
from latent_attention.gpu import Gpu, local_gpu

_LOG2E = math.log2(math.e)
MAX_WIDTH = 256
_MAX_GRID = 65535


class Tiling(NamedTuple):
    """Block sizes and launch options of one kernel."""

    queries: int
    """Rows of a block of queries."""
    keys: int
    """Rows of a block of keys and values."""
    warps: int
    stages: int
    """Depth of the software pipeline: blocks of the inner loop in shared memory at a time."""


Tilings = dict[int, dict[str, Tiling]]

_LITTLE_SHARED_MEMORY: Tilings = {  # sm_86, sm_89, sm_120: 99 KiB a CTA
    128: {"forward": Tiling(128, 64, 8, 3), "d_q": Tiling(128, 64, 8, 2), "d_kv": Tiling(64, 64, 4, 2)},
    256: {"forward": Tiling(128, 32, 8, 2), "d_q": Tiling(128, 32, 8, 2), "d_kv": Tiling(64, 64, 8, 2)},
    320: {"forward": Tiling(128, 32, 8, 2), "d_q": Tiling(64, 32, 4, 2), "d_kv": Tiling(32, 64, 8, 2)},
    512: {"forward": Tiling(64, 32, 8, 2), "d_q": Tiling(64, 32, 8, 1), "d_kv": Tiling(32, 32, 8, 1)},
}
_AMPERE: Tilings = {  # sm_80, sm_87: 163 KiB
    128: _LITTLE_SHARED_MEMORY[128],
    256: _LITTLE_SHARED_MEMORY[256] | {"forward": Tiling(128, 64, 8, 3)},
    320: _LITTLE_SHARED_MEMORY[320] | {"forward": Tiling(128, 64, 8, 2), "d_q": Tiling(128, 32, 8, 2)},
    512: _LITTLE_SHARED_MEMORY[512],
}
_HOPPER: Tilings = {  # 227 KiB
    128: {"forward": Tiling(128, 128, 8, 2), "d_q": Tiling(128, 64, 8, 2), "d_kv": Tiling(64, 128, 8, 2)},
    256: {"forward": Tiling(128, 64, 8, 3), "d_q": Tiling(128, 64, 8, 2), "d_kv": Tiling(64, 128, 8, 2)},
    320: {"forward": Tiling(128, 64, 8, 3), "d_q": Tiling(128, 64, 8, 2), "d_kv": Tiling(32, 128, 8, 2)},
    512: {"forward": Tiling(64, 64, 8, 2), "d_q": Tiling(64, 32, 8, 2), "d_kv": Tiling(32, 32, 8, 1)},
}
"""Tilings by the padded width of query and value tiles together, at most the key. Compiled for these GPUs, no kernel
spills more than 180 bytes a thread, and Hopper's at most 16; 192-wide keys before Hopper are the worst."""


def select_tiling(kernel: str, width: int, gpu: Gpu | None) -> Tiling:
    """Tiling of kernel `forward`, `d_q` or `d_kv`, if query and value tiles together have this padded width."""
    memory = 0 if gpu is None else gpu.shared_memory
    table = _LITTLE_SHARED_MEMORY
    if gpu is not None and memory >= 227 << 10:
        table = _HOPPER
    elif memory >= 163 << 10:
        table = _AMPERE
    return next(kernels[kernel] for limit, kernels in table.items() if width <= limit)


def _widths(k: int, v: int) -> dict[str, int]:
    """Width constants of the kernels: K is read as K1 + K2, V as V1, powers of two (192 as 128 + 64, 96 as 64 + 32)."""
    k1, k2 = max(16, 1 << (k - 1).bit_length()), 0
    half = k1 // 2
    if half >= 16 and k > half and (rest := max(16, 1 << (k - half - 1).bit_length())) < half:
        k1, k2 = half, rest
    return {"K": k, "K1": k1, "K2": k2, "V": v, "V1": max(16, 1 << (v - 1).bit_length())}


def _cdiv(x, size: int):
    return (x + size - 1) // size


def ranges(mask: Mask, queries: int, keys: int, blocks: Tiling, by_query: bool) -> jax.Array:
    """Block ranges for `triton_kernels`, int32 [B, own blocks, 4]; own blocks are queries if `by_query`, else keys.

    With segments they are tight where segment ids do not decrease; else some visited blocks are fully masked.
    """
    offset, length = mask.offset_B[:, None], mask.lengths_B[:, None]
    q_blocks, kv_blocks = _cdiv(queries, blocks.queries), _cdiv(keys, blocks.keys)
    if by_query:
        t0 = jnp.arange(q_blocks) * blocks.queries
        last = jnp.minimum(t0 + blocks.queries, queries) - 1
        full = jnp.clip(jnp.minimum(offset + t0 + 1, length), 0) // blocks.keys
        to = _cdiv(jnp.clip(jnp.minimum(offset + last + 1, length), 0), blocks.keys)
        full_from = first = jnp.zeros_like(to)
    else:
        s0 = jnp.arange(kv_blocks) * blocks.keys
        to = jnp.where((s0 < length) & (s0 - offset < queries), q_blocks, 0)
        first = jnp.clip(s0 - offset, 0) // blocks.queries
        full_from = _cdiv(jnp.clip(s0 + blocks.keys - 1 - offset, 0), blocks.queries)
        full = jnp.where(s0 + blocks.keys <= length, queries // blocks.queries, 0)
    first, full_from, full, to = (jnp.broadcast_to(x, to.shape) for x in (first, full_from, full, to))
    if mask.q_segments_BT is not None and mask.kv_segments_BS is not None:
        own, other = _extremes(mask.q_segments_BT, blocks.queries), _extremes(mask.kv_segments_BS, blocks.keys)
        own, other = (own, other) if by_query else (other, own)
        first, full_from, full, to = _same_segments(own, other, (first, full_from, full, to))
    first = jnp.minimum(first, to)
    full_from = jnp.clip(full_from, first, to)
    return jnp.stack([first, full_from, jnp.clip(full, full_from, to), to], -1).astype(jnp.int32)


def _same_segments(own: tuple, other: tuple, ends: tuple) -> tuple:
    """Narrows ranges (first, full from, full to, to), [B, own blocks] each, to blocks that may share a segment.

    In batches of own blocks: at 1M tokens the matrix of all pairs of blocks would be gigabytes.
    """
    other_low, other_high = other
    n = jnp.arange(other_low.shape[1])

    def narrow(own_block):
        low, high, first, full_from, full, to = (x[:, None] for x in own_block)
        overlaps = (low <= other_high) & (other_low <= high) & (n >= first) & (n < to)
        one = (low == high) & (low == other_low) & (low == other_high)
        same = one & (n >= full_from) & (n < full)
        full_from = jnp.min(jnp.where(same, n, n.size), -1)
        full = jnp.min(jnp.where(~same & (n >= full_from[:, None]), n, n.size), -1)
        return jnp.min(jnp.where(overlaps, n, n.size), -1), full_from, full, jnp.max(jnp.where(overlaps, n + 1, 0), -1)

    columns = jax.lax.map(narrow, tuple(x.T for x in (*own, *ends)), batch_size=256)
    return tuple(x.T for x in columns)


def _extremes(segments: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Smallest and largest segment id of each block, [B, blocks] each."""
    padded = jnp.pad(segments, ((0, 0), (0, -segments.shape[1] % size)), mode="edge")
    blocks = padded.reshape(segments.shape[0], -1, size)
    return jnp.min(blocks, -1), jnp.max(blocks, -1)


def _launch(name: str, mask: Mask, scale: float, q, k, v, rest: tuple, out_shape: tuple, by_query: bool):
    """Runs the kernel of this name, whose arguments are q, k, v, rest, mask, scales, sizes, outputs, constants."""
    jax_triton = jax_triton_loader.load()
    from latent_attention.attention import triton_kernels  # needs Triton, which is installed with CUDA only

    (batch, queries, heads, _), keys = q.shape, k.shape[1]
    widths = _widths(q.shape[3], v.shape[3])
    gpu = local_gpu()
    tiling = select_tiling(name, widths["K1"] + widths["K2"] + widths["V1"], gpu)
    segments = mask.q_segments_BT is not None
    # Without segments the kernel reads neither; jax-triton drops None, so any array stands for them.
    masks = mask if segments else mask._replace(q_segments_BT=mask.offset_B, kv_segments_BS=mask.offset_B)
    scales = [np.float32(scale * _LOG2E)] if name == "forward" else [np.float32(scale), np.float32(scale * _LOG2E)]
    blocks = _cdiv(queries, tiling.queries) if by_query else _cdiv(keys, tiling.keys)
    return jax_triton.triton_call(
        q, k, v, *rest, masks.offset_B, masks.lengths_B, ranges(mask, queries, keys, tiling, by_query),
        masks.q_segments_BT, masks.kv_segments_BS, *scales, queries, keys,
        kernel=getattr(triton_kernels, f"{name}_kernel"), name=f"latent_attention_{name}",
        out_shape=out_shape, grid=(blocks, batch * heads), num_warps=tiling.warps, num_stages=tiling.stages,
        compute_capability=None if gpu is None else 10 * gpu.capability[0] + gpu.capability[1],
        HEADS=heads, SEGMENTS=segments, Q_BLOCK=tiling.queries, KV_BLOCK=tiling.keys, **widths,
    )  # fmt: skip


def _attend(q, k, v, mask: Mask, scale: float) -> tuple[jax.Array, jax.Array]:
    """Forward pass: (out_BTHV, lse_BHT)."""
    (batch, queries, heads, _), width = q.shape, v.shape[3]
    out_shape = (
        jax.ShapeDtypeStruct((batch, queries, heads, width), q.dtype),
        jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32),
    )
    return _launch("forward", mask, scale, q, k, v, (), out_shape, True)


_attention = jax.custom_vjp(_attend, nondiff_argnums=(4,))


def _attention_forward(q, k, v, mask: Mask, scale: float):
    # Named, so that a remat policy can save them: the backward pass then does not recompute the forward pass.
    out, lse = (checkpoint_name(x, "latent_attention") for x in _attend(q, k, v, mask, scale))
    return (out, lse), (q, k, v, mask, out, lse)


def _attention_backward(scale: float, residuals, cotangents):
    q, k, v, mask, out, lse = residuals
    d_out, d_lse = cotangents
    unseen = lse == -jnp.inf
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    rest = d_out, jnp.where(unseen, jnp.inf, lse * _LOG2E), jnp.where(unseen, 0, delta - d_lse)
    like = functools.partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype))
    (d_q,) = _launch("d_q", mask, scale, q, k, v, rest, like((q,)), True)
    d_k, d_v = _launch("d_kv", mask, scale, q, k, v, rest, like((k, v)), False)
    return d_q, d_k, d_v, None


_attention.defvjp(_attention_forward, _attention_backward)


def attention(q_BTHK, k_BSHK, v_BSHV, *, scale, **mask):
    """See `latent_attention.attention`. Returns (out_BTHV, lse_BTH)."""
    visible = make_mask(q_BTHK, k_BSHK, **mask)
    if scale < 0:  # the forward kernel takes the row maximum before it scales
        q_BTHK, scale = -q_BTHK, -scale
    out_BTHV, lse_BHT = _attention(q_BTHK, k_BSHK, v_BSHV, visible, float(scale))
    return out_BTHV, lse_BHT.swapaxes(1, 2)


def attention_gradients(q_BTHK, k_BSHK, v_BSHV, out_BTHV, lse_BTH, d_out_BTHV, d_lse_BTH=0.0, *, scale, **mask):
    """See `latent_attention.attention_gradients`; `d_lse_BTH` is the gradient by `lse_BTH`."""
    lse, d_lse = (x.swapaxes(1, 2) for x in (lse_BTH, jnp.broadcast_to(d_lse_BTH, lse_BTH.shape)))
    residuals = q_BTHK, k_BSHK, v_BSHV, make_mask(q_BTHK, k_BSHK, **mask), out_BTHV, lse
    d_q, d_k, d_v, _ = _attention_backward(float(scale), residuals, (d_out_BTHV, d_lse))
    return d_q, d_k, d_v


def why_not_attention(shape: AttentionShape, gpu: Gpu | None) -> str | None:
    """Why these kernels cannot run calls of this shape on this GPU, or None."""
    if gpu is None or gpu.capability < (8, 0):
        what = f"this is {gpu.name}" if gpu else "there is none"
        return f"Triton uses tensor cores only on NVIDIA GPUs from sm_80 on, {what}"
    if jax_triton_loader.why_not() is not None:
        return jax_triton_loader.why_not()
    if shape.dtype not in ("float16", "bfloat16"):
        return f"the kernels are for float16 and bfloat16, not {shape.dtype}"
    if max(shape.qk_width, shape.v_width) > MAX_WIDTH:
        return f"the kernels are for head widths up to {MAX_WIDTH}, not {shape.qk_width} and {shape.v_width}"
    if shape.batch * shape.heads > _MAX_GRID:
        return f"a launch has at most {_MAX_GRID} rows x heads, this has {shape.batch * shape.heads}"
    return None
