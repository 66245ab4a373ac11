"""A decoder layer of a batch-1 decode step in Triton, launched from JAX: before and after the attention, and logits.

`latent_attention.decode` runs between the two kernels of a layer. With one token every matmul is a GEMV, bound by
reading the weights, which these kernels do without a pause; for more tokens at a time, matmuls are faster.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latent_attention import jax_triton_loader
from latent_attention.call_shapes import LayerShape
from latent_attention.gpu import Gpu, local_gpu

_AMPERE = (8, 0)
_WARPS = 16
"""Warps of a program. One program runs on each SM, so its 512 threads may use all registers, 128 each."""


def why_not(dtype: str, gpu: Gpu | None) -> str | None:
    """Why the kernels cannot run here, or None if they can."""
    if gpu is None:
        return "Triton needs an NVIDIA GPU"
    if gpu.capability < _AMPERE or dtype not in ("bfloat16", "float16"):
        return f"it takes 16-bit types on Ampere and newer, not {dtype} on {gpu.name}"
    return jax_triton_loader.why_not()


def init_counter() -> jax.Array:
    """Counter of the grid barriers, passed from each kernel to the next.

    It overflows after 2^31 / (5 barriers * programs) layers: 3 million on 132 SMs.
    """
    return jnp.zeros(1, jnp.int32)


def before_attention(
    shape: LayerShape, weights: Mapping[str, Any], h_D: jax.Array, cos: jax.Array, sin: jax.Array, length: jax.Array,
    cache: tuple[jax.Array, jax.Array, jax.Array | None], counter: jax.Array, *, eps: float,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array | None], jax.Array]:  # fmt: skip
    """Computes absorbed queries of one token and appends it to the cache; equations 9 to 15 of DeepSeek-V2.

    Args:
        shape: widths of the layer.
        weights: the layer's, by Hugging Face's names; norms are arrays, matrices have `rows` [out, in] and
            `scale_out` [out], float32, or None where they are not in 8 bits.
        h_D: the hidden state, 16 bits.
        cos: float32 [R/2], for the position of the token.
        sin: like `cos`.
        length: int32 [1], number of tokens that the cache holds; where it is full, nothing is written.
        cache: c [1, S, C], k_rope [1, S, R] and, of an int8 cache, scales [1, 2, S]; updated in place.
        counter: see `init_counter`.
        eps: epsilon of the RMSNorms.

    Returns:
        q [1, 1, H, C + R], the cache and the counter.
    """
    attn = weights["self_attn"]
    q_a, kv_a, q_b, kv_b = (attn[name] for name in ("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj"))
    c, k_rope, scales = cache
    out_shape = [
        _like((1, 1, shape.H, shape.C + shape.R), h_D), _like(shape.Q, h_D), _like(shape.C + shape.R, h_D),
        _like(shape.H * (shape.N + shape.R), h_D), _like(c.shape, c), _like(k_rope.shape, k_rope),
    ]  # fmt: skip
    aliases = {15: 4, 16: 5, 17: 6, 18: 7}  # of argument and output: c, k_rope, scales, counter
    # jax-triton drops None: without scales, an array of one element takes their place and is never read.
    scales_or_dummy = jnp.zeros(1, jnp.float32) if scales is None else scales
    out_shape += [_like(scales_or_dummy.shape, scales_or_dummy), _like(1, counter)]
    q, _, _, _, c, k_rope, scales_or_dummy, counter = _call(
        "before_attention_kernel", h_D, weights["input_layernorm"], q_a.rows, _scale(q_a), kv_a.rows, _scale(kv_a),
        attn["q_a_layernorm"], q_b.rows, _scale(q_b), attn["kv_a_layernorm"], kv_b.rows, _scale(kv_b), cos, sin,
        length, c, k_rope, scales_or_dummy, counter, np.float32(eps), c.shape[1], out_shape=out_shape, aliases=aliases,
        D=shape.D, Q=shape.Q, C=shape.C, R=shape.R, N=shape.N, V=shape.V, H=shape.H, C_PADDED=_next_power_of_2(shape.C),
        N_PADDED=_next_power_of_2(shape.N), INT8=q_a.scale_out is not None, CACHE_INT8=scales is not None,
        CHUNK=_chunk(q_a), COLUMNS=min(64, _next_power_of_2(shape.C)),
    )  # fmt: skip
    return q, (c, k_rope, None if scales is None else scales_or_dummy), counter


def after_attention(
    shape: LayerShape, weights: Mapping[str, Any], h_D: jax.Array, out_1THC: jax.Array, counter: jax.Array, *,
    eps: float,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Computes the hidden state after the layer: value and output projections, feed-forward, residuals.

    Args:
        shape: see `before_attention`.
        weights: see `before_attention`.
        h_D: the input of the layer.
        out_1THC: output of `latent_attention.decode`, [1, 1, H, C].
        counter: see `init_counter`.
        eps: epsilon of the RMSNorms.

    Returns:
        The output [D] and the counter.
    """
    attn, mlp = weights["self_attn"], weights["mlp"]
    kv_b, o, gate, up, down = attn["kv_b_proj"], attn["o_proj"], mlp["gate_proj"], mlp["up_proj"], mlp["down_proj"]
    out_shape = [_like(n, h_D) for n in (shape.D, shape.H * shape.V, shape.D, shape.F)] + [_like(1, counter)]
    h_D, _, _, _, counter = _call(
        "after_attention_kernel", h_D, out_1THC, kv_b.rows, _scale(kv_b), o.rows, _scale(o),
        weights["post_attention_layernorm"], gate.rows, _scale(gate), up.rows, _scale(up), down.rows, _scale(down),
        counter, np.float32(eps), out_shape=out_shape, aliases={13: 4},
        D=shape.D, C=shape.C, C_PADDED=_next_power_of_2(shape.C), N=shape.N, V=shape.V, H=shape.H, F=shape.F,
        INT8=o.scale_out is not None, CHUNK=_chunk(o),
    )  # fmt: skip
    return h_D, counter


def logits(h_D: jax.Array, norm_D: jax.Array, head_XD: jax.Array, *, eps: float) -> jax.Array:
    """Logits float32 [X]: RMSNorm(h), with the weight norm_D, times the head, which is in 16 bits."""
    return _call(
        "logits_kernel", h_D, norm_D, head_XD, np.float32(eps),
        out_shape=[jax.ShapeDtypeStruct((head_XD.shape[0],), jnp.float32)], D=h_D.size, X=head_XD.shape[0], CHUNK=256,
    )[0]  # fmt: skip


def _call(kernel: str, *arguments, out_shape: list, aliases: dict[int, int] | None = None, **constants) -> list:
    jax_triton = jax_triton_loader.load()
    from latent_attention.decode_layer import triton_kernels  # needs Triton, which is installed with CUDA only

    gpu = local_gpu()
    if gpu is None:
        raise RuntimeError("Triton needs an NVIDIA GPU")
    return jax_triton.triton_call(
        *arguments, kernel=getattr(triton_kernels, kernel), out_shape=out_shape, grid=(gpu.num_sms,), num_warps=_WARPS,
        compute_capability=10 * gpu.capability[0] + gpu.capability[1], input_output_aliases=aliases, ROWS=_WARPS,
        **constants,
    )  # fmt: skip


def _like(shape: int | tuple[int, ...], x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((shape,) if isinstance(shape, int) else shape, x.dtype)


def _scale(matrix) -> jax.Array:
    return matrix.rows if matrix.scale_out is None else matrix.scale_out  # jax-triton drops None


def _chunk(matrix) -> int:
    """Elements of a row that a warp loads at a time: 16 bytes a thread."""
    return 512 // matrix.rows.dtype.itemsize


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
