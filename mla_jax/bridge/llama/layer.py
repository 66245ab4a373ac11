"""A Llama-style decoder layer, unchanged and with decoupled RoPE: the references that a conversion is compared with."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import latent_attention
from mla_jax.config import ModelConfig
from mla_jax.model.rope import apply_rope, softmax_scale

CosSin = tuple[np.ndarray, np.ndarray]
"""cos and sin of RoPE's angles, float32 [B or 1, T, pairs]."""


class LlamaLayer(NamedTuple):
    """float32 weights, [out, in]. The input norm's weight is part of q, k and v; rotary pairs are interleaved."""

    q_HND: np.ndarray
    k_GND: np.ndarray
    v_GND: np.ndarray
    o_DHN: np.ndarray
    mlp_norm_D: np.ndarray
    gate_FD: np.ndarray
    up_FD: np.ndarray
    down_DF: np.ndarray


def cos_sin(inv_freq: np.ndarray, length: int) -> CosSin:
    """cos and sin for positions 0 to length - 1; `inv_freq` in radians per token."""
    angles = np.arange(length)[None, :, None] * inv_freq
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def norm(h_BTD, eps: float):
    """RMSNorm in float32 without its weight, of arrays on the host or the device."""
    h32_BTD = h_BTD.astype(np.float32)
    return (h32_BTD / ((h32_BTD**2).mean(axis=-1, keepdims=True) + eps) ** 0.5).astype(h_BTD.dtype)


@functools.partial(jax.jit, static_argnames=("eps", "scale"))
def attention(
    h_BTD: jax.Array, layer: LlamaLayer, rope: CosSin, segments_BT: jax.Array | None = None, *, eps: float, scale: float
) -> jax.Array:
    """Hidden states after the source's attention, [B, T, D] to [B, T, D]; none across segments."""
    x_BTD = norm(h_BTD, eps)
    q, k = (_apply_rope(_project(x_BTD, w), rope) for w in (layer.q_HND, layer.k_GND))
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, _project(x_BTD, layer.v_GND)))
    out_BTHN = latent_attention.attention(q, k, v, scale=scale, q_segments=segments_BT, kv_segments=segments_BT)
    return h_BTD + jnp.einsum("bthn,dhn->btd", out_BTHN, layer.o_DHN)


@functools.partial(jax.jit, static_argnames=("eps",))
def gated(h_BTD: jax.Array, layer: LlamaLayer, *, eps: float) -> jax.Array:
    """Inputs of the feed-forward's last projection, [B, T, F]."""
    x_BTD = norm(h_BTD, eps) * layer.mlp_norm_D
    return jax.nn.silu(x_BTD @ layer.gate_FD.T) * (x_BTD @ layer.up_FD.T)


@functools.partial(jax.jit, static_argnames=("config", "eps"))
def latent_heads(h_BTD: jax.Array, weights: dict, rope: CosSin, *, config: ModelConfig, eps: float) -> jax.Array:
    """Outputs of all heads of the converted attention, the inputs of its last projection: [B, T, H V]."""
    x_BTD = norm(h_BTD, eps)
    if config.q_lora_rank is None:
        q = x_BTD @ weights["q_proj"]
    else:
        q = norm(x_BTD @ weights["q_a_proj"], config.rms_norm_eps) @ weights["q_b_proj"]
    heads = (*h_BTD.shape[:2], config.num_attention_heads, -1)
    q_nope, q_rope = jnp.split(q.reshape(heads), [config.qk_nope_head_dim], axis=-1)
    c_BTC, k_rope_BTR = jnp.split(x_BTD @ weights["kv_a_proj_with_mqa"], [config.kv_lora_rank], axis=-1)
    kv = norm(c_BTC, config.rms_norm_eps) @ weights["kv_b_proj"]
    k_nope, v = jnp.split(kv.reshape(heads), [config.qk_nope_head_dim], axis=-1)
    k_rope = jnp.broadcast_to(_apply_rope(k_rope_BTR[:, :, None], rope), (*k_nope.shape[:3], k_rope_BTR.shape[-1]))
    q = jnp.concatenate([q_nope, _apply_rope(q_rope, rope)], axis=-1)
    out = latent_attention.attention(q, jnp.concatenate([k_nope, k_rope], axis=-1), v, scale=softmax_scale(config))
    assert isinstance(out, jax.Array)  # no log-sum-exp was asked for
    return out.reshape(*h_BTD.shape[:2], -1)


def _project(x_BTD: jax.Array, w_HND: jax.Array | np.ndarray) -> jax.Array:
    return jnp.einsum("btd,hnd->bthn", x_BTD, w_HND)


def _apply_rope(x_BTHN: jax.Array, rope: CosSin) -> jax.Array:
    cos, sin = (jnp.asarray(x)[:, :, None] for x in rope)
    return apply_rope(x_BTHN, cos, sin)
