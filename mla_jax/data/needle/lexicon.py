"""Texts encoded once, so that the synthetic data is put together from ids and never from strings."""

import functools
import itertools
from collections.abc import Sequence

import numpy as np

from mla_jax.data.needle import vocabulary as v
from mla_jax.data.tokenizer import Tokenizer
from mla_jax.data.within import encode_within

VALUES = 100_000
"""Numbers that can be written: 0 to this, exclusive."""


class Lexicon:
    """A table of pieces: texts that begin and end where pre-tokens do, so their ids join as their texts do.

    They are encoded as they stand within a text.

    A piece is an int; sequences of pieces become token ids by one gather. The number v is the piece v, written with a
    leading space; all other pieces are looked up by their text.
    """

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str]):
        """Encodes `texts` and all numbers below VALUES."""
        lines = [text + v.NEWLINE for text in v.LINE_ENDS]
        self._number = {text: VALUES + i for i, text in enumerate(dict.fromkeys([*texts, *lines]))}
        pieces = encode_within(tokenizer, list(self._number))
        flat, lengths = _encode_values(tokenizer)
        self._ids = np.concatenate([flat, *(np.array(piece, np.int32) for piece in pieces)])
        self.lengths = np.concatenate([lengths, np.array([len(piece) for piece in pieces], np.int32)])
        self._starts = np.cumsum(self.lengths) - self.lengths
        self._counts = self.lengths.tolist()  # quicker than numpy for a few pieces
        self.joins_lines = self.count(self.pieces(v.STOP + v.NEWLINE)) < self.count(self.pieces(v.STOP, v.NEWLINE))
        """Whether the tokenizer writes a full stop and a line break as one token."""
        self._lines = {self[text]: self[text + v.NEWLINE] for text in v.LINE_ENDS} if self.joins_lines else {}

    def __getitem__(self, text: str) -> int:
        return self._number[text]

    def pieces(self, *texts: str) -> list[int]:
        """The pieces of several texts."""
        return [self._number[text] for text in texts]

    def with_lines(self, pieces: list[int]) -> list[int]:
        """The pieces, where the tokenizer writes the end of a line as one token with that token's piece."""
        joined: list[int] = []
        for piece in pieces:
            if piece == self[v.NEWLINE] and joined and joined[-1] in self._lines:
                joined[-1] = self._lines[joined[-1]]
            else:
                joined.append(piece)
        return joined

    def count(self, pieces: list[int]) -> int:
        """Tokens that the pieces take."""
        return sum(map(self._counts.__getitem__, pieces))

    def ids(self, pieces: list[int] | np.ndarray) -> np.ndarray:
        """Token ids, int32, of the pieces one after the other."""
        pieces = np.asarray(pieces, np.int64)
        lengths = self.lengths[pieces]
        ends = np.cumsum(lengths)
        total = int(ends[-1]) if len(ends) else 0
        if total == len(pieces):  # one token each (no piece is empty)
            return self._ids[self._starts[pieces]]
        return self._ids[np.repeat(self._starts[pieces] - ends + lengths, lengths) + np.arange(total)]

    def ids_of_each(self, groups: Sequence[list[int]]) -> list[np.ndarray]:
        """`ids` of each group of pieces."""
        ids = self.ids([piece for group in groups for piece in group])
        ends = itertools.accumulate(map(self.count, groups), initial=0)
        return [ids[start:end] for start, end in itertools.pairwise(ends)]

    def longest(self, pieces: list[int]) -> int:
        """The piece with the most tokens."""
        return max(pieces, key=lambda piece: self.lengths[piece])


def _encode_values(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Ids of " 0", " 1", ... below VALUES, concatenated, and the length of each."""
    single = _single_digits(tokenizer)
    if single is None:
        encoded = encode_within(tokenizer, [f" {value}" for value in range(VALUES)])
        lengths = np.array([len(ids) for ids in encoded], np.int32)
        return np.fromiter(itertools.chain.from_iterable(encoded), np.int32), lengths
    prefix, digits = single
    flat, counts = [], []
    for width in range(1, len(str(VALUES))):
        values = np.arange(10 ** (width - 1) if width > 1 else 0, 10**width)
        rows = np.empty((len(values), len(prefix) + width), np.int32)
        rows[:, : len(prefix)] = prefix
        for place in range(width):
            rows[:, len(prefix) + place] = digits[values // 10 ** (width - 1 - place) % 10]
        flat.append(rows.ravel())
        counts.append(np.full(len(values), rows.shape[1], np.int32))
    return np.concatenate(flat), np.concatenate(counts)


def _single_digits(tokenizer: Tokenizer) -> tuple[list[int], np.ndarray] | None:
    """Ids of the leading space and of each digit, if the tokenizer writes numbers digit by digit."""
    encoded = encode_within(tokenizer, [f" {digit}" for digit in range(10)])
    prefix, digits = encoded[0][:-1], np.array([ids[-1] for ids in encoded], np.int32)
    probes = [*range(100), 123, 1000, 31_415, 50_000, 90_817, 99_999]
    for value, ids in zip(probes, encode_within(tokenizer, [f" {probe}" for probe in probes]), strict=True):
        if ids != [*prefix, *(digits[int(character)] for character in str(value))]:
            return None
    return prefix, digits


@functools.lru_cache(maxsize=4)
def make_lexicon(tokenizer: Tokenizer) -> Lexicon:
    """The pieces of all synthetic tasks under a tokenizer."""
    return Lexicon(tokenizer, v.PIECES)
