"""A Llama-style decoder layer as it is, and with its rotary positions decoupled: what conversion is compared with."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import latent_attention
from mla_jax.model.rope import apply_rope

Turns = tuple[np.ndarray, np.ndarray]
"""cos and sin, float32 [T, pairs]."""


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
    """The decoupled rotary part that is added to the scores of the keys without position."""

    q_HRD: np.ndarray
    k_RD: np.ndarray
    turns: Turns


def turns(frequencies: np.ndarray, length: int) -> Turns:
    """Of positions 0 to length - 1."""
    angles = np.arange(length)[:, None] * frequencies
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def norm(h_BTD, eps: float):
    """RMSNorm without its weight, of arrays on the host or the device."""
    return h_BTD / ((h_BTD**2).mean(axis=-1, keepdims=True) + eps) ** 0.5


@functools.partial(jax.jit, static_argnames=("eps", "scale"))
def forward(h_BTD: jax.Array, layer: LlamaLayer, positions: Turns, *, eps: float, scale: float) -> jax.Array:
    """The layer as it is, [B, T, D] to [B, T, D]."""
    x_BTD = norm(h_BTD, eps)
    q, k = (_turned(_project(x_BTD, w), positions) for w in (layer.q_HND, layer.k_GND))
    return _rest(h_BTD, layer, q, k, _project(x_BTD, layer.v_GND), eps, scale)


@functools.partial(jax.jit, static_argnames=("eps", "scale"))
def forward_decoupled(
    h_BTD: jax.Array, layer: LlamaLayer, k_nope_GND: np.ndarray, rotary: Rotary, *, eps: float, scale: float
) -> jax.Array:
    """The layer with its keys split in two, nothing else about it changed."""
    x_BTD = norm(h_BTD, eps)
    q_BTHR = _turned(_project(x_BTD, rotary.q_HRD), rotary.turns)
    k_BT1R = _turned(_project(x_BTD, rotary.k_RD[None]), rotary.turns)
    k_BTGN = _project(x_BTD, k_nope_GND)
    k_BTGR = jnp.broadcast_to(k_BT1R, (*k_BTGN.shape[:3], k_BT1R.shape[-1]))
    q = jnp.concatenate([_project(x_BTD, layer.q_HND), q_BTHR], axis=-1)
    k = jnp.concatenate([k_BTGN, k_BTGR], axis=-1)
    return _rest(h_BTD, layer, q, k, _project(x_BTD, layer.v_GND), eps, scale)


def _project(x_BTD: jax.Array, w_HND: jax.Array | np.ndarray) -> jax.Array:
    return jnp.einsum("btd,hnd->bthn", x_BTD, w_HND)


def _turned(x_BTHN: jax.Array, positions: Turns) -> jax.Array:
    cos, sin = (jnp.asarray(x)[:, None] for x in positions)
    return apply_rope(x_BTHN, cos, sin)


def _rest(h_BTD, layer: LlamaLayer, q_BTHK, k_BTGK, v_BTGN, eps: float, scale: float) -> jax.Array:
    """Attention, its output, the feed-forward."""
    k, v = (jnp.repeat(x, q_BTHK.shape[2] // x.shape[2], axis=2) for x in (k_BTGK, v_BTGN))
    out_BTHN = latent_attention.attention(q_BTHK, k, v, scale=scale)
    h_BTD += jnp.einsum("bthn,dhn->btd", out_BTHN, layer.o_DHN)
    x_BTD = norm(h_BTD, eps) * layer.mlp_norm_D
    return h_BTD + (jax.nn.silu(x_BTD @ layer.gate_FD.T) * (x_BTD @ layer.up_FD.T)) @ layer.down_DF.T
