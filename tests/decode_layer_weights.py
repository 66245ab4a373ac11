"""Random weights of one layer for the batch-1 fused decode kernels."""

import jax

from latent_attention import quantize
from latent_attention.call_shapes import LayerShape
from mla_jax.model.layers import InferenceWeight


def random_weights(shape: LayerShape, dtype: str, key: jax.Array, int8: bool = False) -> dict:
    """One layer of `decoder.inference_weights`, unit-variance outputs; RMSNorm weights that are not all ones."""
    D, Q, C, R, N, V, H, F = shape
    keys = iter(jax.random.split(key, 12))

    def matrix(out: int, width: int) -> InferenceWeight:
        rows = jax.random.normal(next(keys), (out, width)) / width**0.5
        return InferenceWeight(*quantize(rows)) if int8 else InferenceWeight(rows.astype(dtype), None)

    def norm(width: int) -> jax.Array:
        return 1 + 0.1 * jax.random.normal(next(keys), (width,))

    return {
        "input_layernorm": norm(D),
        "self_attn": {
            "q_a_proj": matrix(Q, D),
            "q_a_layernorm": norm(Q),
            "q_b_proj": matrix(H * (N + R), Q),
            "kv_a_proj_with_mqa": matrix(C + R, D),
            "kv_a_layernorm": norm(C),
            "kv_b_proj": matrix(H * (N + V), C),
            "o_proj": matrix(D, H * V),
        },
        "post_attention_layernorm": norm(D),
        "mlp": {"gate_proj": matrix(F, D), "up_proj": matrix(F, D), "down_proj": matrix(D, F)},
    }
