"""Questions about needles, each with its answer and a wrong one of a certain kind.

near_key       the number of a key that differs from the asked one by a word
digit_edit     the right number, one or two digits changed
random_value   other numbers or variables, as many as are asked for
false_refusal  `not found`
wrong_order    the right numbers or variables in another order, or not all of them
absent_key     no needle has the key: `not found` is right, wrong is a number, mostly that of a near key
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mla_jax.data.needle import tasks
from mla_jax.data.needle import vocabulary as v
from mla_jax.data.needle.lexicon import Lexicon

SUITABLE = {
    "near_key": ("multi_key",),
    "digit_edit": ("passkey", "single", "multi_key", "multi_value", "multi_query"),
    "random_value": ("passkey", "single", "multi_key", "multi_value", "multi_query", "variable_tracking"),
    "false_refusal": ("passkey", "single", "multi_key", "multi_value", "multi_query", "variable_tracking"),
    "wrong_order": ("multi_value", "multi_query", "variable_tracking"),
    "absent_key": ("absent_key",),
}
"""Tasks whose questions can be answered wrongly in each way."""

_FROM_NEAR_KEY, _FROM_ANY_KEY = 0.6, 0.8
"""Cumulative shares of the numbers that an absent key is given; the rest are in no needle."""

AGAIN = ("digit_edit", "random_value", "false_refusal", "absent_key")
"""Kinds of questions that can be asked about a key that has its needle already."""


@dataclass(frozen=True)
class Question:
    """A question with a right and a wrong answer, and what is hidden for it, all in pieces."""

    needles: list[list[list[int]]]
    """Groups of needles that stay in their order."""
    question: list[int]
    chosen: list[int]
    rejected: list[int]
    numbers: dict[tasks.Key, int]
    """The numbers of keys that have exactly one, in these needles."""

    def needle_tokens(self, lexicon: Lexicon) -> int:
        """Tokens of all needles."""
        return sum(lexicon.count(needle) for group in self.needles for needle in group)


def make_question(
    rng: np.random.Generator, names: tasks.RandomNames, lexicon: Lexicon, kind: str, task: str, size: int,
    others: list[int],
) -> Question:  # fmt: skip
    """A question of `task` about `size` needles, answered wrongly in the way of `kind`, one that suits the task.

    `others` are numbers in other needles. Raises NamesUsedUp.
    """
    if kind in ("near_key", "absent_key"):
        return _key_question(rng, names, lexicon, kind == "absent_key", others)
    unit = tasks.make_unit(task, size, names, lexicon)
    separators = lexicon.pieces(v.COMMA, v.STOP)
    items = [piece for piece in unit.answer if piece not in separators]
    numbers = {} if unit.key is None else {unit.key: items[0]}
    rejected = tasks.list_answer(lexicon, _wrong(rng, names, lexicon, kind, task, items))
    return Question([unit.needles], unit.question, unit.answer, rejected, numbers)


def ask_again(
    rng: np.random.Generator, names: tasks.RandomNames, lexicon: Lexicon, kind: str, numbers: dict[tasks.Key, int]
) -> Question:
    """A question of a kind of `AGAIN` that needs no needle: about one of the keys that have these `numbers`.

    An absent key differs from it by a word. Raises NamesUsedUp.
    """
    key = list(numbers)[rng.integers(len(numbers))]
    value = numbers[key]
    if kind == "absent_key":
        key, right = names.neighbour(key), lexicon.pieces(v.NOT_FOUND)
        wrong = [value if rng.random() < _FROM_ANY_KEY else _other_than(value, names.value)]
    else:
        right, wrong = [value], _wrong(rng, names, lexicon, kind, "multi_key", [value])
    chosen, rejected = (tasks.list_answer(lexicon, items) for items in (right, wrong))
    return Question([], tasks.magic_question(lexicon, key), chosen, rejected, {})


def _wrong(
    rng: np.random.Generator, names: tasks.RandomNames, lexicon: Lexicon, kind: str, task: str, items: list[int]
) -> list[int]:
    """The wrong answer of a kind, instead of `items`; in pieces."""
    match kind:
        case "digit_edit":
            return _edited(rng, items)
        case "wrong_order":
            return _misplaced(rng, items)
        case "random_value" if task == "variable_tracking":
            variables = [piece for piece in lexicon.pieces(*v.ADJECTIVES, *v.NOUNS) if piece not in items]
            return [variables[i] for i in rng.choice(len(variables), size=len(items), replace=False)]
        case "random_value":
            return [_other_than(item, names.passkey if task == "passkey" else names.value) for item in items]
        case "false_refusal":
            return lexicon.pieces(v.NOT_FOUND)
        case _:
            raise ValueError(kind)


def _key_question(
    rng: np.random.Generator, names: tasks.RandomNames, lexicon: Lexicon, absent: bool, others: list[int]
) -> Question:
    """A question about a key, or an absent one, where a key that differs by a word has another number."""
    key, value = names.key(), names.value()
    near, near_value = names.neighbour(key), _other_than(value, names.value)
    near_needle = tasks.magic_needle(lexicon, near, near_value)
    needles, right, wrong = [[tasks.magic_needle(lexicon, key, value)], [near_needle]], value, near_value
    numbers = {key: value, near: near_value}
    if absent:
        needles, right, share = [[near_needle]], lexicon[v.NOT_FOUND], rng.random()
        del numbers[key]
        if share >= _FROM_ANY_KEY:
            wrong = value
        elif share >= _FROM_NEAR_KEY and others:
            wrong = others[rng.integers(len(others))]
    chosen, rejected = (tasks.list_answer(lexicon, [item]) for item in (right, wrong))
    return Question(needles, tasks.magic_question(lexicon, key), chosen, rejected, numbers)


def _other_than(value: int, draw: Callable[[], int]) -> int:
    """A draw that is not `value`."""
    while (other := draw()) == value:
        pass
    return other


def _edited(rng: np.random.Generator, values: list[int]) -> list[int]:
    """One of the numbers with one or two digits changed; it keeps its length."""
    i = rng.integers(len(values))
    digits = list(str(values[i]))
    for place in rng.choice(len(digits), size=min(rng.integers(1, 3), len(digits)), replace=False):
        allowed = [d for d in "0123456789" if d != digits[place] and (d != "0" or place > 0)]
        digits[place] = allowed[rng.integers(len(allowed))]
    return [*values[:i], int("".join(digits)), *values[i + 1 :]]


def _misplaced(rng: np.random.Generator, items: list[int]) -> list[int]:
    """The items in another order, or not all of them."""
    order = rng.permutation(len(items))
    if rng.random() < 0.5 and [items[i] for i in order] != items:
        return [items[i] for i in order]
    kept = rng.choice(len(items), size=rng.integers(1, len(items)), replace=False)
    return [items[i] for i in sorted(kept)]
