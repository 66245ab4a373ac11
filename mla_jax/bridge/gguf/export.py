"""Writes a Hugging Face folder as a GGUF file, architecture deepseek2, which llama.cpp runs with a latent cache.

Keys and tensors are those of llama.cpp's src/models/deepseek2.cpp and conversion/deepseek.py: the attention is written
in its absorbed form, as one key head of the width of the latent cache, and kv_b is split into its key and value halves.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mla_jax.bridge.gguf.query_latent import WithQueryLatent
from mla_jax.bridge.gguf.tokenizer import add_tokenizer
from mla_jax.bridge.hf.export import check_values
from mla_jax.bridge.hf.layout import HfTensor
from mla_jax.bridge.hf.reader import HfCheckpoint, open_checkpoint
from mla_jax.config import ModelConfig, require_choice
from mla_jax.errors import InputError, UsageError
from mla_jax.files import atomic_file
from mla_jax.model.rope import attention_factor, softmax_scale

TYPES = ("f16", "bf16", "q8_0")

_LITE_LAYERS, _LITE_SIZES = (26, 27), (48, 128_256)
"""Numbers of layers, and of layers and tokens, by which llama.cpp recognises DeepSeek-V2-Lite, GigaChat3, Kanana-2."""
_BETAS = (32.0, 1.0)

_Checkpoint = HfCheckpoint | WithQueryLatent


def export_gguf(hf_dir: str | Path, out: str | Path, *, type: str = "f16", overwrite: bool = False) -> Path:
    """Writes one file, a tensor at a time; it appears under its name only when it is complete.

    Args:
        hf_dir: folder of a dense DeepSeek-V2 or -V3, as `bridge.hf.export` writes it. Without q_lora_rank it is written
            `WithQueryLatent`, and a line on stdout says so.
        out: the file to create.
        type: f16, bf16 or q8_0 (blocks of 32 signed bytes with one scale) for matrices; vectors stay float32, and
            matrices whose rows are no multiple of 32 long are f16 in q8_0 files.
        overwrite: replace `out` if it is a GGUF file.

    Returns:
        `out`.

    Raises:
        UsageError: unknown type, or the package gguf is missing.
        InputError: `out` exists, the folder cannot be read, llama.cpp cannot represent the model or its tokenizer, a
            weight does not fit the type, or the file cannot be written.
    """
    require_choice("type", type, TYPES)
    gguf = import_gguf()
    out = Path(out)
    _check_free(out, overwrite)
    checkpoint = open_checkpoint(hf_dir)
    if checkpoint.config.q_lora_rank is None:
        checkpoint = WithQueryLatent(checkpoint)
        print(
            "q_lora_rank is null, and llama.cpp loads no such model: written as "
            f"{checkpoint.config.q_lora_rank}, an identity before the queries of each layer, which changes nothing"
        )
    with atomic_file(out) as partial:
        check_representable(checkpoint.config)
        writer = gguf.GGUFWriter(partial, "deepseek2")
        try:
            _add_model(writer, checkpoint.config, Path(hf_dir).resolve().name)
            writer.add_file_type(getattr(gguf.LlamaFileType, f"MOSTLY_{type.upper()}"))
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            add_tokenizer(writer, Path(hf_dir), checkpoint.config.vocab_size)
            _write_tensors(writer, checkpoint, gguf, type)
        finally:
            writer.close()
    return out


def import_gguf() -> ModuleType:
    """The package gguf, which writes the format. Raises UsageError if it is not installed."""
    try:
        import gguf
    except ImportError as e:
        raise UsageError(f'GGUF needs the package gguf ({e}); pip install "infinitecontext[gguf]"') from e
    return gguf


def check_representable(config: ModelConfig) -> None:
    """Raises InputError, with the reason, for a model that llama.cpp would not load or would compute otherwise."""
    if config.num_hidden_layers in _LITE_LAYERS or (config.num_hidden_layers, config.vocab_size) == _LITE_SIZES:
        raise InputError(
            f"llama.cpp cannot run this model: it takes a deepseek2 of {config.num_hidden_layers} layers for a kind of "
            "DeepSeek-V2-Lite, which has no q_lora_rank; train with another model.num_hidden_layers"
        )
    yarn = config.rope_scaling
    if yarn is not None and (yarn.beta_fast, yarn.beta_slow) != _BETAS:
        raise InputError(
            f"llama.cpp cannot run this model: YaRN has beta_fast={yarn.beta_fast:g} and beta_slow={yarn.beta_slow:g}, "
            f"and its deepseek2 architecture reads neither but takes {_BETAS[0]:g} and {_BETAS[1]:g}"
        )


def _add_model(writer: Any, config: ModelConfig, name: str) -> None:
    writer.add_name(name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(1)  # the latent
    writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_key_length(config.cache_width)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    # No layer has experts; llama.cpp still wants the numbers.
    writer.add_leading_dense_block_count(config.num_hidden_layers)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_expert_shared_count(0)
    if config.rope_scaling is not None:
        _add_yarn(writer, config)


def _add_yarn(writer: Any, config: ModelConfig) -> None:
    """Adds YaRN with the two values by which llama.cpp has DeepSeek's mscale and mscale_all_dim.

    llama.cpp scales cos and sin by r and scores by (r (1 + l ln factor))^2, where r is attn_factor and l is
    yarn_log_mul; where l is 0 it multiplies r by 0.1 ln(factor) + 1 first. DeepSeek's own mscale = mscale_all_dim = m
    gives r = 1, l = 0.1 m.
    """
    yarn = config.rope_scaling
    assert yarn is not None
    writer.add_rope_scaling_type(import_gguf().RopeScalingType.YARN)
    writer.add_rope_scaling_factor(yarn.factor)
    writer.add_rope_scaling_orig_ctx_len(yarn.original_max_position_embeddings)
    rotary = attention_factor(yarn)
    temperature = math.sqrt(softmax_scale(config) * config.qk_head_dim**0.5)
    multiplier = (temperature / rotary - 1) / math.log(yarn.factor) if yarn.factor > 1 else 0.0
    if multiplier:
        writer.add_rope_scaling_yarn_log_mul(multiplier)
    else:
        rotary /= 0.1 * math.log(yarn.factor) + 1
    writer.add_rope_scaling_attn_factors(rotary)


@dataclass(frozen=True)
class _GgufTensor:
    """A GGUF tensor: its name and shape, and how it is made from a Hugging Face tensor."""

    name: str
    shape: tuple[int, ...]
    source: HfTensor
    convert: Callable[[np.ndarray], np.ndarray] = np.asarray


def _gguf_tensors(checkpoint: _Checkpoint, gguf: ModuleType) -> Iterator[_GgufTensor]:
    config = checkpoint.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, config.num_hidden_layers)
    heads, nope, v = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    latent = config.kv_lora_rank

    def by_head(array: np.ndarray) -> np.ndarray:
        return array.reshape(heads, nope + v, latent)

    for tensor in checkpoint.tensors:
        name = names.get_name(tensor.name, try_suffixes=(".weight",))
        if tensor.path[-1] == "kv_b_proj":
            keys, values = name.replace("kv_b", "k_b"), name.replace("kv_b", "v_b")
            yield _GgufTensor(keys, (heads, latent, nope), tensor, lambda a: by_head(a)[:, :nope].swapaxes(1, 2))
            yield _GgufTensor(values, (heads, v, latent), tensor, lambda a: by_head(a)[:, nope:])
        else:
            yield _GgufTensor(name, tensor.shape, tensor)


def _write_tensors(writer: Any, checkpoint: _Checkpoint, gguf: ModuleType, type: str) -> None:
    """Writes names, shapes and types first, as the format wants, then the data."""
    kinds = gguf.GGMLQuantizationType
    tensors = [(tensor, _kind(tensor, kinds, type)) for tensor in _gguf_tensors(checkpoint, gguf)]
    for tensor, kind in tensors:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        nbytes = math.prod(tensor.shape) // block * size
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, kind in tensors:
        array = np.ascontiguousarray(tensor.convert(checkpoint.read(tensor.source)), np.float32)
        assert array.shape == tensor.shape, tensor
        with np.errstate(over="ignore", invalid="ignore"):
            written = gguf.quantize(array, kind)
            check_values(tensor.source.name, array, gguf.dequantize(written, kind), kind.name, instead="bf16")
        writer.write_tensor_data(written)


def _kind(tensor: _GgufTensor, kinds: Any, type: str) -> Any:
    """The GGML type in which a tensor is written."""
    if len(tensor.shape) == 1:
        return kinds.F32
    if type == "q8_0" and tensor.shape[-1] % 32:
        return kinds.F16
    return kinds[type.upper()]


def _check_free(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not overwrite:
        raise InputError(f"{out} exists; choose another file, or replace it with --overwrite")
    if not out.is_file() or out.open("rb").read(4) != b"GGUF":
        raise InputError(f"{out} is not a GGUF file, so it is not overwritten; choose another name")
