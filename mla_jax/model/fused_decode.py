"""The next token of one sequence, on kernels that read each weight once and do nothing else beside.

The same as `decoder.extend` in the absorbed form, for one row and one token, on one GPU. On Hopper a layer is one
kernel if its widths, weights and cache suit it; else it is two around the attention.
"""

import functools

import jax

import latent_attention
from latent_attention.call_shapes import DecodeShape, LayerShape
from latent_attention.decode_layer import triton as kernels
from latent_attention.gpu import local_gpu
from mla_jax import mesh
from mla_jax.config import ModelConfig
from mla_jax.model.cache import LatentCache, LayerCache
from mla_jax.model.rope import softmax_scale
from mla_jax.model.transformer import Rotations, embed


def why_not(config: ModelConfig, layers: tuple[LayerCache, ...]) -> str | None:
    """Why `step` cannot run over these caches here, or None if it can."""
    rows = len(layers[0].c_BSC)
    if rows > 1 or mesh.has_mesh():
        return "it is for one row and no mesh"
    if config.q_lora_rank is None:
        return "queries have no latent (q_lora_rank)"
    try:
        attention = _attention(config, layers[0])
    except latent_attention.UnavailableError as e:
        return str(e)
    if attention in ("xla", "reference"):  # where kernels do not run, or are not wanted
        return f"attention is that of {attention}"
    return kernels.why_not(config.dtype, local_gpu())


def _attention(config: ModelConfig, cache: LayerCache) -> str:
    """The implementation of the attention."""
    shape = DecodeShape(
        1, 1, config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim, 1, cache.capacity, config.dtype,
        cache.c_BSC.dtype.name, False,
    )  # fmt: skip
    return latent_attention.resolve("decode", config.decode, shape)


def is_one_kernel(config: ModelConfig, cache: LayerCache, int8_weights: bool) -> bool:
    """Whether a layer is one kernel, where `why_not` says None."""
    if int8_weights or _attention(config, cache) != "mosaic":
        return False
    try:  # another JAX may have moved what it uses
        from latent_attention.decode_layer import mosaic as mosaic_layer
    except (ImportError, AttributeError):
        return False
    reason = mosaic_layer.why_not(_shape(config), config.dtype, cache.c_BSC.dtype.name, cache.capacity, local_gpu())
    return reason is None


def init_meeting(config: ModelConfig, weights: dict, layers: tuple[LayerCache, ...]) -> jax.Array:
    """What the blocks of kernels meet at in `step` over these layers and caches, which knows its kernels by it."""
    int8_weights = weights["layers"][0]["self_attn"]["o_proj"].scale_out is not None
    if not is_one_kernel(config, layers[0], int8_weights):
        return kernels.init_counter()
    from latent_attention.decode_layer import mosaic as mosaic_layer

    return mosaic_layer.init_workspace(_shape(config))


def _shape(config: ModelConfig) -> LayerShape:
    return LayerShape(
        D=config.hidden_size, Q=config.q_lora_rank or 0, C=config.kv_lora_rank, R=config.qk_rope_head_dim,
        N=config.qk_nope_head_dim, V=config.v_head_dim, H=config.num_attention_heads, F=config.intermediate_size,
    )  # fmt: skip


def step(
    config: ModelConfig, weights: dict, tokens_1: jax.Array, turn: Rotations, cache: LatentCache, meeting: jax.Array
) -> tuple[jax.Array, LatentCache, jax.Array]:
    """Appends one token to the cache.

    Args:
        config: the model.
        weights: see `decoder.inference_weights`.
        tokens_1: int32.
        turn: `rope.rotations` of its position.
        cache: of one row; where it is full, the token is dropped.
        meeting: `init_meeting`'s, then what the last step returned.

    Returns:
        float32 scores [1, X] of the token after it, the cache and what blocks meet at.
    """
    head = weights["embed_tokens"] if config.tie_word_embeddings else weights["lm_head"].rows
    h_D, layers = embed(config, weights["embed_tokens"], tokens_1[None])[0, 0], []
    for layer_weights, layer_cache in zip(weights["layers"], cache.layers, strict=True):
        h_D, layer_cache, meeting = _layer(config, layer_weights, h_D, turn, layer_cache, cache.lengths_B, meeting)
        layers.append(layer_cache)
    scores_X = kernels.scores(h_D, weights["norm"], head, eps=config.rms_norm_eps)
    return scores_X[None], LatentCache(tuple(layers), cache.lengths_B + 1), meeting


@functools.partial(jax.jit, static_argnums=0)  # traced and lowered once for all layers
def _layer(config: ModelConfig, weights: dict, h_D, turn: Rotations, cache: LayerCache, lengths_B, meeting):
    shape, arrays = _shape(config), (cache.c_BSC, cache.k_rope_BSR, cache.scales_B2S)
    if meeting.size > 1:
        from latent_attention.decode_layer import (
            mosaic as mosaic_layer,  # packages and seconds that nothing else here needs
        )

        h_D, (c, k_rope), meeting = mosaic_layer.decode_layer(
            shape, weights, h_D, *turn, lengths_B, arrays[:2], meeting, eps=config.rms_norm_eps,
            scale=softmax_scale(config),
        )  # fmt: skip
        return h_D, LayerCache(c, k_rope, None), meeting
    q_BTHW, arrays, meeting = kernels.before_attention(
        shape, weights, h_D, *turn, lengths_B, arrays, meeting, eps=config.rms_norm_eps
    )
    out_BTHC, _ = latent_attention.decode(
        q_BTHW, arrays[0], arrays[1], lengths_B + 1, scale=softmax_scale(config), scales_P2S=arrays[2],
        implementation=config.decode,
    )  # fmt: skip
    h_D, meeting = kernels.after_attention(shape, weights, h_D, out_BTHC, meeting, eps=config.rms_norm_eps)
    return h_D, LayerCache(*arrays), meeting
