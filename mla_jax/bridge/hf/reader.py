"""Reads a dense DeepSeek-V2 or -V3 checkpoint in Hugging Face format."""

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from mla_jax.bridge.hf.config import from_hf
from mla_jax.bridge.hf.layout import EMBEDDING, HEAD, HfTensor, tensors
from mla_jax.checkpoint.run_folder import check_tokenizer
from mla_jax.checkpoint.streaming import CHUNK_BYTES, LazyArray, Leaf, chunk_slices
from mla_jax.config import ModelConfig
from mla_jax.data.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer
from mla_jax.errors import InputError
from mla_jax.mesh import with_concrete_shardings
from mla_jax.model.transformer import abstract_params

STORED_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_MOST_NAMED = 5
"""The most tensors of one kind that an error names."""


def load(hf_dir: str | Path) -> tuple[ModelConfig, dict, Tokenizer]:
    """The model of a Hugging Face folder, in one file or in shards.

    Parameters are float32 whatever the checkpoint stores; the compute type is that of the checkpoint. A head that
    equals the embedding table bit for bit is taken as tied, since exports write tied models untied.

    Args:
        hf_dir: folder with config.json, model.safetensors (or an index and its shards) and tokenizer.json.

    Returns:
        The config; the parameters as `init_params` lays them out, placed on the mesh if one is set; the tokenizer.

    Raises:
        InputError: a file is missing or cannot be read, the architecture is another one (experts, biases, ...), or
            tensors are missing, left over or of the wrong shape.
    """
    checkpoint = open_checkpoint(hf_dir)

    def read(lazy: LazyArray, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        whole = np.empty(lazy.shape, lazy.dtype)
        lazy.fill(whole)
        return jax.device_put(whole, leaf.sharding)

    params = jax.tree.map(read, checkpoint.params(), with_concrete_shardings(abstract_params(checkpoint.config)))
    return checkpoint.config, params, checkpoint.tokenizer


@dataclass(frozen=True)
class HfCheckpoint:
    """A checkpoint that was checked: it has exactly the tensors that its config implies."""

    config: ModelConfig
    tensors: list[HfTensor]
    """All of them, without the head if it is tied."""
    tokenizer: Tokenizer
    _weights: "SafetensorsFolder"
    _interleaved: bool

    def read(self, tensor: HfTensor, part: tuple[slice, ...] | None = None) -> np.ndarray:
        """One tensor, [out, in], or some of its columns, in the type it is stored in.

        Rotary rows are interleaved pairs; of a tensor without such rows, `part` may be any part.
        """
        array = self._weights.read(tensor.name, part)
        return array if self._interleaved else _interleave(array, tensor, self.config)

    def params(self) -> dict:
        """The parameters, as `init_params` lays them out, to be read leaf by leaf into an array or a checkpoint."""
        by_path: dict[tuple[str, ...], list[HfTensor]] = {}
        for tensor in self.tensors:
            by_path.setdefault(tensor.path, []).append(tensor)

        def lazy_array(path: tuple, leaf: jax.ShapeDtypeStruct) -> LazyArray:
            of_leaf = by_path[tuple(key.key for key in path)]

            def fill(whole: Leaf) -> None:
                for tensor in of_leaf:
                    view = tensor.view(whole)
                    for part in chunk_slices(view):
                        view[part] = self.read(tensor, part).astype(leaf.dtype)

            return LazyArray(leaf.shape, leaf.dtype, of_leaf[0].layer is not None, fill)

        return jax.tree_util.tree_map_with_path(lazy_array, abstract_params(self.config))


def open_checkpoint(hf_dir: str | Path) -> HfCheckpoint:
    """Opens and checks a Hugging Face folder; reads no weights but those of the head.

    Raises:
        InputError: as `load` does.
    """
    folder = Path(hf_dir)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; expected one with config.json and model.safetensors")
    hf = read_json(folder / "config.json")
    weights = SafetensorsFolder(folder)
    config = _model_config(folder, hf, weights)
    expected = [t for t in tensors(config) if t.name != HEAD or not config.tie_word_embeddings]
    weights.check(expected, config)
    tokenizer = read_tokenizer(folder)
    check_tokenizer(tokenizer, config)
    interleaved = hf["model_type"] == "deepseek_v2" or bool(hf.get("rope_interleave", True))
    return HfCheckpoint(config, expected, tokenizer, weights, interleaved)


class SafetensorsFolder:
    """The safetensors files of a folder as one: shapes and types of all tensors, read by name."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._paths: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for path in _weight_files(folder):
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    part = file.get_slice(name)
                    self._paths[name] = path
                    self.shapes[name], self.dtypes[name] = tuple(part.get_shape()), part.get_dtype()

    def read(self, name: str, part: tuple[slice, ...] | None = None) -> np.ndarray:
        """One tensor, or a part of it, in the type it is stored in. Raises InputError if it holds NaN or infinity."""
        # Opened anew: pages of a file that stays mapped count as memory of the process.
        with _opened(self._paths[name]) as file:
            array = file.get_tensor(name) if part is None else file.get_slice(name)[part]
        if not np.isfinite(array).all():
            raise InputError(f"{name} in {self._paths[name]} holds NaN or infinity: this checkpoint computes nothing")
        return array

    def equal(self, name: str, other: str) -> bool:
        """Whether two matrices have the same values."""
        shape = self.shapes[name]
        if shape != self.shapes[other] or len(shape) != 2:
            return False
        step = max(1, CHUNK_BYTES // (4 * max(1, shape[1])))
        some_rows = ((slice(start, min(start + step, shape[0])),) for start in range(0, shape[0], step))
        return all(np.array_equal(self.read(name, rows), self.read(other, rows)) for rows in some_rows)

    def check(self, expected: list[HfTensor], config: ModelConfig) -> None:
        """Raises InputError, naming tensors, unless exactly the expected ones are there (the head may be, if tied)."""
        shapes = {t.name: t.shape for t in expected}
        optional = {HEAD} if config.tie_word_embeddings else set()
        left_over = self.shapes.keys() - shapes.keys() - optional
        common = shapes.keys() & self.shapes.keys()
        beyond = sorted(name for name in left_over if _layer(name) >= config.num_hidden_layers)
        if beyond:
            raise InputError(
                f"{self.folder} has layers beyond num_hidden_layers={config.num_hidden_layers} ({_some(beyond)}): "
                "multi-token prediction cannot be imported; remove them"
            )
        problems = {
            "missing": sorted(shapes.keys() - self.shapes.keys()),
            "left over": sorted(left_over),
            "of the wrong shape": sorted(
                f"{name} {list(self.shapes[name])} (expected {list(shapes[name])})"
                for name in common
                if self.shapes[name] != shapes[name]
            ),
            f"of another type than {', '.join(STORED_DTYPES)}": sorted(
                f"{name} {self.dtypes[name]}" for name in common if self.dtypes[name] not in STORED_DTYPES
            ),
        }
        if any(problems.values()):
            found = "; ".join(f"{what}: {_some(names)}" for what, names in problems.items() if names)
            raise InputError(f"the tensors in {self.folder} do not fit its config.json; {found}")


def _model_config(folder: Path, hf: dict, weights: SafetensorsFolder) -> ModelConfig:
    if HEAD not in weights.shapes:
        tied = bool(hf.get("tie_word_embeddings", False))
    else:
        # As transformers does: with both in the file, the values decide and not the flag.
        tied = EMBEDDING in weights.shapes and weights.equal(EMBEDDING, HEAD)
    dtype = STORED_DTYPES.get(weights.dtypes.get(EMBEDDING, ""), "float32")
    try:
        return from_hf(hf, tied=tied, dtype=dtype)
    except InputError as e:
        raise InputError(f"{folder / 'config.json'}: {e}") from e


def _interleave(array: np.ndarray, tensor: HfTensor, config: ModelConfig) -> np.ndarray:
    """Reorders the RoPE rows of a [out, in] weight from (first halves, second halves) to interleaved pairs."""
    heads = {"q_proj": config.num_attention_heads, "q_b_proj": config.num_attention_heads, "kv_a_proj_with_mqa": 1}
    if tensor.path[-1] not in heads:
        return array
    width = config.qk_rope_head_dim
    rows = np.arange(len(array)).reshape(heads[tensor.path[-1]], -1)
    rows[:, -width:] = rows[:, -width:].reshape(-1, 2, width // 2).swapaxes(1, 2).reshape(-1, width)
    return array[rows.ravel()]


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if not index.exists():
        others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for path in folder.glob(pattern))
        load = f"gguf_file={others[0]!r}, " if others and others[0].endswith(".gguf") else ""
        advice = (
            f"; transformers converts {others[0]}: AutoModelForCausalLM.from_pretrained({str(folder)!r}, {load}"
            "dtype='auto').save_pretrained(NEW), and the same of AutoTokenizer"
            if others
            else "; other formats cannot be imported"
        )
        raise InputError(f"{folder} has neither model.safetensors nor {index.name}{advice}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index} has no weight_map of tensor names to file names")
    return [folder / name for name in sorted(set(weight_map.values()))]


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder. Raises InputError if there is none, or none that can be read."""
    if not (folder / TOKENIZER_FILE).is_file():
        raise InputError(
            f"{folder} has no {TOKENIZER_FILE}: copy the model's into it, or write it there with transformers: "
            f"AutoTokenizer.from_pretrained(MODEL).save_pretrained({str(folder)!r})"
        )
    return load_tokenizer(str(folder))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError if it holds something else or cannot be read."""
    with _readable(path):
        content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object")
    return content


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    with _readable(path), safe_open(path, framework="numpy") as file:
        yield file


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns errors while reading a file into an InputError that names it."""
    try:
        yield
    except FileNotFoundError as e:
        raise InputError(f"{path} is missing") from e
    except (OSError, ValueError, SafetensorError) as e:
        raise InputError(f"{path} cannot be read ({e}); it is damaged or was not copied whole") from e


def _layer(name: str) -> int:
    """The layer a tensor belongs to, -1 for none."""
    parts = name.split(".")
    return int(parts[2]) if name.startswith("model.layers.") and parts[2].isdigit() else -1


def _some(names: Iterable[str]) -> str:
    """The first names as text, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more
