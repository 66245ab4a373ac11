"""Haystacks, the filler around needles: each gives exactly as many tokens as asked for, and where its sentences end."""

import functools
from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mla_jax.data.needle import vocabulary as v
from mla_jax.data.needle.lexicon import VALUES, Lexicon
from mla_jax.data.needle.ring import Filler, MarkedText, Ring, last_cut, mark_text, one_token_word, ring_arrays
from mla_jax.data.needle.tasks import Key
from mla_jax.data.text_folder import Window, no_text, read_windows, text_files
from mla_jax.data.token_cache import Writer, cached
from mla_jax.data.tokenizer import Tokenizer
from mla_jax.data.within import encode_within
from mla_jax.data.workers import on_all_cores


class Haystack(Protocol):
    """A source of filler."""

    def take(self, rng: np.random.Generator, length: int, taken: Collection[Key] = ()) -> Filler:
        """Filler of exactly `length` tokens; it says nothing about the `taken` keys."""
        ...


class NoiseHaystack:
    """The same five sentences over and over."""

    def __init__(self, tokenizer: Tokenizer, *, begins_line: bool = False):
        """`begins_line`: the first sentence has no space before it."""
        first, *others = v.NOISE
        texts = [mark_text(tokenizer, text) for text in (" " + first, *others)]
        self._ring = Ring(tokenizer, ring_arrays(texts))
        self._first = mark_text(tokenizer, first) if begins_line else None
        self._second = len(encode_within(tokenizer, [" " + first])[0])

    def take(self, rng: np.random.Generator, length: int, taken: Collection[Key] = ()) -> Filler:
        """Filler of exactly `length` tokens, from the first sentence on."""
        first = self._first
        if first is None:
            return self._ring.take(0, length)
        if length < len(first.ids):
            return Filler(self._ring.topped_up(first.ids[: last_cut(first.cuts, length)], length), np.array([0]))
        rest = self._ring.take(self._second, length - len(first.ids))
        return Filler(np.concatenate([first.ids, rest.ids]), np.append(0, rest.gaps + len(first.ids)))


class WordsHaystack:
    """Sentences of 4 to 10 random words."""

    def __init__(self, tokenizer: Tokenizer, lexicon: Lexicon):
        self._lexicon = lexicon
        self._words = np.array(lexicon.pieces(*v.FILLER_WORDS))
        self._stop = lexicon[v.STOP]
        self._one_token_word = one_token_word(tokenizer)

    def take(self, rng: np.random.Generator, length: int, taken: Collection[Key] = ()) -> Filler:
        """Filler of exactly `length` tokens."""
        stops = np.cumsum(rng.integers(5, 12, size=length // 5 + 1))  # pieces up to each full stop
        stops = stops[: np.searchsorted(stops, length) + 1]  # enough of them, for a piece is at least one token
        pieces = self._words[rng.integers(len(self._words), size=stops[-1])]
        pieces[stops - 1] = self._stop
        ends = np.cumsum(self._lexicon.lengths[pieces])
        gaps = np.append(0, ends[stops - 1])
        ids = self._lexicon.ids(pieces)
        if self._one_token_word is not None:
            ids = ids[: _last_until(np.append(0, ends), length)]
            ids = np.append(ids, np.full(length - len(ids), self._one_token_word, np.int32))
        return Filler(ids[:length], gaps[: np.searchsorted(gaps, length, side="right")])


class NeedlesHaystack:
    """Nothing but needles of other keys, and a bit of noise where no whole one fits."""

    def __init__(self, tokenizer: Tokenizer, lexicon: Lexicon):
        self._lexicon = lexicon
        nouns = lexicon.pieces(*v.NOUNS)
        self._keys = [(adjective, noun) for adjective in lexicon.pieces(*v.ADJECTIVES) for noun in nouns]
        self._fixed = lexicon.pieces(v.MAGIC_NEEDLE, v.IS, v.STOP)
        self._noise = NoiseHaystack(tokenizer)

    def take(self, rng: np.random.Generator, length: int, taken: Collection[Key] = ()) -> Filler:
        """Filler of exactly `length` tokens; it says nothing about the `taken` keys."""
        others = np.array([key for key in self._keys if key not in taken])
        shortest = self._lexicon.count(self._fixed) + 3  # adjective, noun and number: at least a token each
        count = length // shortest if len(others) else 0
        pieces = np.empty((count, 6), np.int64)
        if count:
            pieces[:, [0, 3, 5]] = self._fixed
            pieces[:, 1:3] = others[rng.integers(len(others), size=count)]
            pieces[:, 4] = rng.integers(VALUES // 10, VALUES, size=count)
        ends = np.cumsum(self._lexicon.lengths[pieces].sum(axis=1))
        whole = int(np.searchsorted(ends, length, side="right"))
        ids = self._lexicon.ids(pieces[:whole].ravel())
        noise = self._noise.take(rng, length - len(ids))
        return Filler(np.concatenate([ids, noise.ids]), np.append(0, ends[:whole]))


class TextHaystack:
    """The .txt and .md files of a folder and its subfolders, one after the other, from a random sentence on."""

    def __init__(self, tokenizer: Tokenizer, folder: str, cache_dir: str | None = None):
        """Encodes all files, or finds them encoded in the cache: a folder `cache_dir`, None for the user's.

        Raises:
            InputError: no such folder, no text in it, or a file that is not UTF-8; or the cache cannot be written.
        """
        files = text_files(folder)
        build = functools.partial(_build, tokenizer, folder, files)
        self._ring = Ring(tokenizer, cached("texts", files, tokenizer, "haystack", build, cache_dir))

    @property
    def tokens(self) -> int:
        """Number of tokens of all files; longer filler repeats them."""
        return self._ring.tokens

    def window(self, start: int, length: int) -> np.ndarray:
        """The ids [start, start + length) of all files, whatever words and sentences they cut."""
        return self._ring.window(start, length)

    def take(self, rng: np.random.Generator, length: int, taken: Collection[Key] = ()) -> Filler:
        """Filler of exactly `length` tokens; behind the last file the first one follows."""
        return self._ring.take(self._ring.random_start(rng), length)


def _build(tokenizer: Tokenizer, folder: str, files: list[Path], writer: Writer) -> dict[str, Any]:
    small, tokens = np.min_scalar_type(tokenizer.vocab_size - 1), 0
    work, size = functools.partial(_mark_windows, tokenizer), sum(file.stat().st_size for file in files)
    for text in on_all_cores(work, read_windows(files), size):
        writer.append("ids", text.ids.astype(small))
        writer.append("cuts", text.cuts)
        writer.append("gaps", tokens + np.flatnonzero(text.gaps) + 1)
        writer.append("starts", tokens + np.flatnonzero(text.starts) + 1)
        tokens += len(text.ids)
    if not tokens:
        raise no_text(folder)
    return {"tokens": tokens}


def _mark_windows(tokenizer: Tokenizer, windows: list[Window]) -> MarkedText:
    return MarkedText(*map(np.concatenate, zip(*(mark_text(tokenizer, *window) for window in windows), strict=True)))


def _last_until(positions: np.ndarray, most: int) -> int:
    """The last of ascending `positions`, the first of which is 0, that is at most `most`."""
    return int(positions[np.searchsorted(positions, most, side="right") - 1])
