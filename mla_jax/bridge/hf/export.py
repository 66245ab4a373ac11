"""Writes a model as a Hugging Face folder that DeepseekV3ForCausalLM loads, and vLLM too."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from mla_jax.bridge.hf.config import DTYPES, to_hf
from mla_jax.bridge.hf.layout import HfTensor, tensors
from mla_jax.bridge.hf.model_card import model_card
from mla_jax.checkpoint.run_folder import check_tokenizer
from mla_jax.checkpoint.streaming import chunk_slices
from mla_jax.config import ModelConfig, require_choice
from mla_jax.data.tokenizer import Tokenizer
from mla_jax.data.turns import stop_ids
from mla_jax.errors import InputError
from mla_jax.evals.results import Results
from mla_jax.files import atomic_folder, write_json


def export(
    config: ModelConfig,
    params: dict,
    tokenizer: Tokenizer,
    out_dir: str | Path,
    *,
    results: Sequence[Results] = (),
    dtype: str = "float32",
    max_shard_bytes: int = 4 * 10**9,
    overwrite: bool = False,
) -> Path:
    """Writes weights, config, generation config, tokenizer and model card.

    At a time one shard is in memory, and one chunk of parameters that are on disk.

    Everything goes into a folder beside `out_dir` that is renamed at the end: whatever goes wrong, `out_dir` is as it
    was before.

    Args:
        config: the model.
        params: its parameters, as `init_params` lays them out: arrays, on disk if `load_run` left them there.
        tokenizer: saved along; its special ids go into the configs.
        out_dir: the folder to create.
        results: the model's evaluations, for the model card.
        dtype: type of the written weights: float32, bfloat16 or float16.
        max_shard_bytes: the most bytes of weights in one file; a tensor above it has a file of its own.
        overwrite: replace `out_dir` if it is an export.

    Returns:
        `out_dir`.

    Raises:
        UsageError: unknown dtype.
        InputError: `out_dir` exists, the model cannot be expressed, a weight does not fit the type, or it cannot be
            written.
    """
    require_choice("dtype", dtype, DTYPES)
    out = Path(out_dir).resolve()
    _check_free(out, overwrite)
    check_tokenizer(tokenizer, config)
    special_ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in ("bos", "eos", "pad")}
    hf_config = to_hf(config, dtype=dtype, special_ids=special_ids)
    with atomic_folder(out, replace=overwrite) as folder:
        _write_weights(config, params, folder, dtype, max_shard_bytes)
        write_json(folder / "config.json", hf_config)
        eos_id, *end_of_turn = stop_ids(tokenizer)
        generation = {**special_ids, "do_sample": False}
        if end_of_turn:
            generation["eos_token_id"] = [eos_id, *end_of_turn]
        write_json(folder / "generation_config.json", generation)
        tokenizer.save(folder)
        (folder / "README.md").write_text(model_card(out.name, config, dtype, results), encoding="utf-8")
    return out


def _check_free(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise InputError(f"{out} exists; choose another folder, or replace it with --overwrite")
    if not (out / "config.json").is_file():
        raise InputError(
            f"{out} is not an export (it has no config.json), so it is not overwritten; choose another folder"
        )


def _write_weights(config: ModelConfig, params: dict, folder: Path, dtype: str, max_shard_bytes: int) -> None:
    """Writes model.safetensors, or shards and their index."""
    itemsize = jnp.dtype(dtype).itemsize
    shards = _shards(tensors(config), itemsize, max_shard_bytes)
    # One buffer for all shards: memory that was freed would stay with the process.
    buffer = np.empty(max(sum(t.size for t in shard) for shard in shards), jnp.dtype(dtype))
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        ends = list(itertools.accumulate(t.size for t in shard))
        arrays = {t.name: buffer[end - t.size : end].reshape(t.shape) for t, end in zip(shard, ends, strict=True)}
        for tensor in shard:
            _convert(tensor, params, dtype, arrays[tensor.name])
        # transformers refuses files that do not say whose tensors these are.
        try:
            save_file(arrays, folder / file, metadata={"format": "pt"})
        except SafetensorError as e:  # a full disk, for instance
            raise OSError(str(e)) from e
        (folder / file).chmod(folder.stat().st_mode & 0o666)  # safetensors lets nobody but the owner read it
        weight_map |= {t.name: file for t in shard}
    if len(shards) > 1:
        total = sum(t.size for shard in shards for t in shard) * itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def _shards(all_tensors: list[HfTensor], itemsize: int, max_shard_bytes: int) -> list[list[HfTensor]]:
    shards, filled = [[]], 0
    for tensor in all_tensors:
        size = tensor.size * itemsize
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    return shards


def _convert(tensor: HfTensor, params: dict, dtype: str, converted: np.ndarray) -> None:
    """Sets `converted` to the tensor as it is written. Raises InputError, naming it, if a value does not fit the type.

    Of parameters that are on disk, one part is in memory.
    """
    array = tensor.take(params)
    assert array.shape == tensor.shape, (tensor, array.shape)
    for part in chunk_slices(array):
        values = np.asarray(array[part])
        with np.errstate(over="ignore"):
            converted[part] = values
        check_values(tensor.name, values, converted[part], dtype, instead="bfloat16 or float32")


def check_values(name: str, array: np.ndarray, converted: np.ndarray, dtype: str, instead: str) -> None:
    """Raises InputError, naming the tensor and its largest magnitude, unless all is finite after conversion too."""
    if np.isfinite(converted).all():
        return
    if not np.isfinite(array).all():
        raise InputError(f"{name} has values that are NaN or infinite; export an earlier checkpoint")
    largest = np.abs(array).max()
    raise InputError(f"{name} reaches {largest:.3g}, too large for {dtype}; export as {instead}")
