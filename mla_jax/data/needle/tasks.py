"""The retrieval tasks, written in pieces of the lexicon: what is hidden, what is asked, what the answer is.

passkey            The pass key is 123. Remember it. 123 is the pass key.     (landmark-attention, arXiv 2305.16300)
single, multi_key  One of the special magic numbers for red fox is: 12345.    (RULER, arXiv 2404.06654, as the rest)
multi_value        several such numbers of one key, asked together, answered in the order of the text
multi_query        several keys asked together
variable_tracking  VAR fox = 12345. VAR owl = VAR fox.     which variables have the value?
absent_key         a key that is not there, next to one that differs by a word: `not found`
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mla_jax.data.needle import vocabulary as v
from mla_jax.data.needle.lexicon import VALUES, Lexicon

Key = tuple[int, int]
"""Pieces of an adjective and a noun."""

SIZES = {
    "passkey": (1, 1),
    "single": (1, 1),
    "multi_key": (1, 1),
    "multi_value": (2, 4),
    "multi_query": (2, 4),
    "variable_tracking": (2, 4),
    "absent_key": (1, 1),
}
"""Fewest and most needles behind one question."""


@dataclass(frozen=True)
class Unit:
    """Needles, each a sentence, and the one question about them; all in pieces."""

    needles: list[list[int]]
    question: list[int]
    answer: list[int]
    key: Key | None = None
    """The only key that is asked for, if its only number is the answer."""

    def count(self, lexicon: Lexicon) -> int:
        """Tokens of all parts."""
        return lexicon.count([*(piece for needle in self.needles for piece in needle), *self.question, *self.answer])


class NamesUsedUp(Exception):
    """No unused key or variable is left."""


class Names(Protocol):
    """A source of keys, variables and numbers for units."""

    def key(self, near: bool = False) -> Key:
        """A key not given before; if `near`, one that shares a word with a key given before."""
        ...

    def neighbour(self, key: Key) -> Key:
        """A key not given before that shares a word with `key`."""
        ...

    def variable(self) -> int:
        """A variable not given before."""
        ...

    def value(self) -> int:
        """A number of five digits."""
        ...

    def passkey(self) -> int:
        """A pass key."""
        ...


class RandomNames:
    """Names drawn from a random generator, none given twice. Raises NamesUsedUp."""

    def __init__(self, rng: np.random.Generator, lexicon: Lexicon):
        self._rng = rng
        self._adjectives, self._nouns = lexicon.pieces(*v.ADJECTIVES), lexicon.pieces(*v.NOUNS)
        self._variables = [*self._adjectives, *self._nouns]
        self.used: dict[Key, None] = {}

    def key(self, near: bool = False) -> Key:
        """A key not given before."""
        if len(self.used) == len(self._adjectives) * len(self._nouns):
            raise NamesUsedUp
        key = self._key(near)
        while key in self.used:
            key = self._key(near)
        self.used[key] = None
        return key

    def _key(self, near: bool) -> Key:
        """A key at random, or one that shares a word with a key given before."""
        draw = self._rng.integers
        adjective, noun = self._adjectives[draw(len(self._adjectives))], self._nouns[draw(len(self._nouns))]
        if near and self.used:
            other = list(self.used)[draw(len(self.used))]
            return (other[0], noun) if draw(2) else (adjective, other[1])
        return adjective, noun

    def neighbour(self, key: Key) -> Key:
        """A key not given before that shares a word with `key`."""
        near = [(key[0], noun) for noun in self._nouns] + [(adjective, key[1]) for adjective in self._adjectives]
        unused = [other for other in near if other not in self.used]
        if not unused:
            raise NamesUsedUp
        other = unused[self._rng.integers(len(unused))]
        self.used[other] = None
        return other

    def variable(self) -> int:
        """A variable not given before."""
        if not self._variables:
            raise NamesUsedUp
        return self._variables.pop(self._rng.integers(len(self._variables)))

    def value(self) -> int:
        """A number of five digits."""
        return int(self._rng.integers(VALUES // 10, VALUES))

    def passkey(self) -> int:
        """A pass key."""
        return int(self._rng.integers(1, v.PASSKEY_MAX + 1))


class LongestNames:
    """The names that take the most tokens, to find how long a unit can get."""

    def __init__(self, lexicon: Lexicon):
        adjectives, nouns = lexicon.pieces(*v.ADJECTIVES), lexicon.pieces(*v.NOUNS)
        self._key = lexicon.longest(adjectives), lexicon.longest(nouns)
        self._variable = lexicon.longest([*adjectives, *nouns])
        self._value = int(np.argmax(lexicon.lengths[:VALUES]))

    def key(self, near: bool = False) -> Key:
        """The longest key."""
        return self._key

    def neighbour(self, key: Key) -> Key:
        """The longest key."""
        return self._key

    def variable(self) -> int:
        """The longest variable."""
        return self._variable

    def value(self) -> int:
        """The longest number."""
        return self._value

    passkey = value


def make_unit(task: str, size: int, names: Names, lexicon: Lexicon, near: bool = False) -> Unit:
    """A unit of `task` with `size` needles; `near`: its key differs from another one by a word."""
    p = lexicon.pieces
    match task:
        case "passkey":
            value = names.passkey()
            before, between, after = p(*v.PASSKEY_NEEDLE)
            needle = lexicon.with_lines([*p(v.NEWLINE), before, value, between, value, after, *p(v.NEWLINE)])
            return Unit([needle], p(v.NEWLINE, v.PASSKEY_QUESTION), [value, *p(v.STOP)])
        case "single" | "multi_key":
            key, value = names.key(near), names.value()
            return Unit([magic_needle(lexicon, key, value)], magic_question(lexicon, key), [value, *p(v.STOP)], key)
        case "absent_key":
            needle = magic_needle(lexicon, names.key(), names.value())
            return Unit([needle], magic_question(lexicon, names.key(near=True)), p(v.NOT_FOUND, v.STOP))
        case "multi_value" | "multi_query":
            keys = [names.key()] if task == "multi_value" else [names.key() for _ in range(size)]
            values = [names.value() for _ in range(size)]
            needles = [magic_needle(lexicon, keys[i % len(keys)], value) for i, value in enumerate(values)]
            question = [*p(v.NEWLINE, v.MAGIC_QUESTIONS), *_joined(lexicon, keys), *p(v.ARE)]
            return Unit(needles, question, list_answer(lexicon, values))
        case "variable_tracking":
            variables, value = [names.variable() for _ in range(size)], names.value()
            sources = [[value], *([*p(v.VARIABLE), variable] for variable in variables[:-1])]
            needles = [
                [*p(v.VARIABLE), variable, *p(v.EQUALS), *source, *p(v.STOP)]
                for variable, source in zip(variables, sources, strict=True)
            ]
            question = [*p(v.NEWLINE, v.VARIABLE_QUESTION), value, *p(v.ARE)]
            return Unit(needles, question, list_answer(lexicon, variables))
    raise ValueError(task)


def magic_needle(lexicon: Lexicon, key: Key, value: int) -> list[int]:
    """The sentence that gives a key its number."""
    return [*lexicon.pieces(v.MAGIC_NEEDLE), *key, *lexicon.pieces(v.IS), value, *lexicon.pieces(v.STOP)]


def magic_question(lexicon: Lexicon, key: Key) -> list[int]:
    """The line that asks for the number of one key."""
    return [*lexicon.pieces(v.NEWLINE, v.MAGIC_QUESTION), *key, *lexicon.pieces(v.IS)]


def list_answer(lexicon: Lexicon, items: list[int]) -> list[int]:
    """The answer that names one or more numbers or variables."""
    return [*_joined(lexicon, [[item] for item in items]), *lexicon.pieces(v.STOP)]


def _joined(lexicon: Lexicon, items: Sequence[Sequence[int]]) -> list[int]:
    comma = lexicon[v.COMMA]
    return [piece for i, item in enumerate(items) for piece in ([comma] if i else []) + list(item)]


def draw_units(
    rng: np.random.Generator, names: Names, lexicon: Lexicon, task: str, room: int, most: int, near_fraction: float
) -> list[Unit]:
    """Units of a task, log-uniformly 1 to `most` needles, as many of them as fit into `room` tokens.

    At least one if `room` holds `make_unit` of the longest names at the task's smallest size.
    """
    smallest, largest = SIZES[task]
    wanted = 1 if task in ("passkey", "single") else int(math.exp(rng.uniform(0, math.log(most + 1))))
    near = task == "multi_key" and rng.random() < near_fraction
    units: list[Unit] = []
    while wanted > 0:
        # A question whose key is there may follow one whose key is absent, so that it takes reading to tell them apart.
        kind = "multi_key" if task == "absent_key" and units and rng.random() < 0.5 else task
        size = int(rng.integers(smallest, largest + 1))
        try:
            unit = make_unit(kind, size, names, lexicon, near)
            if unit.count(lexicon) > room and size > smallest:
                unit = make_unit(kind, smallest, names, lexicon, near)
        except NamesUsedUp:
            break
        room -= unit.count(lexicon)
        if room < 0:
            break
        units.append(unit)
        wanted -= len(unit.needles)
    return units
