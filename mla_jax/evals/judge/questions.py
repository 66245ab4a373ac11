"""Which answers the judge is asked about, and for which measure, as samples for Inspect."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from inspect_ai.dataset import Sample

from mla_jax.config import JudgeConfig
from mla_jax.errors import InputError
from mla_jax.evals.judge.items import Item, normalized
from mla_jax.evals.judge.planted import Planted, PlantedPair, plant, plant_pairs


@dataclass(frozen=True)
class Pair:
    """Two answers to a question."""

    item: Item
    """The question, with the first answer."""
    other: Item
    """The same question, with the second."""

    @property
    def is_tie(self) -> bool:
        """Whether there is nothing to ask: the answers are the same, or exact match calls both right."""
        return normalized(self.item.answer) == normalized(self.other.answer) or (self.item.exact and self.other.exact)


@dataclass(frozen=True)
class Questions:
    """Everything that is asked; `checked`, `compared` and `retested` are indices of `items`."""

    items: list[Item]
    checked: list[int]
    """Answers that exact match settles and the judge is asked about all the same."""
    compared: list[int]
    """Answers on which exact match and the judge are compared: `checked`, and the same share of those left open."""
    retested: list[int]
    """Answers that are asked about twice: of those that the judge is asked about."""
    planted: list[Planted]
    planted_pairs: list[PlantedPair]
    against: list[Pair]


def plan(config: JudgeConfig, items: list[Item], others: list[Item] | None) -> Questions:
    """What to ask about `items`, and about the same questions in `others`; depends on nothing but these and the seed.

    Raises:
        InputError: `others` has no question of `items`.
    """
    rng = random.Random(config.seed)
    settled = [i for i, item in enumerate(items) if item.exact]
    left_open = [i for i, item in enumerate(items) if not item.exact]
    checked = sorted(rng.sample(settled, min(config.agreement, len(settled))))
    share = len(checked) / len(settled) if settled else 1.0
    compared = sorted([*checked, *rng.sample(left_open, round(share * len(left_open)))])
    asked = sorted([*left_open, *checked])
    retested = sorted(rng.sample(asked, min(config.retest, len(asked))))
    against = [] if others is None else _pairs(items, others)
    if others is not None and not against:
        raise InputError(f"{config.against} answers none of the questions of {config.answers}; they cannot be compared")
    return Questions(
        items, checked, compared, retested,
        plant(items, config.planted, config.seed), plant_pairs(items, config.pairs, config.seed), against,
    )  # fmt: skip


def _pairs(items: Sequence[Item], others: Sequence[Item]) -> list[Pair]:
    """Each item with the other answer to its question about its haystack."""
    waiting: dict[tuple, list[Item]] = defaultdict(list)
    for other in reversed(others):
        waiting[other.haystack, other.question, other.gold].append(other)
    keys = [(item, (item.haystack, item.question, item.gold)) for item in items]
    return [Pair(item, waiting[key].pop()) for item, key in keys if waiting[key]]


def sample_of(item: Item) -> Sample:
    """An answer as a sample of one of the scorers; the haystack is not in it."""
    metadata = {
        "answer": item.answer,
        "distractors": ", ".join(item.distractors) or "none",
        "exact": item.right if item.exact else "",
    }
    return Sample(input=item.question, target=item.gold, metadata=metadata)


def pair_sample(item: Item, first: str, second: str) -> Sample:
    """Two answers to the question of `item` as a sample of the pairwise scorer."""
    sample = sample_of(item)
    return sample.model_copy(update={"metadata": (sample.metadata or {}) | {"first": first, "second": second}})
