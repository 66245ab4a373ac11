"""Haystacks, the filler around needles: each gives exactly as many tokens as asked for, and where its sentences end."""

import functools
from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mla_jax.data.needle import vocabulary as v
from mla_jax.data.needle.lexicon import VALUES, Lexicon
from mla_jax.data.needle.tasks import Key
from mla_jax.data.text_folder import read_texts
from mla_jax.data.tokenizer import Tokenizer
from mla_jax.data.within import encode_with_words_within, encode_within, writes_space_before


@dataclass(frozen=True)
class Filler:
    """Token ids int32 of a haystack and the ascending positions where a sentence may be put in, the first of them 0."""

    ids: np.ndarray
    gaps: np.ndarray


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
        self._ring = _Ring(tokenizer, " " + first, *others)
        self._first = _Text(tokenizer, first) if begins_line else None
        self._second = len(encode_within(tokenizer, [" " + first])[0])

    def take(self, rng: np.random.Generator, length: int, taken: Collection[Key] = ()) -> Filler:
        """Filler of exactly `length` tokens, from the first sentence on."""
        first = self._first
        if first is None:
            return self._ring.take(0, length)
        if length < len(first.ids):
            return Filler(self._ring.topped_up(first.ids[: _last_until(first.cuts, length)], length), first.cuts[:1])
        rest = self._ring.take(self._second, length - len(first.ids))
        return Filler(np.concatenate([first.ids, rest.ids]), np.append(0, rest.gaps + len(first.ids)))


class WordsHaystack:
    """Sentences of 4 to 10 random words."""

    def __init__(self, tokenizer: Tokenizer, lexicon: Lexicon):
        self._lexicon = lexicon
        self._words = np.array(lexicon.pieces(*v.FILLER_WORDS))
        self._stop = lexicon[v.STOP]
        self._one_token_word = _one_token_word(tokenizer)

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

    def __init__(self, tokenizer: Tokenizer, folder: str):
        """Reads and encodes all files.

        Raises:
            InputError: no such folder, no text in it, or a file that is not UTF-8.
        """
        self._ring = _Ring(tokenizer, *("\n" + text.strip() for text in read_texts(folder)))

    def take(self, rng: np.random.Generator, length: int, taken: Collection[Key] = ()) -> Filler:
        """Filler of exactly `length` tokens; behind the last file the first one follows."""
        return self._ring.take(self._ring.random_start(rng), length)


_SPACES = np.array([code for code in range(0x3001) if chr(code).isspace()], np.uint32)
_SENTENCE_ENDS = np.array([ord(character) for character in ".!?"], np.uint32)


class _Text:
    """An encoded text and the positions where it can be cut.

    `cuts` lie behind words (and at 0): what is put there changes no id on either side. `gaps` lie behind sentences,
    `starts` are those of them before a single space, which is what tokenizers may write before a text.
    A tokenizer that spells out, with no word of one token, cuts behind every character.
    """

    def __init__(self, tokenizer: Tokenizer, text: str):
        encoded = encode_with_words_within(tokenizer, text)
        characters = np.frombuffer((text + "\n").encode("utf-32-le"), np.uint32)
        before, behind = characters[encoded.ends - 1], characters[encoded.ends]
        if _one_token_word(tokenizer) is None:
            cut = np.append(encoded.starts[1:] >= encoded.ends[:-1], True)
        else:
            # Without a pre-tokenizer all is one word; a token that begins with white space begins a word there.
            begins = (encoded.words[1:] != encoded.words[:-1]) | np.isin(characters[encoded.starts[1:]], _SPACES)
            cut = np.append(begins, True) & ~np.isin(before, _SPACES)
        self.ids = encoded.ids
        self.cuts = np.append(0, np.flatnonzero(cut) + 1)
        ends = cut & np.isin(before, _SENTENCE_ENDS)
        self.gaps = np.flatnonzero(ends & np.isin(behind, _SPACES)) + 1
        second = characters[np.minimum(encoded.ends + 1, len(text))]
        self.starts = np.flatnonzero(ends & (behind == ord(" ")) & ~np.isin(second, _SPACES)) + 1


class _Ring:
    """Texts that follow each other, the first behind the last; each begins with white space and ends without."""

    def __init__(self, tokenizer: Tokenizer, *texts: str):
        parts = [_Text(tokenizer, text) for text in texts]
        shifts = np.cumsum([0, *(len(part.ids) for part in parts)])
        self._ids = np.concatenate([part.ids for part in parts])
        self._cuts = np.append(0, np.concatenate([p.cuts[1:] + shift for p, shift in zip(parts, shifts, strict=False)]))
        self._gaps = np.concatenate([p.gaps + shift for p, shift in zip(parts, shifts, strict=False)])
        starts = np.concatenate([p.starts + shift for p, shift in zip(parts, shifts, strict=False)])
        self._starts = starts if len(starts) and writes_space_before(tokenizer) else self._gaps
        word = _one_token_word(tokenizer)
        self._topping = encode_within(tokenizer, [v.STOP])[0][-1] if word is None else word

    def random_start(self, rng: np.random.Generator) -> int:
        """A position behind a sentence."""
        return int(self._starts[rng.integers(len(self._starts))]) if len(self._starts) else 0

    def take(self, start: int, length: int) -> Filler:
        """Exactly `length` tokens from `start`, which is a cut, on: whole words, topped up with a word of one token."""
        size = len(self._ids)
        rounds, rest = divmod(start + length, size)
        end = rounds * size + _last_until(self._cuts, rest)
        ids, gaps = self._ids, self._gaps
        if rounds:
            ids = np.tile(ids, rounds + 1)
            gaps = (gaps + size * np.arange(rounds + 1)[:, None]).ravel()
        first, last = np.searchsorted(gaps, [start, end], side="right")
        return Filler(self.topped_up(ids[start:end], length), np.append(0, gaps[first:last] - start))

    def topped_up(self, ids: np.ndarray, length: int) -> np.ndarray:
        """`ids` and as many words of one token as `length` takes."""
        return np.append(ids, np.full(length - len(ids), self._topping, np.int32))


@functools.lru_cache(maxsize=8)
def _one_token_word(tokenizer: Tokenizer) -> int | None:
    """A word of a single token; None if the tokenizer spells out, letter by letter or byte by byte."""
    return next((ids[0] for ids in encode_within(tokenizer, [" and", " the", " a"]) if len(ids) == 1), None)


def _last_until(positions: np.ndarray, most: int) -> int:
    """The last of ascending `positions`, the first of which is 0, that is at most `most`."""
    return int(positions[np.searchsorted(positions, most, side="right") - 1])
