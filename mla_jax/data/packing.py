"""Documents packed into rows of a fixed length."""

import bisect
import itertools
import logging
from dataclasses import dataclass

import numpy as np

from mla_jax.distributed.join import is_main
from mla_jax.errors import InputError


@dataclass(frozen=True)
class Packing:
    """The documents of each row: row number i holds documents[bounds[i] : bounds[i + 1]]."""

    documents: np.ndarray
    bounds: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.documents[self.bounds[row] : self.bounds[row + 1]]


class _Rows:
    """Rows by the tokens that they still hold; of those that hold the same, the latest comes first."""

    def __init__(self):
        self._stacks: dict[int, list[np.ndarray]] = {}
        self._rooms: list[int] = []  # the keys of _stacks, ascending

    def least_room(self, length: int) -> int | None:
        """The least room that holds `length`."""
        at = bisect.bisect_left(self._rooms, length)
        return self._rooms[at] if at < len(self._rooms) else None

    def push(self, room: int, rows: np.ndarray) -> None:
        if len(rows):
            if room not in self._stacks:
                self._stacks[room] = []
                bisect.insort(self._rooms, room)
            self._stacks[room].append(rows)

    def pop(self, room: int, most: int) -> np.ndarray:
        """At most `most` rows of that room."""
        stack, taken = self._stacks[room], []
        while stack and most:
            rows = stack.pop()
            if len(rows) > most:
                stack.append(rows[:-most])
                rows = rows[-most:]
            taken.append(rows[::-1])
            most -= len(rows)
        if not stack:
            del self._stacks[room], self._rooms[bisect.bisect_left(self._rooms, room)]
        return np.concatenate(taken)


def pack(lengths: np.ndarray, seq_len: int, path: str) -> Packing:
    """Rows of at most `seq_len` tokens that hold each document that fits once, by best-fit decreasing bin packing.

    Documents of the same length are placed together, so the time falls with their number only as sorting does.
    Documents that are too long are left out, and one line says how many: cut off, they would teach to stop anywhere.

    Raises:
        InputError: no document fits.
    """
    too_long = int((lengths > seq_len).sum())
    longest = f"the longest has {lengths.max()} tokens and seq_len is {seq_len}"
    if too_long == len(lengths):
        raise InputError(f"{path}: none of the {len(lengths)} documents fits; {longest}")
    if too_long and is_main():
        logging.getLogger(__name__).warning(
            "%s: left out %d of %d documents that are too long; %s", path, too_long, len(lengths), longest
        )
    order = np.argsort(-lengths, kind="stable")[too_long:]
    placed_lengths = lengths[order]
    row_of = np.empty(len(order), np.int64)
    changes = np.flatnonzero(np.diff(placed_lengths)) + 1
    rows, count = _Rows(), 0
    for start, end in itertools.pairwise([0, *changes.tolist(), len(order)]):
        length = int(placed_lengths[start])
        while start < end:
            least = rows.least_room(length)
            room = seq_len if least is None else least
            each = room // length  # the best fit stays the best fit until it is full
            wanted = -(-(end - start) // each)
            if least is None:
                taken = np.arange(count, count + wanted)
                count += wanted
            else:
                taken = rows.pop(room, wanted)
            placed = min(len(taken) * each, end - start)
            row_of[start : start + placed] = np.repeat(taken, each)[:placed]
            start += placed
            full, rest = divmod(placed, each)
            rows.push(room - each * length, taken[:full])
            rows.push(room - rest * length, taken[full:])
    bounds = np.append(0, np.cumsum(np.bincount(row_of, minlength=count)))
    return Packing(order[np.argsort(row_of, kind="stable")], bounds)
