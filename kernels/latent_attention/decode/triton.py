"""Absorbed decode in Triton, launched from JAX by jax-triton."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from latent_attention import jax_triton_loader
from latent_attention.call_shapes import DecodeShape
from latent_attention.decode.triton_heuristic import Tiling, launch_config, why_not
from latent_attention.gpu import Gpu, local_gpu


def why_not_decode(shape: DecodeShape, gpu: Gpu | None) -> str | None:
    """Why the Triton kernels cannot run here, or None if they can."""
    if gpu is None:
        return "Triton needs an NVIDIA GPU"
    return jax_triton_loader.why_not() or why_not(shape, gpu)


def decode(q_BTHW, c_PSC, k_rope_PSR, lengths_B, *, scale, block_table_BN, scales_P2S, tiling: Tiling | None = None):
    """See `latent_attention.decode`; `tiling` instead of the tuned one. Returns (out_BTHC, lse_BTH)."""
    # Imported here: both need packages that are installed with CUDA only.
    jax_triton = jax_triton_loader.load()
    from latent_attention.decode.triton_kernels import combine_kernel, split_kernel

    gpu = local_gpu()
    if gpu is None:
        raise RuntimeError("Triton needs an NVIDIA GPU")
    shape = DecodeShape.of(q_BTHW, c_PSC, k_rope_PSR, block_table_BN)
    batch, queries, heads, c_width, rope_width, pages_per_row, page_size, *_ = shape
    width = c_width + rope_width
    strides = {
        "Q_B": queries * heads * width, "Q_T": heads * width, "Q_H": width,
        "C_P": page_size * c_width, "C_S": c_width, "ROPE_P": page_size * rope_width, "ROPE_S": rope_width,
        "SCALES_P": 2 * page_size, "SCALES_2": page_size, "SCALES_S": 1, "TABLE_B": pages_per_row,
        "OUT_B": queries * heads * c_width, "OUT_T": heads * c_width, "OUT_H": c_width,
        "LSE_B": queries * heads, "LSE_T": heads, "LSE_H": 1,
    }  # fmt: skip
    config = launch_config(shape, gpu, strides, tiling)

    def call(kernel, launch, *arguments, out_shape):
        # Kernels get outputs after the other arguments. Strides are constexpr, because jax-triton does not tell Triton
        # which integers are divisible by 16, and without that loads are not vectorized.
        return jax_triton.triton_call(
            *arguments, kernel=kernel, out_shape=out_shape, grid=launch.grid, num_warps=launch.warps,
            num_stages=launch.stages, compute_capability=10 * gpu.capability[0] + gpu.capability[1],
            **launch.constants,
        )  # fmt: skip

    unused = lengths_B  # jax-triton drops None
    rows = queries * heads
    partial, partial_lse = call(
        split_kernel, config.split, q_BTHW, c_PSC, k_rope_PSR, unused if scales_P2S is None else scales_P2S,
        unused if block_table_BN is None else block_table_BN, lengths_B,
        np.float32(scale / math.log(2)), batch, config.capacity,
        out_shape=[
            jax.ShapeDtypeStruct((config.splits, rows, c_width), jnp.float32),
            jax.ShapeDtypeStruct((config.splits, rows), jnp.float32),
        ],
    )  # fmt: skip
    return call(
        combine_kernel, config.combine, partial, partial_lse, lengths_B, batch, config.capacity, config.programs,
        out_shape=[
            jax.ShapeDtypeStruct((batch, queries, heads, c_width), q_BTHW.dtype),
            jax.ShapeDtypeStruct((batch, queries, heads), jnp.float32),
        ],
    )  # fmt: skip
