"""The source of a conversion as a model that computes: its hidden states are what distillation learns from."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax.bridge.hf.layout import EMBEDDING, HEAD
from mla_jax.bridge.llama.config import Ranks, target_config
from mla_jax.bridge.llama.layer import attention, gated, norm
from mla_jax.bridge.llama.source import FINAL_NORM, LlamaCheckpoint
from mla_jax.config import ModelConfig
from mla_jax.errors import InputError
from mla_jax.losses.distillation import Teacher


def load_teacher(hf_dir: str | Path, model: ModelConfig) -> Teacher:
    """Reads a Llama, Mistral or Qwen, all of it into host memory.

    Args:
        hf_dir: folder with config.json, safetensors and tokenizer.json.
        model: the model that learns; its type is computed in, and its vocabulary is the teacher's.

    Raises:
        InputError: the checkpoint cannot be read or represented, or has another vocabulary.
    """
    source = LlamaCheckpoint(Path(hf_dir))
    sizes = target_config(source.hf, source.config, Ranks(1), tied=source.tied, dtype=source.dtype)
    source.check(sizes)
    if sizes.vocab_size != model.vocab_size:
        raise InputError(
            f"{hf_dir} has a vocabulary of {sizes.vocab_size} tokens, the model one of {model.vocab_size}: "
            "a model learns from the checkpoint that it was converted from"
        )
    dtype = jnp.dtype(model.dtype)
    layers = [jax.tree.map(lambda w: w.astype(dtype), source.layer(i)) for i in range(sizes.num_hidden_layers)]
    params = {
        "embedding": source.read(EMBEDDING).astype(dtype),
        "layers": jax.tree.map(lambda *w: np.stack(w), *layers),
        "norm": source.read(FINAL_NORM),
    }
    if not source.tied:
        params["head"] = source.read(HEAD).T.astype(dtype)
    inv_freq = source.config.inv_freq
    eps, scale = source.config.rms_norm_eps, source.config.softmax_scale

    def hidden_states(params, tokens_BT, positions_BT, segments_BT) -> jax.Array:
        angles = positions_BT[..., None] * jnp.asarray(inv_freq, jnp.float32)
        rope = jnp.cos(angles), jnp.sin(angles)

        def body(h_BTD, layer):
            h_BTD = attention(h_BTD, layer, rope, segments_BT, eps=eps, scale=scale)
            return h_BTD + gated(h_BTD, layer, eps=eps) @ layer.down_DF.T, None

        h_BTD, _ = jax.lax.scan(body, params["embedding"][tokens_BT], params["layers"])
        return (norm(h_BTD, eps) * params["norm"]).astype(dtype)

    return Teacher(params, hidden_states, lambda params: params["head"] if "head" in params else params["embedding"].T)
