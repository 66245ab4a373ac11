"""Answers whose class is known because they were made so: what a judge says of them is its error.

None of them is an exact match, since a judge is asked about what exact match leaves open.
"""

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass

from mla_jax.data.needle.questions import REFUSAL
from mla_jax.evals.judge import verdicts as v
from mla_jax.evals.judge.items import Item, normalized

_IN_WORDS = ("I found it: {}.", "The document says {}.", "It should be {}, as far as I can see.")
_REFUSALS = ("The document does not say.", "There is nothing about this in the text.", "I could not find that.")
_TRIES = 100


@dataclass(frozen=True)
class Planted:
    """An item with an answer of a known class."""

    item: Item
    verdict: str


@dataclass(frozen=True)
class PlantedPair:
    """An item with a right and a wrong answer."""

    item: Item
    right: str
    wrong: str


def plant(items: Sequence[Item], count: int, seed: int) -> list[Planted]:
    """At most `count` answers of each class to questions of `items`, drawn at random; as many as there can be.

    Where no question is without an answer in the document, some are made so for the correct refusals.
    """
    rng = random.Random(seed)
    planted = []
    for verdict in v.VERDICTS:
        pool = _pool(items, verdict)
        rng.shuffle(pool)
        made = []
        for item in pool:
            answer = None if len(made) == count else make_answer(item, verdict, pool, rng)
            if answer is not None:
                made.append(Planted(dataclasses.replace(item, answer=answer, exact=False), verdict))
        planted += made
    return planted


def plant_pairs(items: Sequence[Item], count: int, seed: int) -> list[PlantedPair]:
    """At most `count` questions with a right answer and a wrong one of a random class."""
    rng = random.Random(seed)
    pool = _pool(items, v.CORRECT)
    rng.shuffle(pool)
    pairs: list[PlantedPair] = []
    for item in pool[:count]:
        right = make_answer(item, v.CORRECT, pool, rng)
        kinds = [v.DISTRACTOR, v.NEAR_MISS, v.HALLUCINATED, v.FALSE_REFUSAL]
        rng.shuffle(kinds)
        wrong = next(filter(None, (make_answer(item, kind, pool, rng) for kind in kinds)), None)
        if right is not None and wrong is not None:
            pairs.append(PlantedPair(item, right, wrong))
    return pairs


def _pool(items: Sequence[Item], verdict: str) -> list[Item]:
    """Each question once, of those that an answer of this class can be made for."""
    unlike = {(item.question, item.gold, item.distractors): item for item in items}.values()
    answered = [item for item in unlike if item.has_answer]
    if verdict in (v.CORRECT, v.NEAR_MISS, v.FALSE_REFUSAL):
        return answered
    if verdict == v.CORRECT_REFUSAL:
        without = [item for item in unlike if not item.has_answer]
        return without or [dataclasses.replace(item, gold=REFUSAL) for item in answered]
    return list(unlike)


def make_answer(item: Item, verdict: str, others: Sequence[Item], rng: random.Random) -> str | None:
    """An answer to `item` of this class; None if there is none, as a distractor where there are no distractors."""
    match verdict:
        case v.CORRECT:
            return _in_words(item.gold, rng)
        case v.NEAR_MISS:
            value = _nearly(item, rng)
        case v.DISTRACTOR:
            wrong = [each for each in item.distractors if normalized(each) != normalized(item.gold)]
            value = rng.choice(wrong) if wrong else None
        case v.HALLUCINATED:
            value = _invented(item, others, rng)
        case _:
            return rng.choice(_REFUSALS)
    return None if value is None else _in_words(value, rng) if rng.random() < 0.5 else value


def _in_words(value: str, rng: random.Random) -> str:
    return rng.choice(_IN_WORDS).format(value)


def _taken(item: Item) -> set[str]:
    return {normalized(text) for text in (item.gold, *item.distractors)}


def _nearly(item: Item, rng: random.Random) -> str | None:
    """The right answer with one digit changed or, without digits, two letters that are neighbours exchanged."""
    gold = item.gold
    digits = [i for i, character in enumerate(gold) if character in "0123456789"]
    letters = [i for i in range(len(gold) - 1) if gold[i].isalpha() and gold[i + 1].isalpha()]
    for _ in range(_TRIES if digits or letters else 0):
        if digits:
            i = rng.choice(digits)
            changed = gold[:i] + rng.choice("123456789") + gold[i + 1 :]
        else:
            i = rng.choice(letters)
            changed = gold[:i] + gold[i + 1] + gold[i] + gold[i + 2 :]
        if normalized(changed) not in _taken(item):
            return changed
    return None


def _invented(item: Item, others: Sequence[Item], rng: random.Random) -> str | None:
    """Something that is neither the right answer nor a distractor: other digits, or the answer to another question."""
    model = item.gold if item.has_answer else next(iter(item.distractors), item.gold)
    answers = [other.gold for other in others if other.has_answer]
    for _ in range(_TRIES):
        if any(character in "0123456789" for character in model):
            value = "".join(rng.choice("123456789") if c in "0123456789" else c for c in model)
        else:
            value = rng.choice(answers) if answers else model
        if normalized(value) not in _taken(item):
            return value
    return None
