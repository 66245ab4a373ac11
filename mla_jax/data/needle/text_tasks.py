"""Training tasks in the formats of two evaluations that follow chains: HashHop, and RULER's variable tracking.

    hashhop     1 to 4 hops through shuffled lines of random hashes, then questions about some of the chains; of
                the kinds that fit, one half wants all hashes of a chain (CoT=True), the other its last one
    ruler_vt    RULER's prompt, with its solved example where that fits, then the answer

Both are made as texts: where one is shorter than the example, <eos> is repeated.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from mla_jax.data.needle.hashhop import hash_chains
from mla_jax.data.needle.ruler.variable_tracking import HOPS, LETTERS, chain_prompt, example_size, variable_prompt
from mla_jax.data.needle.text_prompt import HasText, Maker, encode_prompt, fitting_prompt, largest_haystack
from mla_jax.data.tokenizer import Tokenizer
from mla_jax.data.within import encode_within

T = TypeVar("T", bound=HasText)


class Span(NamedTuple):
    """A piece of what follows the text: of questions and answers."""

    text: str
    learned: bool = False
    answer: bool = False
    """Whether it is the first answer itself."""


class Asked(NamedTuple):
    """A text, bos first, and what is asked about it."""

    ids: list[int]
    spans: list[Span]


class TextTask(Protocol):
    """A task whose examples are made as texts."""

    @property
    def shortest(self) -> int:
        """Tokens that hold an example, whatever is drawn."""
        ...

    def draw(self, rng: np.random.Generator, length: int) -> Asked:
        """A text that takes as much of `length` tokens, at least `shortest`, as fits with its questions and <eos>."""
        ...


class _Fitting:
    """Texts that take as much as fits; how many items that are is found out once for each length and kind."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._sizes: dict[tuple[int, ...], int] = {}

    def count(self, make: Maker[HasText], least: int) -> int:
        """Tokens of a text of `least` items, and a tenth more: how many random letters take differs."""
        return len(encode_prompt(self._tokenizer, make(_measuring(), least).text)) * 11 // 10

    def draw(
        self, rng: np.random.Generator, make: Maker[T], tokens: int, least: int, *kind: int
    ) -> tuple[T, list[int]]:
        """A text of at most `tokens` and its ids; `kind` tells makers apart."""
        key = (tokens, *kind)
        if key not in self._sizes:
            self._sizes[key] = largest_haystack(self._tokenizer, make, _measuring, tokens, least)
        return fitting_prompt(self._tokenizer, make, rng, tokens, self._sizes[key], least, "train.stages.seq_len")


class HashHopTask:
    """Chains of hashes with 1 to 4 hops, 1 to 64 of them asked about; answers are the last hash, or all of them."""

    LETTERS = 16
    KINDS = tuple(itertools.product((1, 2, 3, 4), (False, True), (1, 4, 16, 64)))
    """Hops, whether the answer has all hashes, and questions."""

    def __init__(self, tokenizer: Tokenizer):
        self._fitting = _Fitting(tokenizer)
        self._needed = {
            kind: self._fitting.count(self._maker(*kind[:2]), kind[2]) + self._turns(*kind) + 1 for kind in self.KINDS
        }
        self.shortest = min(self._needed.values())

    def _maker(self, hops: int, whole: bool) -> Callable:
        return functools.partial(hash_chains, hops=hops, letters=self.LETTERS, chain_of_thought=whole)

    def _turns(self, hops: int, whole: bool, asked: int) -> int:
        """The most tokens of the questions with their answers: each character is one."""
        answer = " = ".join(["x" * self.LETTERS] * (hops if whole else 1))
        return asked * len(f"{'x' * self.LETTERS} = '{answer}'\n")

    def draw(self, rng: np.random.Generator, length: int) -> Asked:
        """See `TextTask`."""
        kinds = [kind for kind, needed in self._needed.items() if needed <= length]
        hops, whole, asked = kind = kinds[rng.integers(len(kinds))]
        room = length - 1 - self._turns(*kind)
        made, ids = self._fitting.draw(rng, self._maker(hops, whole), room, asked, hops, whole)
        spans: list[Span] = []
        for number, chain in enumerate(rng.permutation(len(made.chains))[:asked].tolist()):
            answer = Span(made.answer(chain), learned=True, answer=number == 0)
            spans += [Span(made.question(chain)), Span(" '", learned=True), answer, Span("'\n", learned=True)]
        return Asked(ids, spans)


class VariableTrackingTask:
    """RULER's variable tracking: five variables that have one value."""

    ANSWER = len(" ".join(["x" * LETTERS] * (HOPS + 1)) + "\n")
    """The most tokens of an answer: each character is one."""

    def __init__(self, tokenizer: Tokenizer):
        self._fitting = _Fitting(tokenizer)
        with_example = functools.partial(variable_prompt, example_size=example_size(tokenizer, _measuring))
        self._makers: tuple[Callable, ...] = (chain_prompt, with_example)
        self._needed = [self._fitting.count(make, HOPS + 1) + self.ANSWER + 1 for make in self._makers]
        self.shortest = self._needed[0]

    def draw(self, rng: np.random.Generator, length: int) -> Asked:
        """See `TextTask`."""
        kind = int(self._needed[1] <= length)
        make = self._makers[kind]
        made, ids = self._fitting.draw(rng, make, length - 1 - self.ANSWER, HOPS + 1, kind)
        return Asked(ids, [Span(" ".join(made.answers), learned=True, answer=True), Span("\n", learned=True)])


TEXT_TASK_CLASSES: dict[str, Callable[[Tokenizer], TextTask]] = {
    "hashhop": HashHopTask,
    "ruler_vt": VariableTrackingTask,
}


def text_example(
    rng: np.random.Generator, task: TextTask, tokenizer: Tokenizer, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The fields of `generator.Example`: exactly `length` tokens, <eos> repeated where some are left."""
    ids, spans = task.draw(rng, length)
    pieces = encode_within(tokenizer, [span.text for span in spans])
    spare = length - len(ids) - sum(map(len, pieces)) - 1
    tokens = np.concatenate([ids, *pieces, [tokenizer.eos_id] * (1 + spare)]).astype(np.int32)
    sizes = [len(ids), *map(len, pieces), 1, spare]
    learned = np.repeat([False, *(span.learned for span in spans), True, False], sizes)
    answers = np.repeat([False, *(span.answer for span in spans), False, False], sizes)
    return tokens, learned, answers & ~tokenizer.blank[tokens]


def _measuring() -> np.random.Generator:
    """The random generator of texts that are only measured."""
    return np.random.default_rng(0)
