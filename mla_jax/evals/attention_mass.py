"""Attention on a passkey while its digits are written: which heads look at it, and which digit they look at.

The digits are given (teacher forcing), so that one that the model gets wrong does not lead the others astray.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax.config import ModelConfig
from mla_jax.errors import InputError
from mla_jax.inference.generator import Generator
from mla_jax.inference.session import Session
from mla_jax.model import cache as latent_cache
from mla_jax.model import decoder
from mla_jax.model.cache import LayerCache
from mla_jax.model.layers import all_gather_weight, rms_norm
from mla_jax.model.rope import rope_cos_sin, softmax_scale
from mla_jax.model.transformer import embed


class AttentionMass(NamedTuple):
    """Shares of the attention of each head; axes are layer, head and answer token, at the query that predicts it."""

    answer_LHT: np.ndarray
    """On all copies of the answer in the prompt."""
    token_LHT: np.ndarray
    """On those tokens of the copies that are the answer token itself."""
    right_T: np.ndarray
    """Bool: whether the answer token is the most likely one."""


def attention_mass(generator: Generator, prompt: Sequence[int], answer: Sequence[int]) -> AttentionMass:
    """Attention on the copies of `answer` that `prompt` holds, both token ids, while the answer is written behind it.

    Raises:
        InputError: the prompt does not hold the answer; see `Generator.read`.
    """
    config, size = generator.config, len(answer)
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(prompt), size)
    starts = np.flatnonzero((windows == np.asarray(answer)).all(axis=1))
    if not len(starts):
        raise InputError("the prompt does not hold the answer token by token; attention on it cannot be told")
    session = Session.empty(1)
    generator.read(session, [prompt[:-1]], capacity=len(prompt) + size)
    tokens_1T = jnp.asarray([[prompt[-1], *answer[:-1]]], jnp.int32)
    h_1TD = embed(config, generator.weights["embed_tokens"], tokens_1T)
    length = jnp.int32(len(prompt) - 1)
    masses = []
    for weights, cache in zip(generator.weights["layers"], session.layers, strict=True):
        h_1TD, mass_PHT = _layer(config, weights, h_1TD, cache, length, jnp.asarray(starts))
        masses.append(mass_PHT)
    h_1TD = rms_norm(h_1TD, generator.weights["norm"], config.rms_norm_eps)
    predicted_T = decoder.logits(config, generator.weights, h_1TD)[0].argmax(-1)
    of_tokens_LPHT = np.asarray(masses)
    own = np.arange(size)
    return AttentionMass(
        of_tokens_LPHT.sum(axis=1), of_tokens_LPHT[:, own, :, own].transpose(1, 2, 0), np.asarray(predicted_T) == answer
    )


@functools.partial(jax.jit, static_argnums=0)
def _layer(
    config: ModelConfig, weights: dict, h_1TD: jax.Array, cache: LayerCache, length: jax.Array, starts_N: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The layer over the T answer tokens; its attention [P, H, T] on the P-th tokens of all copies, P as many as T."""
    layer, tokens = decoder.bind_layer(config, weights), h_1TD.shape[1]
    positions_1T = length + jnp.arange(tokens)[None]
    cos_sin = rope_cos_sin(config, positions_1T)
    q_nope_1THN, q_rope_1THR = layer.self_attn.queries(layer.attention_input(h_1TD), cos_sin)
    h_1TD, cache = layer.extend(h_1TD, cos_sin, cache, length[None], jnp.full(1, tokens), True)
    c_1SC, k_rope_1SR = latent_cache.read(cache, jnp.int32(0), cache.capacity, jnp.float32)
    kv_b_CHX = all_gather_weight(layer.self_attn.kv_b_proj, jnp.float32)
    kv_b_CHX = kv_b_CHX.reshape(config.kv_lora_rank, config.num_attention_heads, -1)
    q_THC = jnp.einsum("thn,chn->thc", q_nope_1THN[0].astype(jnp.float32), kv_b_CHX[..., : config.qk_nope_head_dim])
    scores_HTS = jnp.einsum("thc,sc->hts", q_THC, c_1SC[0])
    scores_HTS += jnp.einsum("thr,sr->hts", q_rope_1THR[0].astype(jnp.float32), k_rope_1SR[0])
    visible_TS = jnp.arange(cache.capacity) <= positions_1T[0][:, None]
    probabilities_HTS = jax.nn.softmax(jnp.where(visible_TS, scores_HTS * softmax_scale(config), -jnp.inf))
    of_tokens_HTNP = probabilities_HTS[:, :, starts_N[:, None] + jnp.arange(tokens)]
    return h_1TD, of_tokens_HTNP.sum(axis=2).transpose(2, 0, 1)
