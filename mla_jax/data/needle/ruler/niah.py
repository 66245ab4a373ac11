"""RULER's eight needle-in-a-haystack tasks: values of keys, hidden in noise, in other needles or in a text."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mla_jax.data.needle import vocabulary as v
from mla_jax.data.needle.ruler.words import Words, draw_key, draw_number, draw_uuid
from mla_jax.data.needle.text_prompt import TextPrompt

_MANY = (
    "Some special magic {values} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {values} afterwards.\n{context}\n"
    "What are all the special magic {values} for {query} mentioned in the provided text? "
    "The special magic {values} for {query} mentioned in the provided text are"
)
_ONE = (
    "A special magic {values} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {values} afterwards.\n{context}\n"
    "What is the special magic {values} for {query} mentioned in the provided text? "
    "The special magic {values} for {query} mentioned in the provided text is"
)
_NEEDLE = "One of the special magic {values} for {key} is: {value}."
_NOISE = "".join(v.NOISE)
DEPTHS = np.round(np.linspace(0, 100, 40)).astype(int)
"""The depths at which needles stand in a text, in percent of its sentences."""


@dataclass(frozen=True)
class Niah:
    """A task: what hides the needles, how many there are, and how many are asked for."""

    haystack: Literal["noise", "needles", "text"]
    uuid_keys: bool = False
    uuid_values: bool = False
    keys: int = 1
    values: int = 1
    """Values of a key; each has a needle of its own."""
    asked: int = 1
    """Keys asked for together."""


TASKS = {
    "niah_single_1": Niah("noise"),
    "niah_single_2": Niah("text"),
    "niah_single_3": Niah("text", uuid_values=True),
    "niah_multikey_1": Niah("text", keys=4),
    "niah_multikey_2": Niah("needles"),
    "niah_multikey_3": Niah("needles", uuid_keys=True, uuid_values=True),
    "niah_multivalue": Niah("text", values=4),
    "niah_multiquery": Niah("text", keys=4, asked=4),
}


class Text:
    """A text as its words, and where its sentences end: RULER's, but that it takes nltk's word for the latter."""

    def __init__(self, words: Sequence[str]):
        self.words = words
        ends = [i + 1 for i, word in enumerate(words) if re.search(r"[.!?][\"'”’)\]]*$", word)]
        self._ends = np.array(ends, np.int64)

    def hide(self, needles: Sequence[str], size: int, depths: Sequence[int]) -> str:
        """The first `size` words, with each needle behind that percentage of their sentences (ascending)."""
        whole = self._ends[: np.searchsorted(self._ends, size)]
        ends = [0, *whole.tolist(), size]  # what follows the last sentence counts as one
        places = [ends[int((len(ends) - 1) * (depth / 100))] for depth in depths]
        spans = [" ".join(self.words[a:b]) for a, b in itertools.pairwise([0, *places, size])]
        return " ".join([spans[0], *itertools.chain.from_iterable(zip(needles, spans[1:], strict=True))])


def niah_prompt(rng: np.random.Generator, size: int, task: Niah, words: Words, text: Text | None = None) -> TextPrompt:
    """A prompt whose haystack has `size` noise lines, needles, or words of `text`.

    Args:
        rng: draws all that is random.
        size: items of the haystack, at least as many as there are needles.
        task: one of TASKS.
        words: keys are made of them.
        text: of haystacks that are text.
    """
    kind = "uuids" if task.uuid_values else "numbers"
    value = draw_uuid if task.uuid_values else draw_number

    def key() -> str:
        return draw_uuid(rng) if task.uuid_keys else draw_key(rng, words)

    def needle(key: str, value: str) -> str:
        return _NEEDLE.format(values=kind, key=key, value=value)

    values: dict[str, list[str]] = {}
    while len(values) < task.keys:
        new = key()
        values[new] = [value(rng) for _ in range(task.values)]
    needles = [needle(key, each) for key, of_key in values.items() for each in of_key]
    rng.shuffle(needles)
    if task.haystack == "text":
        assert text is not None
        context = text.hide(needles, size, sorted(rng.choice(DEPTHS, len(needles), replace=False)))
    else:
        lines = [_NOISE] * size
        if task.haystack == "needles":
            lines = [needle(_other(key, values), value(rng)) for _ in range(size)]
        for place, each in zip(sorted(rng.choice(size, len(needles), replace=False))[::-1], needles, strict=True):
            lines.insert(place, each)
        context = "\n".join(lines)
    asked = [list(values)[i] for i in rng.choice(len(values), task.asked, replace=False)]
    query = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
    template, kind = (_ONE, kind[:-1]) if task.asked * task.values == 1 else (_MANY, kind)
    answers = tuple(each for key in asked for each in values[key])
    return TextPrompt(template.format(values=kind, context=context, query=query), answers)


def _other(key, taken) -> str:
    """A key that is not taken, so that the question has one answer; RULER leaves that to chance."""
    return next(each for each in iter(key, None) if each not in taken)
