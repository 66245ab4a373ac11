"""JSONL and Parquet data: records (records.py) of files (record_files.py), encoded once (token_cache.py)."""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mla_jax.data.record_files import Chunk, read_chunks, record_files
from mla_jax.data.records import EXPECTED, encode_record
from mla_jax.data.token_cache import Entry, Writer, cached
from mla_jax.data.tokenizer import Tokenizer
from mla_jax.data.workers import on_all_cores
from mla_jax.distributed.join import is_main
from mla_jax.errors import InputError

Document = tuple[np.ndarray, np.ndarray]
"""Token ids int32 and loss mask."""

Encode = Callable[[Any, Tokenizer, tuple[str, ...]], list[Document]]
"""The documents of a record less the fields to ignore, as many for each record; a function of a module."""


class Documents:
    """Encoded documents one after the other, memory-mapped: number i is bounds[i] to bounds[i+1]."""

    def __init__(self, entry: Entry):
        self._entry = entry

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def bounds(self) -> np.ndarray:
        """The beginnings of all documents, and the end of the last."""
        return self._entry["bounds"]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document."""
        return np.diff(self.bounds)

    def __getitem__(self, document: int) -> Document:
        """Token ids and loss mask of a document."""
        here = slice(self.bounds[document], self.bounds[document + 1])
        return self._entry["ids"][here].astype(np.int32), self._entry["loss_mask"][here]


def encode_alone(record: Any, tokenizer: Tokenizer, ignore_fields: tuple[str, ...] = ()) -> list[Document]:
    """The one document of a chat or completion. Raises InputError as `encode_record` does."""
    return [encode_record(record, tokenizer, ignore_fields)]


def load_documents(
    path: str, tokenizer: Tokenizer, on_bad_line: str = "error", ignore_fields: tuple[str, ...] = (),
    cache_dir: str | None = None, encode: Encode = encode_alone, expected: str = EXPECTED,
) -> Documents:  # fmt: skip
    """The encoded records of a file or folder, from the cache if they are there; empty lines are skipped.

    Args:
        path: of a file, or of a folder of files, as `record_files` takes it.
        tokenizer: encodes, and writes chats by its template.
        on_bad_line: `error`, or `skip` for a warning of the main process that counts the lines that cannot be used and
            names the first.
        ignore_fields: keys of records and messages to leave out.
        cache_dir: the folder of the cache; None for the user's.
        encode: makes the documents of a record; those of several records follow each other.
        expected: says what a record is, for the error of an empty file.

    Raises:
        InputError: no such file, nothing in it, or a line that is no record or has no token to train on, named by its
            number; or the cache cannot be written.
    """
    files = record_files(path)
    work = functools.partial(_encode_chunk, tokenizer, encode, ignore_fields)
    build = functools.partial(_build, path, files, tokenizer, on_bad_line, work, expected)
    how = f"{encode.__module__}.{encode.__qualname__} without {sorted(ignore_fields)}"
    entry = cached("records", files, tokenizer, how, build, cache_dir)
    records, bad, first_bad = (entry.note[key] for key in ("records", "bad", "first_bad"))
    if bad and on_bad_line == "error":
        raise InputError(_named(first_bad, files))
    if bad and is_main():
        logging.getLogger(__name__).warning(
            "%s: skipped %d of %d lines that cannot be used; the first is %s",
            path, bad, bad + records, _named(first_bad, files, beside=path),
        )  # fmt: skip
    return Documents(entry)


def _named(bad: tuple[int, str], files: list[Path], beside: str | None = None) -> str:
    """The fault of a line, after the file's name unless that is `beside` it."""
    file, problem = bad
    return problem if str(files[file]) == beside else f"{files[file]}, {problem}"


def _build(
    path: str, files: list[Path], tokenizer: Tokenizer, on_bad_line: str, work: Callable[[Chunk], "_EncodedChunk"],
    expected: str, writer: Writer,
) -> dict[str, Any]:  # fmt: skip
    small = np.min_scalar_type(tokenizer.vocab_size - 1)
    records, bad, first_bad, end = 0, 0, (0, ""), 0
    writer.append("bounds", np.array([0]))
    for chunk in on_all_cores(work, read_chunks(files), sum(file.stat().st_size for file in files)):
        if chunk.bad and not bad:
            first_bad = files.index(chunk.file), chunk.first_bad
            if on_bad_line == "error":
                raise InputError(_named(first_bad, files))
        records, bad = records + chunk.records, bad + chunk.bad
        writer.append("ids", chunk.ids.astype(small))
        writer.append("loss_mask", chunk.loss_mask)
        writer.append("bounds", end + np.cumsum(chunk.lengths))
        end += len(chunk.ids)
    if not records and not bad:
        raise InputError(f"{path} is empty; {expected} on each line")
    if not records:
        first = _named(first_bad, files, beside=path)
        raise InputError(f"{path}: none of the {bad} lines can be used; the first is {first}")
    return {"records": records, "bad": bad, "first_bad": first_bad}


class _EncodedChunk(NamedTuple):
    file: Path
    ids: np.ndarray
    loss_mask: np.ndarray
    lengths: np.ndarray
    records: int
    bad: int
    first_bad: str


def _encode_chunk(tokenizer: Tokenizer, encode: Encode, ignore_fields: tuple[str, ...], chunk: Chunk) -> _EncodedChunk:
    ids, loss_masks = [np.empty(0, np.int32)], [np.empty(0, bool)]
    records, bad, first_bad = 0, 0, ""
    for place, record in chunk.parsed():
        try:
            if isinstance(record, InputError):
                raise record
            documents = encode(record, tokenizer, ignore_fields)
        except InputError as e:
            bad, first_bad = bad + 1, first_bad or f"{place}: {e}"
            continue
        records += 1
        for document, loss_mask in documents:
            ids.append(document)
            loss_masks.append(loss_mask)
    lengths = np.array([len(document) for document in ids[1:]], np.int64)
    arrays = np.concatenate(ids), np.concatenate(loss_masks), lengths
    return _EncodedChunk(chunk.file, *arrays, records, bad, first_bad)
