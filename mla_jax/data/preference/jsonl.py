"""Pairs of a user's files, several in a row where they are short."""

import logging
import zlib

import numpy as np

from mla_jax.config import PreferenceJsonlConfig
from mla_jax.data.jsonl import Documents, load_documents
from mla_jax.data.jsonl_batches import in_split, validation_path
from mla_jax.data.packing import Packing
from mla_jax.data.preference.layout import Pair, Prompt, prompt_tokens
from mla_jax.data.preference.records import EXPECTED, encode_pair
from mla_jax.data.record_files import read_chunks, record_files
from mla_jax.data.tokenizer import Tokenizer
from mla_jax.distributed.join import is_main
from mla_jax.errors import InputError

_OPEN_ROWS = 64


class JsonlPairs:
    """Rows of the pairs of a file or folder. Each pair that fits is in one of them."""

    def __init__(self, data: PreferenceJsonlConfig, tokenizer: Tokenizer, seq_len: int, validation: bool = False):
        """Encodes the files, unless they are in the cache, and packs the pairs to train on, or to validate on.

        Raises:
            InputError: see `load_documents`; a prompt or its answers are too long for a row; no pair is left.
            UsageError: rows of `seq_len` have no room for prompts, or there is nothing to validate on.
        """
        path = validation_path(data) if validation else data.path
        region = prompt_tokens(seq_len, data.branch_tokens)
        self._parts = load_documents(
            path, tokenizer, data.on_bad_line, tuple(data.ignore_fields), data.cache_dir, encode_pair, EXPECTED
        )
        prompts, chosen, rejected = self._parts.lengths.reshape(-1, 3).T
        prompts, answers = prompts - 1, chosen + rejected  # both branches begin with the prompt's last token
        fits = (prompts <= region) & (answers <= data.branch_tokens)
        if not fits.all():
            _refuse_or_skip(data, path, fits, prompts + 1, answers, region)
        pairs = np.flatnonzero(fits & in_split(data, path, len(fits), validation))
        self._packing = pack_pairs(prompts[pairs], answers[pairs], region, data.branch_tokens, data.pairs_per_row)
        self._pairs, lengths = pairs, np.stack([prompts[pairs], answers[pairs]]).astype(np.int64)
        self.order = {
            "seq_len": seq_len,
            "the number of packed rows": len(self._packing),
            "the CRC-32 of the pairs' lengths": zlib.crc32(lengths.tobytes()),
        }

    def __len__(self) -> int:
        return len(self._packing)

    def __getitem__(self, row: int) -> list[Prompt]:
        """The prompts of a row, with one pair each."""
        return [_prompt(self._parts, int(pair)) for pair in self._pairs[self._packing[row]]]


def _prompt(parts: Documents, pair: int) -> Prompt:
    prompt, chosen, rejected = (parts[3 * pair + i][0] for i in range(3))
    return Prompt(prompt[:-1], [Pair(prompt[-1:], chosen, rejected)])


def _refuse_or_skip(
    data: PreferenceJsonlConfig, path: str, fits: np.ndarray, prompts: np.ndarray, answers: np.ndarray, region: int
) -> None:
    """Raises InputError for the first pair that does not fit, or warns of all of them if some are to be skipped."""
    first, count = int(np.argmin(fits)), int((~fits).sum())
    name, tokens, key, room = "prompt has", prompts[first], "train.stages.seq_len - data.branch_tokens + 1", region + 1
    if prompts[first] <= region + 1:
        name, tokens, key, room = "answers have", answers[first], "data.branch_tokens", data.branch_tokens
    problem = f"the {name} {tokens} tokens, but {key} is {room}"
    if data.on_bad_line == "error":
        raise InputError(f"{_place(path, first)}: {problem}; make rows longer or set data.on_bad_line=skip")
    if count == len(fits):
        raise InputError(f"{path}: none of the {count} pairs fits; of the first, {problem}")
    if is_main():
        logging.getLogger(__name__).warning(
            "%s: skipped %d of %d pairs that are too long; of the first, %s", path, count, len(fits), problem
        )


def _place(path: str, record: int) -> str:
    """Where a record is, of files whose records are all good."""
    places = (f"{chunk.file}, {place}" for chunk in read_chunks(record_files(path)) for place, _ in chunk.parsed())
    return next(place for i, place in enumerate(places) if i == record)


def pack_pairs(
    prompts: np.ndarray, answers: np.ndarray, prompt_room: int, answer_room: int, pairs_per_row: int
) -> Packing:
    """Rows that hold each pair once: in their order, each in the row of the last _OPEN_ROWS that it fills best.

    Args:
        prompts: tokens of the prompt of each pair, at most `prompt_room`.
        answers: tokens of both its answers, at most `answer_room`.
        prompt_room: tokens of prompts that fit in a row.
        answer_room: tokens of answers that fit in a row.
        pairs_per_row: the most pairs in a row.
    """
    whole = np.array([prompt_room, answer_room, pairs_per_row])
    needs = np.stack([prompts, answers, np.ones_like(prompts)], axis=1)
    rows, rooms = np.full(_OPEN_ROWS, -1), np.zeros((_OPEN_ROWS, 3), np.int64)  # at first, rows that hold nothing more
    row_of, count = np.empty(len(needs), np.int64), 0
    for pair, need in enumerate(needs):
        left = rooms - need
        room = np.where((left < 0).any(axis=1), np.inf, (left / whole).sum(axis=1))
        place = int(np.argmin(room))
        if np.isinf(room[place]):
            place = int(np.argmin((rooms / whole).min(axis=1)))  # the fullest
            rows[place], rooms[place], count = count, whole, count + 1
        rooms[place] -= need
        row_of[pair] = rows[place]
    return Packing(np.argsort(row_of, kind="stable"), np.append(0, np.cumsum(np.bincount(row_of, minlength=count))))
