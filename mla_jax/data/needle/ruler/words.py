"""The words that RULER's prompts are made of, and the random keys and values made of them."""

import functools
import uuid
from typing import NamedTuple

import numpy as np
from wonderwords import RandomWord


class Words(NamedTuple):
    """Lists of words; some have a hyphen or a space in them."""

    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]
    verbs: tuple[str, ...]


@functools.cache
def wonderwords() -> Words:
    """All words of the package wonderwords, which RULER takes."""
    source = RandomWord()
    return Words(*(tuple(source.filter(include_categories=[kind])) for kind in ("adjective", "noun", "verb")))


def draw_key(rng: np.random.Generator, words: Words) -> str:
    """An adjective and a noun, joined by a hyphen."""
    return compound(words, int(rng.integers(len(words.adjectives) * len(words.nouns))))


def compound(words: Words, number: int) -> str:
    """One of the `len(adjectives) * len(nouns)` pairs of an adjective and a noun."""
    adjective, noun = divmod(number, len(words.nouns))
    return f"{words.adjectives[adjective]}-{words.nouns[noun]}"


def draw_number(rng: np.random.Generator) -> str:
    """A number of seven digits."""
    return str(rng.integers(10**6, 10**7))


def draw_uuid(rng: np.random.Generator) -> str:
    """A random UUID (version 4) in lower-case hexadecimal."""
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))
