"""Reads a Llama-style checkpoint in Hugging Face format, one layer at a time."""

from pathlib import Path
from typing import Any

import numpy as np

from mla_jax.bridge.hf.layout import EMBEDDING, HEAD, HfTensor
from mla_jax.bridge.hf.reader import STORED_DTYPES, SafetensorsFolder, read_json, read_tokenizer
from mla_jax.bridge.llama.config import LLAMA_STYLE, LlamaConfig, read_config
from mla_jax.bridge.llama.layer import LlamaLayer
from mla_jax.config import ModelConfig
from mla_jax.data.tokenizer import Tokenizer
from mla_jax.errors import InputError

FINAL_NORM = "model.norm.weight"


def is_llama_style(hf_dir: str | Path) -> bool:
    """Whether config.json names an architecture that has to be converted."""
    path = Path(hf_dir) / "config.json"
    return path.is_file() and read_json(path).get("model_type") in LLAMA_STYLE


class LlamaCheckpoint:
    """A folder with config.json, safetensors and tokenizer.json; a tensor is in memory once it is read."""

    def __init__(self, folder: Path):
        """Raises InputError if a file is missing or damaged, or for what cannot be represented."""
        self.hf: dict[str, Any] = read_json(folder / "config.json")
        self._weights = SafetensorsFolder(folder)
        for name in [name for name in self._weights.shapes if name.endswith("rotary_emb.inv_freq")]:
            del self._weights.shapes[name]  # older files hold these; config.json says the same
        self._refuse_nonlinear_projections(folder)
        try:
            self.config: LlamaConfig = read_config(self.hf)
        except InputError as e:
            raise InputError(f"{folder / 'config.json'}: {e}") from e
        shapes = self._weights.shapes
        # As transformers does: with both in the file, the values decide and not the flag.
        self.tied = bool(self.hf.get("tie_word_embeddings", False)) if HEAD not in shapes else (
            EMBEDDING in shapes and self._weights.equal(EMBEDDING, HEAD)
        )  # fmt: skip
        self.dtype = STORED_DTYPES.get(self._weights.dtypes.get(EMBEDDING, ""), "float32")
        self.tokenizer: Tokenizer = read_tokenizer(folder)

    def check(self, target: ModelConfig) -> None:
        """Raises InputError, naming tensors, unless exactly those of a Llama of these sizes are there."""
        d, f, vocab = target.hidden_size, target.intermediate_size, target.vocab_size
        queries, keys = self.config.heads * self.config.head_dim, self.config.kv_heads * self.config.head_dim
        shapes = {EMBEDDING: (vocab, d), FINAL_NORM: (d,)}
        if not self.tied:
            shapes[HEAD] = (vocab, d)
        for i in range(target.num_hidden_layers):
            for name, shape in {
                "input_layernorm": (d,), "post_attention_layernorm": (d,),
                "self_attn.q_proj": (queries, d), "self_attn.k_proj": (keys, d), "self_attn.v_proj": (keys, d),
                "self_attn.o_proj": (d, queries),
                "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f),
            }.items():  # fmt: skip
                shapes[f"model.layers.{i}.{name}.weight"] = shape
        self._weights.check([HfTensor(name, shape, ()) for name, shape in shapes.items()], target)

    def read(self, name: str) -> np.ndarray:
        """A tensor outside the layers, float32."""
        return self._weights.read(name).astype(np.float32)

    def layer(self, number: int) -> LlamaLayer:
        """The weights of one layer."""

        def read(name: str) -> np.ndarray:
            return self.read(f"model.layers.{number}.{name}.weight")

        width = self.config.head_dim
        input_norm_D = read("input_layernorm")

        def heads(name: str) -> np.ndarray:
            return read(name).reshape(-1, width, len(input_norm_D)) * input_norm_D

        def interleaved(w_HND: np.ndarray) -> np.ndarray:
            """From (first halves, second halves) to pairs; scores are the same if queries and keys are alike."""
            return w_HND.reshape(-1, 2, width // 2, w_HND.shape[-1]).swapaxes(1, 2).reshape(w_HND.shape)

        o_DX = read("self_attn.o_proj")
        return LlamaLayer(
            q_HND=interleaved(heads("self_attn.q_proj")),
            k_GND=interleaved(heads("self_attn.k_proj")),
            v_GND=heads("self_attn.v_proj"),
            o_DHN=o_DX.reshape(len(o_DX), -1, width),
            mlp_norm_D=read("post_attention_layernorm"),
            gate_FD=read("mlp.gate_proj"),
            up_FD=read("mlp.up_proj"),
            down_DF=read("mlp.down_proj"),
        )

    def _refuse_nonlinear_projections(self, folder: Path) -> None:
        for name in sorted(self._weights.shapes):
            if name.endswith((".q_norm.weight", ".k_norm.weight")):
                raise InputError(
                    f"{folder} normalises its queries and keys ({name}); latent attention makes keys by a matrix, "
                    "which cannot divide by their length: this checkpoint cannot be converted"
                )
            if name.endswith("_proj.bias"):
                if self._weights.read(name).any():
                    raise InputError(
                        f"{folder} has biases ({name}); the latent attention of DeepSeek-V3 has none, and a matrix "
                        "cannot add a constant: this checkpoint cannot be converted"
                    )
                del self._weights.shapes[name]
