"""JSONL data: one chat or completion a line, encoded at once, with a loss mask.

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}
    {"prompt": ..., "completion": ...}

A chat is written by the tokenizer's chat template; the loss is on what the assistant says, end-of-turn token included.
A completion is <bos>prompt completion<eos> as it stands; the loss is on completion and <eos>.
"""

import bisect
import functools
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mla_jax.data.tokenizer import Tokenizer
from mla_jax.data.turns import assistant_spans
from mla_jax.errors import InputError

EXPECTED = 'expected {"messages": [{"role": ..., "content": ...}, ...]} or {"prompt": ..., "completion": ...}'


@dataclass(frozen=True)
class Documents:
    """Encoded documents one after the other: `ids` int32, `loss_mask` bool; number i is bounds[i] to bounds[i+1]."""

    ids: np.ndarray
    loss_mask: np.ndarray
    bounds: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document."""
        return np.diff(self.bounds)

    def __getitem__(self, document: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and loss mask of a document."""
        here = slice(self.bounds[document], self.bounds[document + 1])
        return self.ids[here], self.loss_mask[here]


def load_documents(path: str, tokenizer: Tokenizer, on_bad_line: str = "error") -> Documents:
    """Reads and encodes a JSONL file; empty lines are skipped.

    Args:
        path: of the file.
        tokenizer: encodes, and writes chats by its template.
        on_bad_line: `error`, or `skip` for a warning that counts the lines that cannot be used and names the first.

    Raises:
        InputError: no such file, nothing in it, or a line that is no chat or completion or has no token to train on,
            named by its number.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"data.path={path} is not a file")
    return _load(file.resolve(), file.stat().st_mtime_ns, tokenizer, on_bad_line)


@functools.lru_cache(maxsize=1)  # every stage of a run reads the same file
def _load(path: Path, changed: int, tokenizer: Tokenizer, on_bad_line: str) -> Documents:
    documents, bad = [], []
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                    if text.strip():
                        documents.append(_encode(_parse(text), tokenizer))
                except (InputError, UnicodeDecodeError) as e:
                    if on_bad_line == "error":
                        raise
                    bad.append(f"line {number}: {e}")
    except InputError as e:
        raise InputError(f"{path}, line {number}: {e}") from e
    except UnicodeDecodeError as e:
        raise InputError(f"{path} cannot be read as UTF-8 text (line {number}: {e})") from e
    except OSError as e:
        raise InputError(f"{path} cannot be read ({e})") from e
    if not documents and not bad:
        raise InputError(f"{path} is empty; {EXPECTED} on each line")
    if not documents:
        raise InputError(f"{path}: none of the {len(bad)} lines can be used; the first is {bad[0]}")
    if bad:
        logging.getLogger(__name__).warning(
            "%s: skipped %d of %d lines that cannot be used; the first is %s",
            path, len(bad), len(bad) + len(documents), bad[0],
        )  # fmt: skip
    ids, loss_mask = (np.concatenate(arrays) for arrays in zip(*documents, strict=True))
    return Documents(ids, loss_mask, np.cumsum([0, *(len(document[0]) for document in documents)]))


def _parse(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise InputError(f"not JSON ({e})") from e
    if not isinstance(record, dict):
        raise InputError(f"a {type(record).__name__}, {EXPECTED}")
    record = {key: value for key, value in record.items() if value is not None}  # as data sets export missing keys
    if "messages" in record:
        messages = record["messages"]
        if not isinstance(messages, list) or not messages:
            raise InputError("`messages` must be a list of at least one message")
        for i, message in enumerate(messages, 1):
            wanted = ("role", "content")
            if isinstance(message, dict) and message.get("tool_calls") and message.get("content") is None:
                wanted = ("role",)  # a tool call needs no words
            if not isinstance(message, dict) or not all(_is_text(message.get(key)) for key in wanted):
                raise InputError(f"message {i} must have `role` and `content`, both text")
    elif not all(_is_text(record.get(key)) for key in ("prompt", "completion")):
        raise InputError(EXPECTED)
    return record


def _is_text(x: Any) -> bool:
    """True for a string that UTF-8 can encode: JSON's escapes can spell half of a surrogate pair."""
    return isinstance(x, str) and x.encode(errors="ignore").decode() == x


def _encode(record: dict[str, Any], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and loss mask of a document."""
    if "messages" in record:
        text, spans = assistant_spans(tokenizer, record["messages"])
        encoded = tokenizer.encode_with_words(text)
        loss_mask = np.zeros(len(encoded.ids), bool)
        for start, end in spans:
            loss_mask |= (encoded.ends > start) & (encoded.starts < end)
        if not loss_mask[1:].any():
            raise InputError(
                "there is no token to train on: the assistant says nothing, and the chat template of tokenizer "
                f"{tokenizer.source} writes no end of turn"
            )
        return encoded.ids, loss_mask
    encoded = tokenizer.encode_with_words(record["prompt"] + record["completion"])
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    loss_mask = np.concatenate([np.zeros(len(bos), bool), encoded.starts >= len(record["prompt"]), [True]])
    if len(loss_mask) == 1:
        raise InputError("prompt and completion are empty, so there is nothing to train on")
    return np.concatenate([bos, encoded.ids, [tokenizer.eos_id]]).astype(np.int32), loss_mask


def pack(documents: Documents, seq_len: int, path: str) -> list[list[int]]:
    """Rows of at most `seq_len` tokens that hold each document that fits once, by best-fit decreasing bin packing.

    Documents that are too long are left out, and one line says how many: cut off, they would teach to stop anywhere.

    Raises:
        InputError: no document fits.
    """
    lengths = documents.lengths
    too_long = int((lengths > seq_len).sum())
    longest = f"the longest has {lengths.max()} tokens and seq_len is {seq_len}"
    if too_long == len(lengths):
        raise InputError(f"{path}: none of the {len(lengths)} documents fits; {longest}")
    if too_long:
        logging.getLogger(__name__).warning(
            "%s: left out %d of %d documents that are too long; %s", path, too_long, len(lengths), longest
        )
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # rows by the tokens they still hold
    rooms: list[int] = []  # the keys of by_room, ascending
    for document in np.argsort(-lengths, kind="stable")[too_long:].tolist():
        length = int(lengths[document])
        fullest = bisect.bisect_left(rooms, length)
        if fullest < len(rooms):
            room = rooms[fullest]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[fullest]
        else:
            room, row = seq_len, len(rows)
            rows.append([])
        rows[row].append(document)
        if room - length not in by_room:
            by_room[room - length] = []
            bisect.insort(rooms, room - length)
        by_room[room - length].append(row)
    return rows
