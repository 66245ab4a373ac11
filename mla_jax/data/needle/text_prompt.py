"""Prompts that are made as texts, in formats that others define, encoded as a whole to fit a length."""

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from mla_jax.data.tokenizer import Tokenizer
from mla_jax.data.within import encode_within
from mla_jax.errors import UsageError

_ATTEMPTS = 100
PIECE_CHARS = 1 << 16
"""Characters of a prompt that are encoded together, at least."""
_LINE_END = re.compile(r"\n(?=[^\W_])")


@dataclass(frozen=True)
class TextPrompt:
    """A prompt, up to where the answer begins, and all that a right answer names."""

    text: str
    answers: tuple[str, ...]


class HasText(Protocol):
    """A prompt, or what questions are asked about."""

    @property
    def text(self) -> str:
        """All of it."""
        ...


T = TypeVar("T", bound=HasText, covariant=True)


class Maker(Protocol[T]):
    """A function that draws a prompt with so many items in its haystack."""

    def __call__(self, rng: np.random.Generator, size: int, /) -> T:
        """The prompt."""
        ...


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a prompt, bos first if there is one."""
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    first, *others = _pieces(text)
    encoded = encode_within(tokenizer, others) if others else []
    return list(itertools.chain(bos, tokenizer.encode(first), *encoded))


def _pieces(text: str) -> list[str]:
    """A long text in pieces of whole lines, which are encoded on all cores, and each quicker than as a part of a whole.

    A line break before a letter or a digit is where every tokenizer ends a word.
    """
    pieces, start = [], 0
    while found := _LINE_END.search(text, start + PIECE_CHARS):
        pieces.append(text[start : found.end()])
        start = found.end()
    return [*pieces, text[start:]]


def largest_haystack(
    tokenizer: Tokenizer, make: Maker[HasText], rng: Callable[[], np.random.Generator], tokens: int, least: int
) -> int:
    """Items of a haystack for which a prompt takes at most `tokens`, and hardly fewer than that.

    At most a thousandth is left over, or one item more would be too many. Tokens grow evenly with items, so few prompts
    need to be encoded to find out.

    Args:
        tokenizer: counts the tokens.
        make: makes the prompt.
        rng: gives the same random generator each time.
        tokens: of the prompt.
        least: the fewest items that `make` takes, returned if not even they fit.
    """

    def total(size: int) -> int:
        return len(encode_prompt(tokenizer, make(rng(), size).text))

    low, high, enough = least, 2 * least, tokens - tokens // 1000
    at_low, at_high = total(low), total(high)
    while at_high <= tokens:
        aim = high + math.ceil(1.02 * (tokens - at_high) * (high - low) / max(at_high - at_low, 1))
        low, at_low, high = high, at_high, min(aim + 1, 8 * high)
        at_high = total(high)
    while at_low < enough and high - low > 1:
        aim = low + (tokens - at_low) * (high - low) // (at_high - at_low)
        size = min(max(aim, low + 1), high - 1)
        if (taken := total(size)) <= tokens:
            low, at_low = size, taken
        else:
            high, at_high = size, taken
    return low


def fitting_prompt(
    tokenizer: Tokenizer, make: Maker[T], rng: np.random.Generator, tokens: int, size: int, least: int,
    key: str = "eval.lengths",
) -> tuple[T, list[int]]:  # fmt: skip
    """A prompt and its ids; one that takes more than `tokens` is drawn anew with fewer items.

    Args:
        tokenizer: encodes the prompt.
        make: makes the prompt.
        rng: draws it.
        tokens: the most that it may take.
        size: items of the haystack to begin with.
        least: the fewest items that `make` takes.
        key: the config key that says how long it may be.

    Raises:
        UsageError: of some prompts with `least` items none fits.
    """
    ids: list[int] = []
    for _ in range(_ATTEMPTS):
        prompt = make(rng, size)
        ids = encode_prompt(tokenizer, prompt.text)
        if len(ids) <= tokens:
            return prompt, ids
        size = max(size - max(size // 100, 1), least)
    raise UsageError(
        f"{key} is too short: {len(ids)} tokens are needed with tokenizer {tokenizer.source}, {tokens} are left"
    )
