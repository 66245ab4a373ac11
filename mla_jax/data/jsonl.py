"""JSONL data: one record a line (records.py), encoded at once; and documents packed into rows."""

import bisect
import functools
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mla_jax.data.records import EXPECTED, encode_line
from mla_jax.data.tokenizer import Tokenizer
from mla_jax.errors import InputError


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


def load_documents(
    path: str, tokenizer: Tokenizer, on_bad_line: str = "error", ignore_fields: tuple[str, ...] = ()
) -> Documents:
    """Reads and encodes a JSONL file; empty lines are skipped.

    Args:
        path: of the file.
        tokenizer: encodes, and writes chats by its template.
        on_bad_line: `error`, or `skip` for a warning that counts the lines that cannot be used and names the first.
        ignore_fields: keys of records and messages to leave out.

    Raises:
        InputError: no such file, nothing in it, or a line that is no chat or completion or has no token to train on,
            named by its number.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"data.path={path} is not a file")
    return _load(file.resolve(), file.stat().st_mtime_ns, tokenizer, on_bad_line, ignore_fields)


@functools.lru_cache(maxsize=2)  # every stage of a run reads the same files
def _load(
    path: Path, changed: int, tokenizer: Tokenizer, on_bad_line: str, ignore_fields: tuple[str, ...]
) -> Documents:
    documents, bad = [], []
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                    if text.strip():
                        documents.append(encode_line(text, tokenizer, ignore_fields))
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


def pack(lengths: np.ndarray, seq_len: int, path: str) -> list[list[int]]:
    """Rows of at most `seq_len` tokens that hold each document that fits once, by best-fit decreasing bin packing.

    Documents that are too long are left out, and one line says how many: cut off, they would teach to stop anywhere.

    Raises:
        InputError: no document fits.
    """
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
