"""A Llama-style decoder layer, unchanged and with decoupled RoPE: the references that a conversion is compared with."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import latent_attention
from mla_jax.model.rope import apply_rope

CosSin = tuple[np.ndarray, np.ndarray]
"""cos and sin of RoPE's angles, float32 [T, pairs]."""


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


class Rotary(NamedTuple):
    """The decoupled RoPE part of queries and keys; its scores are added to those of the keys without position."""

    q_HRD: np.ndarray
    k_RD: np.ndarray
    cos_sin: CosSin


def cos_sin(inv_freq: np.ndarray, length: int) -> CosSin:
    """cos and sin for positions 0 to length - 1; `inv_freq` in radians per token."""
    angles = np.arange(length)[:, None] * inv_freq
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def norm(h_BTD, eps: float):
    """RMSNorm without its weight, of arrays on the host or the device."""
    return h_BTD / ((h_BTD**2).mean(axis=-1, keepdims=True) + eps) ** 0.5


@functools.partial(jax.jit, static_argnames=("eps", "scale"))
def forward(h_BTD: jax.Array, layer: LlamaLayer, rope: CosSin, *, eps: float, scale: float) -> jax.Array:
    """The unchanged layer, [B, T, D] to [B, T, D]."""
    x_BTD = norm(h_BTD, eps)
    q, k = (_apply_rope(_project(x_BTD, w), rope) for w in (layer.q_HND, layer.k_GND))
    return _rest(h_BTD, layer, q, k, _project(x_BTD, layer.v_GND), eps, scale)


@functools.partial(jax.jit, static_argnames=("eps", "scale"))
def forward_decoupled(
    h_BTD: jax.Array, layer: LlamaLayer, k_nope_GND: np.ndarray, rotary: Rotary, *, eps: float, scale: float
) -> jax.Array:
    """The layer with its keys split into a RoPE part and a part without position, and nothing else changed."""
    x_BTD = norm(h_BTD, eps)
    q_BTHR = _apply_rope(_project(x_BTD, rotary.q_HRD), rotary.cos_sin)
    k_BT1R = _apply_rope(_project(x_BTD, rotary.k_RD[None]), rotary.cos_sin)
    k_BTGN = _project(x_BTD, k_nope_GND)
    k_BTGR = jnp.broadcast_to(k_BT1R, (*k_BTGN.shape[:3], k_BT1R.shape[-1]))
    q = jnp.concatenate([_project(x_BTD, layer.q_HND), q_BTHR], axis=-1)
    k = jnp.concatenate([k_BTGN, k_BTGR], axis=-1)
    return _rest(h_BTD, layer, q, k, _project(x_BTD, layer.v_GND), eps, scale)


def _project(x_BTD: jax.Array, w_HND: jax.Array | np.ndarray) -> jax.Array:
    return jnp.einsum("btd,hnd->bthn", x_BTD, w_HND)


def _apply_rope(x_BTHN: jax.Array, rope: CosSin) -> jax.Array:
    cos, sin = (jnp.asarray(x)[:, None] for x in rope)
    return apply_rope(x_BTHN, cos, sin)


def _rest(h_BTD, layer: LlamaLayer, q_BTHK, k_BTGK, v_BTGN, eps: float, scale: float) -> jax.Array:
    """Attention, its output, the feed-forward."""
    k, v = (jnp.repeat(x, q_BTHK.shape[2] // x.shape[2], axis=2) for x in (k_BTGK, v_BTGN))
    out_BTHN = latent_attention.attention(q_BTHK, k, v, scale=scale)
    h_BTD += jnp.einsum("bthn,dhn->btd", out_BTHN, layer.o_DHN)
    x_BTD = norm(h_BTD, eps) * layer.mlp_norm_D
    return h_BTD + (jax.nn.silu(x_BTD @ layer.gate_FD.T) * (x_BTD @ layer.up_FD.T)) @ layer.down_DF.T
