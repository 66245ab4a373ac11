"""The mapping between the tensors of a Hugging Face DeepSeek-V3 (dense) and the parameter tree, in both directions.

Weights here are [in, out] and stacked over layers; Hugging Face has one [out, in] tensor per layer. Within a head both
have the same order (q = [nope | rope], kv_b = [k_nope | v], interleaved rotary pairs), so a transposition is all.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from mla_jax.checkpoint.streaming import Leaf
from mla_jax.config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class HfTensor:
    """One tensor of a Hugging Face checkpoint."""

    name: str
    shape: tuple[int, ...]
    """Shape in the checkpoint, [out, in]."""
    path: tuple[str, ...]
    """Keys of the leaf of the parameter tree that holds it."""
    layer: int | None = None
    """Index into the first axis of that leaf."""
    transposed: bool = False

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def take(self, params: dict) -> Leaf:
        """The tensor in Hugging Face's layout, on the host, or on disk if it is there; other layers are not copied."""
        leaf: Any = params
        for key in self.path:
            leaf = leaf[key]
        return self.view(leaf)

    def view(self, leaf: Any) -> Leaf:
        """The tensor in Hugging Face's layout, given its leaf; of a NumPy array a view that can be written to."""
        array = leaf if self.layer is None else leaf[self.layer]
        array = np.asarray(array) if isinstance(array, jax.Array) else array
        return array.T if self.transposed else array


def tensors(config: ModelConfig) -> list[HfTensor]:
    """All tensors of a checkpoint, in the order of the model, lm_head included (the embedding table if tied)."""
    d, vocab = config.hidden_size, config.vocab_size
    if config.tie_word_embeddings:
        head = HfTensor(HEAD, (vocab, d), ("embed_tokens",))
    else:
        head = HfTensor(HEAD, (vocab, d), ("lm_head",), transposed=True)
    return [
        HfTensor(EMBEDDING, (vocab, d), ("embed_tokens",)),
        *(tensor for layer in range(config.num_hidden_layers) for tensor in _layer_tensors(config, layer)),
        HfTensor("model.norm.weight", (d,), ("norm",)),
        head,
    ]


def count_parameters(config: ModelConfig) -> int:
    """Number of parameters; a tied head counts once."""
    return sum(t.size for t in tensors(config) if not (config.tie_word_embeddings and t.name == HEAD))


def _layer_tensors(config: ModelConfig, layer: int) -> Iterator[HfTensor]:
    d, f, heads, latent = config.hidden_size, config.intermediate_size, config.num_attention_heads, config.kv_lora_rank
    queries = heads * config.qk_head_dim
    if config.q_lora_rank is None:
        query = {"self_attn.q_proj": (d, queries)}
    else:
        query = {
            "self_attn.q_a_proj": (d, config.q_lora_rank),
            "self_attn.q_a_layernorm": (config.q_lora_rank,),
            "self_attn.q_b_proj": (config.q_lora_rank, queries),
        }
    shapes = {
        "input_layernorm": (d,),
        **query,
        "self_attn.kv_a_proj_with_mqa": (d, config.cache_width),
        "self_attn.kv_a_layernorm": (latent,),
        "self_attn.kv_b_proj": (latent, heads * (config.qk_nope_head_dim + config.v_head_dim)),
        "self_attn.o_proj": (heads * config.v_head_dim, d),
        "post_attention_layernorm": (d,),
        "mlp.gate_proj": (d, f),
        "mlp.up_proj": (d, f),
        "mlp.down_proj": (f, d),
    }
    for name, shape in shapes.items():
        path = ("layers", *name.split("."))
        yield HfTensor(f"model.layers.{layer}.{name}.weight", shape[::-1], path, layer, transposed=len(shape) == 2)
