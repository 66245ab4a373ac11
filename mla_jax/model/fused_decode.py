"""Fused decode step for batch 1: few kernels a layer, each of which reads its weights once.

Computes what `decoder.extend` does in the absorbed form, for one row and one token, on one GPU. On Hopper a layer is
one kernel if its widths, weights and cache suit it; else it is one kernel before the attention and one after it.
"""

import functools

import jax

import latent_attention
from latent_attention.call_shapes import DecodeShape, LayerShape
from latent_attention.decode_layer import triton
from latent_attention.gpu import local_gpu
from mla_jax import mesh
from mla_jax.config import ModelConfig
from mla_jax.model.cache import LatentCache, LayerCache
from mla_jax.model.rope import CosSin, softmax_scale
from mla_jax.model.transformer import embed


def why_not(config: ModelConfig, layers: tuple[LayerCache, ...], int8_weights: bool) -> str | None:
    """The reason why `step` cannot run with such weights over these caches here, or None if it can."""
    rows = len(layers[0].c_BSC)
    if rows > 1 or mesh.has_mesh():
        return "it is for one row and no mesh"
    if config.q_lora_rank is None:
        return "queries have no latent (q_lora_rank)"
    shape = _shape(config)
    if int8_weights and any(width % 4 for width in (shape.D, shape.Q, shape.H * shape.V, shape.F)):
        return "widths are not all multiples of 4, as words of 8-bit weights are"
    try:
        attention = _attention(config, layers[0])
    except latent_attention.UnavailableError as e:
        return str(e)
    if attention in ("xla", "reference"):  # where GPU kernels do not run, or are not wanted
        return f"attention is that of {attention}"
    return triton.why_not(config.dtype, local_gpu())


def _attention(config: ModelConfig, cache: LayerCache) -> str:
    """Name of the implementation of `latent_attention.decode`."""
    shape = DecodeShape(
        1, 1, config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim, 1, cache.capacity, config.dtype,
        cache.c_BSC.dtype.name, False,
    )  # fmt: skip
    return latent_attention.resolve("decode", config.decode, shape)


def is_fused_layer(config: ModelConfig, cache: LayerCache, int8_weights: bool) -> bool:
    """True if a layer is one kernel; only to be asked where `why_not` is None."""
    if _attention(config, cache) != "mosaic":
        return False
    try:  # another JAX may have moved what it uses
        from latent_attention.decode_layer import mosaic
    except (ImportError, AttributeError):
        return False
    cache_dtype = cache.c_BSC.dtype.name
    return mosaic.why_not(_shape(config), config.dtype, cache_dtype, cache.capacity, local_gpu(), int8_weights) is None


def init_workspace(config: ModelConfig, weights: dict, layers: tuple[LayerCache, ...]) -> jax.Array:
    """Global memory in which the CTAs of a kernel synchronise, passed from `step` to `step`.

    Its size tells `step` which kernels to use: one a layer, or two.
    """
    if not is_fused_layer(config, layers[0], has_int8(weights)):
        return triton.init_counter()
    from latent_attention.decode_layer import mosaic

    return mosaic.init_workspace(_shape(config))


def has_int8(weights: dict) -> bool:
    """Whether `decoder.inference_weights` are in 8 bits."""
    return weights["layers"][0]["self_attn"]["o_proj"].scale_out is not None


def _shape(config: ModelConfig) -> LayerShape:
    return LayerShape(
        D=config.hidden_size, Q=config.q_lora_rank or 0, C=config.kv_lora_rank, R=config.qk_rope_head_dim,
        N=config.qk_nope_head_dim, V=config.v_head_dim, H=config.num_attention_heads, F=config.intermediate_size,
    )  # fmt: skip


def step(
    config: ModelConfig, weights: dict, tokens_1: jax.Array, cos_sin: CosSin, cache: LatentCache, workspace: jax.Array
) -> tuple[jax.Array, LatentCache, jax.Array]:
    """Appends one token to the cache.

    Args:
        config: the model.
        weights: see `decoder.inference_weights`.
        tokens_1: the token's id, int32.
        cos_sin: `rope.rope_cos_sin` of its position.
        cache: of one row; where it is full, the token is dropped.
        workspace: of `init_workspace` in the first step, then what the step before returned.

    Returns:
        float32 logits [1, X] for the token after it, the cache, and the workspace for the next step.
    """
    head = weights["embed_tokens"] if config.tie_word_embeddings else weights["lm_head"].rows
    h_D, layers = embed(config, weights["embed_tokens"], tokens_1[None])[0, 0], []
    for layer_weights, layer_cache in zip(weights["layers"], cache.layers, strict=True):
        h_D, layer_cache, workspace = _layer(
            config, layer_weights, h_D, cos_sin, layer_cache, cache.lengths_B, workspace
        )
        layers.append(layer_cache)
    logits_X = triton.logits(h_D, weights["norm"], head, eps=config.rms_norm_eps)
    return logits_X[None], LatentCache(tuple(layers), cache.lengths_B + 1), workspace


@functools.partial(jax.jit, static_argnums=0)  # traced and lowered once for all layers
def _layer(config: ModelConfig, weights: dict, h_D, cos_sin: CosSin, cache: LayerCache, lengths_B, workspace):
    shape, arrays = _shape(config), (cache.c_BSC, cache.k_rope_BSR, cache.scales_B2S)
    if workspace.size > 1:
        # Here and not above: it imports packages, and takes seconds, that nothing else here needs.
        from latent_attention.decode_layer import mosaic

        h_D, arrays, workspace = mosaic.decode_layer(
            shape, weights, h_D, *cos_sin, lengths_B, arrays, workspace, eps=config.rms_norm_eps,
            scale=softmax_scale(config),
        )  # fmt: skip
        return h_D, LayerCache(*arrays), workspace
    q_BTHW, arrays, workspace = triton.before_attention(
        shape, weights, h_D, *cos_sin, lengths_B, arrays, workspace, eps=config.rms_norm_eps
    )
    out_BTHC, _ = latent_attention.decode(
        q_BTHW, arrays[0], arrays[1], lengths_B + 1, scale=softmax_scale(config), scales_P2S=arrays[2],
        implementation=config.decode,
    )  # fmt: skip
    h_D, workspace = triton.after_attention(shape, weights, h_D, out_BTHC, workspace, eps=config.rms_norm_eps)
    return h_D, LayerCache(*arrays), workspace
