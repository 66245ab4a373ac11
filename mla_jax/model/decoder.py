"""The model over a latent cache, for inference: weights of each layer in 16 or 8 bits, T new tokens at a time.

`inference_weights` makes the weights once; `extend` appends tokens to the cache. Prefill goes layer by layer instead
(`prefill_layer`), so that one compiled function serves all layers, and the last one need not compute its output.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from latent_attention import quantize
from mla_jax.config import ModelConfig
from mla_jax.model.cache import LatentCache, LayerCache
from mla_jax.model.layers import InferenceWeight, is_norm, matmul, rms_norm
from mla_jax.model.rope import CosSin, rope_cos_sin
from mla_jax.model.transformer import Layer, embed


@functools.partial(jax.jit, static_argnums=(0, 2))
def _converted(config: ModelConfig, weights: dict, int8: bool) -> dict:
    """Matrices in the compute type or in int8, so that decoding reads no more bytes than it must; norms as they are."""

    def convert(path: tuple, x: jax.Array) -> jax.Array | InferenceWeight:
        if is_norm(path):
            return x
        if path[-1].key == "embed_tokens":  # a lookup table, not a matrix that multiplies
            return x.astype(config.dtype)
        return InferenceWeight(*quantize(x.T)) if int8 else InferenceWeight(x.T.astype(config.dtype), None)

    return jax.tree.map_with_path(convert, weights)


def _for_the_default_device(x: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """NumPy's view of an array of the CPU where computations run elsewhere, as JAX would compute where the array is."""
    if jax.default_backend() == "cpu" or not isinstance(x, jax.Array):
        return x
    return np.asarray(x) if all(device.platform == "cpu" for device in x.devices()) else x


def inference_weights(config: ModelConfig, params: dict, int8: bool = False) -> dict:
    """The parameters as `extend` takes them: `layers` is a list, matrices but the embeddings are `InferenceWeight`.

    Args:
        config: the model.
        params: see `transformer.init_params`; on the host (NumPy, or JAX arrays of the CPU), they go to the device
            layer by layer, already converted.
        int8: matrices of layers in 8 bits with a scale for each output; embeddings and head stay in the compute type.
    """
    params = jax.tree.map(_for_the_default_device, params)
    outer = {name: x for name, x in params.items() if name != "layers"}
    layers = [
        _converted(config, jax.tree.map(lambda x, i=i: x[i], params["layers"]), int8)
        for i in range(config.num_hidden_layers)
    ]
    return _converted(config, outer, False) | {"layers": layers}


def bind_layer(config: ModelConfig, weights: dict) -> Layer:
    """One layer that computes with these weights; usable inside jit."""
    layer = jax.eval_shape(lambda: Layer(config, nnx.Rngs(0)))

    def place(module: nnx.Module, weights: dict) -> None:
        for name, weight in weights.items():
            if isinstance(weight, dict):
                place(getattr(module, name), weight)
            else:
                setattr(module, name, weight)

    place(layer, weights)
    return layer


def _cos_sin(config: ModelConfig, lengths_B: jax.Array, queries: int) -> CosSin:
    return rope_cos_sin(config, lengths_B[:, None] + jnp.arange(queries))


@functools.partial(jax.jit, static_argnums=(0, 7))  # traced and lowered once for all layers
def _extend_layer(config, weights, h_BTD, cos_sin, cache: LayerCache, lengths_B, valid_B, absorbed: bool):
    return bind_layer(config, weights).extend(h_BTD, cos_sin, cache, lengths_B, valid_B, absorbed)


def extend(
    config: ModelConfig, weights: dict, tokens_BT: jax.Array, cache: LatentCache, valid_B: jax.Array | None = None,
    *, absorbed: bool,
) -> tuple[jax.Array, LatentCache]:  # fmt: skip
    """Appends T tokens to the cache: a chunk of prefill or a step of decode.

    Args:
        config: the model.
        weights: see `inference_weights`.
        tokens_BT: int32 token ids, at positions `cache.lengths_B`, + 1, ...
        cache: must have room (callers check; tokens that do not fit are dropped).
        valid_B: how many of the T tokens of each row exist; None for all. Hidden states of the others mean nothing.
        absorbed: the absorbed form, for few tokens; else the expanded form, for many.

    Returns:
        h_BTD after the final norm, and the cache with the tokens in it.
    """
    valid_B = jnp.full_like(cache.lengths_B, tokens_BT.shape[1]) if valid_B is None else valid_B
    cos_sin = _cos_sin(config, cache.lengths_B, tokens_BT.shape[1])
    h_BTD, layers = embed(config, weights["embed_tokens"], tokens_BT), []
    for layer_weights, layer_cache in zip(weights["layers"], cache.layers, strict=True):
        h_BTD, layer_cache = _extend_layer(
            config, layer_weights, h_BTD, cos_sin, layer_cache, cache.lengths_B, valid_B, absorbed
        )
        layers.append(layer_cache)
    h_BTD = rms_norm(h_BTD, weights["norm"], config.rms_norm_eps)
    return h_BTD, LatentCache(tuple(layers), cache.lengths_B + valid_B)


def logits(config: ModelConfig, weights: dict, h: jax.Array) -> jax.Array:
    """float32 logits [..., X] of hidden states [..., D]."""
    head_DX = weights["embed_tokens"].T if config.tie_word_embeddings else weights["lm_head"]
    return matmul(h, head_DX, jnp.float32)


prefill_embed = jax.jit(embed, static_argnums=0)


@functools.partial(jax.jit, static_argnums=(0, 6), donate_argnums=(2, 3))
def prefill_layer(
    config: ModelConfig, weights: dict, h_BTD: jax.Array, cache: LayerCache, lengths_B, valid_B, cache_only: bool
) -> tuple[jax.Array, LayerCache]:
    """One layer of `extend` in the expanded form; with `cache_only` it fills its cache and has no output."""
    layer, cos_sin = bind_layer(config, weights), _cos_sin(config, lengths_B, h_BTD.shape[1])
    if cache_only:
        return h_BTD, layer.append_to_cache(h_BTD, cos_sin, cache, lengths_B, valid_B)
    return layer.extend(h_BTD, cos_sin, cache, lengths_B, valid_B, absorbed=False)
