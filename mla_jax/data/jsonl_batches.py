"""Batches of the records of a JSONL data config, in an order of their own in each epoch."""

import dataclasses
import zlib
from typing import Any

import grain
import numpy as np

from mla_jax.config import JsonlDataConfig, PreferenceJsonlConfig, StageConfig
from mla_jax.data.jsonl import load_documents
from mla_jax.data.needle.generator import Purpose, make_rng
from mla_jax.data.packing import pack
from mla_jax.data.tokenizer import Tokenizer
from mla_jax.data.turns import stop_ids
from mla_jax.data.workers import ENDLESS, Batch, Rows
from mla_jax.errors import InputError, UsageError


class JsonlBatches:
    """Packed rows of records. Packing is done once; each epoch takes the rows in an order of its own.

    The rows of `validation` come once, in the same order for every seed.
    """

    def __init__(
        self, data: JsonlDataConfig, tokenizer: Tokenizer, stages: list[StageConfig], stage: int, seed: int,
        rows: Rows, validation: bool = False,
    ):  # fmt: skip
        self._stage = stages[stage]
        require_zero(self._stage, "previous_fraction", data.kind)
        require_zero(self._stage, "position_skip_fraction", data.kind)
        path = validation_path(data) if validation else data.path
        self._documents = load_documents(path, tokenizer, data.on_bad_line, tuple(data.ignore_fields), data.cache_dir)
        lengths = self._documents.lengths
        chosen = np.flatnonzero(in_split(data, path, len(lengths), validation))
        self._wanted = rows[self._stage.batch_size]
        packed = pack(lengths[chosen], self._stage.seq_len, path)
        self._packed = dataclasses.replace(packed, documents=chosen[packed.documents])
        self._seed, self._number, self._once = 0 if validation else seed, stage, validation
        self.batch_size, self.first_row = self._stage.batch_size, 0
        self.order = {
            "seed": self._seed,
            "seq_len": self._stage.seq_len,
            "the number of packed rows": len(self._packed),
            "the CRC-32 of the documents' lengths": zlib.crc32(lengths[chosen].astype(np.int64).tobytes()),
        }
        self._pad_id = tokenizer.pad_id
        self._is_text = ~tokenizer.blank
        self._is_text[list(stop_ids(tokenizer))] = False

    def __len__(self) -> int:
        return -(-len(self._packed) // self._stage.batch_size) if self._once else ENDLESS

    def __getitem__(self, index: int) -> Batch:
        shape = len(self._wanted), self._stage.seq_len
        batch: Batch = {
            "tokens": np.full(shape, self._pad_id, np.int32),
            "targets": np.full(shape, self._pad_id, np.int32),
            "weights": np.zeros(shape, np.float32),
            "answers": np.zeros(shape, bool),
            "segments": np.zeros(shape, np.int32),
            "positions": np.zeros(shape, np.int32),
        }
        for i, row in enumerate(self._wanted):
            number = self.first_row + index * self.batch_size + int(row)
            if self._once and number >= len(self._packed):
                break
            packed = self._packed[shuffled(number, len(self._packed), self._seed, self._number)]
            documents = [self._documents[document] for document in packed]
            lengths = [len(ids) for ids, _ in documents]
            ids, loss_mask = (np.concatenate(arrays) for arrays in zip(*documents, strict=True))
            ends, used = np.cumsum(lengths), len(ids)
            targets, learned = np.append(ids[1:], self._pad_id), np.append(loss_mask[1:], False)
            targets[ends - 1], learned[ends - 1] = self._pad_id, False  # never the next document's first token
            batch["tokens"][i, :used] = ids
            batch["targets"][i, :used] = targets
            batch["weights"][i, :used] = learned
            batch["answers"][i, :used] = learned & self._is_text[targets]
            batch["segments"][i, :used] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
            batch["positions"][i, :used] = np.arange(used) - np.repeat(ends - lengths, lengths)
        return batch


def shuffled(number: int, count: int, seed: int, stage: int) -> int:
    """The row that comes as `number` if each epoch takes `count` rows in an order of its own.

    The order is a keyed permutation: a place in it costs the same however many rows there are.
    """
    epoch, place = divmod(number, count)
    key = make_rng(seed, Purpose.EPOCH, stage, epoch).integers(2**32)
    row: Any = grain.MapDataset.range(count).shuffle(seed=int(key))[place]
    return int(row)


def require_zero(stage: StageConfig, name: str, kind: str) -> None:
    """Raises UsageError if the key `name` of a stage is set, which data of this kind cannot follow."""
    if getattr(stage, name) > 0:
        raise UsageError(f"train.stages.{name} does not work with data={kind}; leave it at 0")


def validation_path(data: JsonlDataConfig | PreferenceJsonlConfig) -> str:
    """The file that is validated on, part of it or all. Raises UsageError if there is nothing to validate on."""
    if data.validation.path is None and not data.validation.fraction:
        raise UsageError(
            "train.validate_every needs data to validate on: set data.validation.path=FILE or "
            "data.validation.fraction=0.05, the share of the lines of data.path that are not trained on"
        )
    return data.validation.path or data.path


def in_split(data: JsonlDataConfig | PreferenceJsonlConfig, path: str, count: int, validation: bool) -> np.ndarray:
    """Bool [count], the lines of `path` that are validated on, or else trained on. Raises InputError if none is."""
    fraction = data.validation.fraction
    if not fraction:
        return np.ones(count, bool)
    chosen = held_out(count, fraction) == validation
    if not chosen.any():
        raise InputError(f"{path}: data.validation.fraction={fraction} of {count} lines leaves none")
    return chosen


def held_out(count: int, fraction: float) -> np.ndarray:
    """Bool [count], true for about `fraction` of documents and for one at least.

    The same ones at every call, and those of a file stay when lines are appended to it.
    """
    draws = make_rng(0, Purpose.VALIDATION).random(count)
    return (draws < fraction) | (draws == draws.min(initial=1.0))
