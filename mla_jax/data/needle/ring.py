"""Texts as a ring of token ids, read from anywhere to an exact length, and where their words and sentences end."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from mla_jax.data.needle import vocabulary as v
from mla_jax.data.tokenizer import Tokenizer
from mla_jax.data.within import encode_with_words_within, encode_within, writes_space_before

_SPACES = np.array([code for code in range(0x3001) if chr(code).isspace()], np.uint32)
_SENTENCE_ENDS = np.array([ord(character) for character in ".!?"], np.uint32)


@dataclass(frozen=True)
class Filler:
    """Token ids int32 of a haystack and the ascending positions where a sentence may be put in, the first of them 0."""

    ids: np.ndarray
    gaps: np.ndarray


class MarkedText(NamedTuple):
    """The tokens of a text, ids int32, and what is behind each, bool.

    `cuts` are behind words: what is put there changes no id on either side. A tokenizer that spells out, with no word
    of one token, cuts behind every character. `gaps` are behind sentences, `starts` are those of them before a single
    space, which is what tokenizers may write before a text.
    """

    ids: np.ndarray
    cuts: np.ndarray
    gaps: np.ndarray
    starts: np.ndarray


def mark_text(tokenizer: Tokenizer, text: str, start: int = 0, end: int | None = None) -> MarkedText:
    """The tokens that begin among the characters [start, end) of a text, as they are in the whole text."""
    encoded = encode_with_words_within(tokenizer, text)
    characters = np.frombuffer((text + "\n").encode("utf-32-le"), np.uint32)
    before, behind = characters[encoded.ends - 1], characters[encoded.ends]
    if one_token_word(tokenizer) is None:
        cuts = np.append(encoded.starts[1:] >= encoded.ends[:-1], True)
    else:
        # Without a pre-tokenizer all is one word; a token that begins with white space begins a word there.
        begins = (encoded.words[1:] != encoded.words[:-1]) | np.isin(characters[encoded.starts[1:]], _SPACES)
        cuts = np.append(begins, True) & ~np.isin(before, _SPACES)
    ends = cuts & np.isin(before, _SENTENCE_ENDS)
    second = characters[np.minimum(encoded.ends + 1, len(text))]
    starts = ends & (behind == ord(" ")) & ~np.isin(second, _SPACES)
    marked = MarkedText(encoded.ids, cuts, ends & np.isin(behind, _SPACES), starts)
    here = (encoded.starts >= start) & (encoded.starts < (len(text) + 1 if end is None else end))
    return MarkedText(*(array[here] for array in marked))


class RingArrays(Protocol):
    """Arrays by name: `ids`; `cuts`, bool, as in MarkedText; `gaps` and `starts`, the ascending positions of these."""

    def __getitem__(self, name: str, /) -> np.ndarray: ...


class Ring:
    """Texts that follow each other, the first behind the last; each begins with white space and ends without."""

    def __init__(self, tokenizer: Tokenizer, arrays: RingArrays):
        self._arrays = arrays
        self._starts = "starts" if len(arrays["starts"]) and writes_space_before(tokenizer) else "gaps"
        word = one_token_word(tokenizer)
        self._topping = encode_within(tokenizer, [v.STOP])[0][-1] if word is None else word

    @property
    def tokens(self) -> int:
        """Number of tokens of all texts."""
        return len(self._arrays["ids"])

    def window(self, start: int, length: int) -> np.ndarray:
        """Ids int32 [start, start + length), which must be there."""
        return self._arrays["ids"][start : start + length].astype(np.int32)

    def random_start(self, rng: np.random.Generator) -> int:
        """A position behind a sentence."""
        starts = self._arrays[self._starts]
        return int(starts[rng.integers(len(starts))]) if len(starts) else 0

    def take(self, start: int, length: int) -> Filler:
        """Exactly `length` tokens from `start`, which is a cut, on: whole words, topped up with a word of one token."""
        ids, gaps = self._arrays["ids"], self._arrays["gaps"]
        size = len(ids)
        rounds, rest = divmod(start + length, size)
        end = last_cut(self._arrays["cuts"], rest)
        first, last = np.searchsorted(gaps, [start, end], side="right")
        if rounds:
            ids = np.concatenate([ids[start:], np.tile(ids, rounds - 1), ids[:end]])
            between = (gaps + size * np.arange(1, rounds)[:, None]).ravel()
            gaps = np.concatenate([gaps[first:], between, gaps[:last] + size * rounds])
        else:
            ids, gaps = ids[start:end], gaps[first:last]
        return Filler(self.topped_up(ids, length), np.append(0, gaps - start))

    def topped_up(self, ids: np.ndarray, length: int) -> np.ndarray:
        """`ids` and as many words of one token as `length` takes."""
        return np.append(ids.astype(np.int32), np.full(length - len(ids), self._topping, np.int32))


def ring_arrays(texts: Iterable[MarkedText]) -> dict[str, np.ndarray]:
    """The arrays of a ring of some texts."""
    ids, cuts, gaps, starts = (np.concatenate(arrays) for arrays in zip(*texts, strict=True))
    return {"ids": ids, "cuts": cuts, "gaps": np.flatnonzero(gaps) + 1, "starts": np.flatnonzero(starts) + 1}


def last_cut(cuts: np.ndarray, most: int) -> int:
    """The last position up to `most` where one can cut; 0 if there is none."""
    reach = 64
    while most > 0:
        found = np.flatnonzero(cuts[max(most - reach, 0) : most])
        if len(found):
            return max(most - reach, 0) + int(found[-1]) + 1
        if reach >= most:
            break
        reach *= 8
    return 0


@functools.lru_cache(maxsize=8)
def one_token_word(tokenizer: Tokenizer) -> int | None:
    """A word of a single token; None if the tokenizer spells out, letter by letter or byte by byte."""
    return next((ids[0] for ids in encode_within(tokenizer, [" and", " the", " a"]) if len(ids) == 1), None)
