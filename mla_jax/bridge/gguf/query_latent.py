"""Queries by two matrices with a norm between them, of models that have one: llama.cpp's deepseek2 loads no others."""

import dataclasses

import numpy as np

from mla_jax.bridge.hf.layout import HEAD, HfTensor, tensors
from mla_jax.bridge.hf.reader import HfCheckpoint
from mla_jax.config import ModelConfig


class WithQueryLatent:
    """A checkpoint without q_lora_rank, read as one whose q_lora_rank is hidden_size and which computes the same.

    The norm between the two matrices divides its input by its RMS. What an RMSNorm without weight gives has an RMS of
    1, so the weight of the layer's first norm moves into the matrices behind it, and the query's first matrix is the
    identity. What stays of the second norm is its epsilon: a relative error of half of it by the mean square of the
    hidden state.
    """

    def __init__(self, checkpoint: HfCheckpoint):
        self._checkpoint = checkpoint
        without = checkpoint.config
        self.config: ModelConfig = dataclasses.replace(without, q_lora_rank=without.hidden_size)
        self.tensors: list[HfTensor] = [
            tensor for tensor in tensors(self.config) if tensor.name != HEAD or not without.tie_word_embeddings
        ]

    def read(self, tensor: HfTensor) -> np.ndarray:
        """One tensor, [out, in], in the type that it is stored in, or float32."""
        kind = tensor.path[-1]
        if kind in ("input_layernorm", "q_a_layernorm"):
            return np.ones(tensor.shape, np.float32)
        if kind == "q_a_proj":
            return np.eye(*tensor.shape, dtype=np.float32)
        if kind not in ("q_b_proj", "kv_a_proj_with_mqa"):
            return self._checkpoint.read(tensor)
        stored = dataclasses.replace(tensor, name=tensor.name.replace("q_b_proj", "q_proj"))
        layer = tensor.name.partition("self_attn.")[0]
        norm_D = self._checkpoint.read(HfTensor(f"{layer}input_layernorm.weight", (tensor.shape[1],), ("norm",)))
        return self._checkpoint.read(stored).astype(np.float32) * norm_D.astype(np.float32)
