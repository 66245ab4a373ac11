r"""Pairs about needles: several questions about one haystack, each with its answer and a wrong one.

    <bos>filler with needles between its sentences | \n question answer.<eos> | \n question wrong answer.<eos> | ...

The prompt region is full to the last token. A pair is a pure function of config, tokenizer and random generator; the
generators are used for nothing else, evaluation in particular.
"""

import contextlib
import itertools
from collections.abc import Callable

import numpy as np

from mla_jax.config import NeedlePairsConfig
from mla_jax.data.needle import tasks
from mla_jax.data.needle import vocabulary as v
from mla_jax.data.needle.generator import NeedleGenerator, bury, draw, head
from mla_jax.data.needle.lexicon import VALUES, make_lexicon
from mla_jax.data.preference.layout import Pair, Prompt, prompt_tokens
from mla_jax.data.preference.questions import AGAIN, SUITABLE, Question, ask_again, make_question
from mla_jax.data.tokenizer import Tokenizer
from mla_jax.errors import UsageError

_ALONE = ("passkey", "single")
"""Tasks with one needle in a haystack, so one question."""

Choices = dict[str, dict[str, float]]
"""The tasks, by their weights, that a kind of rejected answer is drawn for."""


class NeedlePairs:
    """Makes rows of the kinds, tasks and haystacks that a config mixes.

    A kind is drawn first, then a task that suits it. A kind that no task of the mixture suits, or that might not fit,
    is not drawn, and the others share what would be its own in proportion to their weights.
    """

    def __init__(self, config: NeedlePairsConfig, tokenizer: Tokenizer, seq_len: int):
        """Encodes the vocabulary and the text folder.

        Raises:
            InputError: the text folder holds no text.
            UsageError: rows of `seq_len` are too short for any pair.
        """
        self._config, self._tokenizer = config, tokenizer
        self._lexicon = make_lexicon(tokenizer)
        self._generator = NeedleGenerator(config, tokenizer)
        self.prompt_tokens = prompt_tokens(seq_len, config.branch_tokens)
        self._heads = {task: head(tokenizer, task) for task in tasks.SIZES}
        self._first = self._that_fit(lambda task: True)
        self._more = self._that_fit(lambda task: task not in _ALONE)
        self._again = {kind: weights for kind, weights in self._more.items() if kind in AGAIN}

    def _that_fit(self, allowed: Callable[[str], bool]) -> Choices:
        weights = {task: weight for task, weight in self._config.tasks.items() if weight > 0}
        wanted = [(kind, task) for kind in self._config.rejected for task in SUITABLE[kind] if task in weights]
        wanted = [pair for pair in wanted if self._config.rejected[pair[0]] > 0]
        needs = {pair: self._needs(*pair) for pair in wanted if _fewest_needles(*pair) <= self._config.max_needles}
        if not needs:
            kinds, names = ", ".join(self._config.rejected), ", ".join(weights)
            few = f" with data.max_needles={self._config.max_needles}" if wanted else ""
            raise UsageError(f"none of data.rejected ({kinds}) suits a question of data.tasks ({names}){few}")
        for i, key, room in (
            (0, "train.stages.seq_len - data.branch_tokens", self.prompt_tokens),
            (1, "data.branch_tokens", self._config.branch_tokens),
        ):
            if room < (shortest := min(need[i] for need in needs.values())):
                raise UsageError(
                    f"{key} is {room}, too short for pairs of data.tasks {', '.join(weights)}: the shortest possible "
                    f"with tokenizer {self._tokenizer.source} is {shortest}"
                )
        choices: Choices = {}
        for (kind, task), (prompt, branches) in needs.items():
            if prompt <= self.prompt_tokens and branches <= self._config.branch_tokens and allowed(task):
                choices.setdefault(kind, {})[task] = weights[task]
        return choices

    def _needs(self, kind: str, task: str) -> tuple[int, int]:
        """Tokens of prompt and of branches that hold the smallest pair, whatever its names are."""
        count, names = self._lexicon.count, tasks.LongestNames(self._lexicon)
        unit = tasks.make_unit(task, tasks.SIZES[task][0], names, self._lexicon)
        needles = sum(map(count, unit.needles)) * (2 if kind == "near_key" else 1)
        wrong = {"false_refusal": self._lexicon[v.NOT_FOUND], "absent_key": names.value()}
        rejected = tasks.list_answer(self._lexicon, [wrong[kind]]) if kind in wrong else unit.answer
        branches = 2 * count(unit.question) + count(unit.answer) + count(rejected)
        return len(self._heads[task]) + needles, branches

    def questions(self, rng: np.random.Generator) -> tuple[np.ndarray, list[Question]]:
        """A prompt, int32 [prompt_tokens], and questions that go on from it: at least one, at most as wanted."""
        kind, task = self._draw_kind(rng, self._first)
        haystack, names = self._generator.draw_haystack(rng, task), tasks.RandomNames(rng, self._lexicon)
        beginning, alone = self._heads[task], task in _ALONE
        room, branch_room = self.prompt_tokens - len(beginning), self._config.branch_tokens
        questions: list[Question] = []
        most = self._config.max_needles
        while question := self._fitting_question(rng, names, kind, task, most, room, branch_room, questions):
            questions.append(question)
            most -= sum(map(len, question.needles))
            room -= question.needle_tokens(self._lexicon)
            branch_room -= self._branch_tokens(question)
            if alone or len(questions) == self._config.pairs_per_row:
                break
            kind, task = self._draw_kind(rng, self._more)
        groups = [group for question in questions for group in question.needles]
        if not alone and most > 0:  # needles that nobody asks for
            others = tasks.draw_units(
                rng, names, self._lexicon, "multi_key", room, most, self._config.near_duplicate_fraction
            )
            groups += [unit.needles for unit in others]
        filler = self.prompt_tokens - len(beginning) - sum(map(self._lexicon.count, itertools.chain(*groups)))
        body = bury(rng, haystack, task, self._lexicon, groups, filler, names.used)
        return np.concatenate([beginning, *body]).astype(np.int32), questions

    def _draw_kind(self, rng: np.random.Generator, choices: Choices) -> tuple[str, str]:
        kind = draw(rng, {kind: self._config.rejected[kind] for kind in choices})
        return kind, draw(rng, choices[kind])

    def _fitting_question(
        self, rng: np.random.Generator, names: tasks.RandomNames, kind: str, task: str, most: int, room: int,
        branch_room: int, before: list[Question],
    ) -> Question | None:  # fmt: skip
        """A question that fits, if need be of the smallest size; None if even that does not, or no names are left.

        One that would need more than `most` needles is about a key that has been asked for.
        """
        numbers = [
            piece for question in before for needle in itertools.chain(*question.needles) for piece in needle
            if piece < VALUES
        ]  # fmt: skip
        if _fewest_needles(kind, task) > most:
            return self._question_again(rng, names, branch_room, before)
        smallest, largest = tasks.SIZES[task]
        for size in dict.fromkeys([int(rng.integers(smallest, largest + 1)), smallest]):
            with contextlib.suppress(tasks.NamesUsedUp):
                question = make_question(rng, names, self._lexicon, kind, task, size, numbers)
                needles, tokens = sum(map(len, question.needles)), question.needle_tokens(self._lexicon)
                if needles <= most and tokens <= room and self._branch_tokens(question) <= branch_room:
                    return question
        return None

    def _question_again(
        self, rng: np.random.Generator, names: tasks.RandomNames, branch_room: int, before: list[Question]
    ) -> Question | None:
        """A question about a key of those before, or one near it; None if there is none or it does not fit."""
        numbers = {key: number for question in before for key, number in question.numbers.items()}
        if not numbers or not self._again:
            return None
        kind, _ = self._draw_kind(rng, self._again)
        with contextlib.suppress(tasks.NamesUsedUp):
            question = ask_again(rng, names, self._lexicon, kind, numbers)
            if self._branch_tokens(question) <= branch_room:
                return question
        return None

    def _branch_tokens(self, question: Question) -> int:
        count = self._lexicon.count
        return 2 * count(question.question) + count(question.chosen) + count(question.rejected)

    def prompt(self, rng: np.random.Generator) -> Prompt:
        """A prompt of `prompt_tokens` and its pairs."""
        ids, questions = self.questions(rng)
        parts = [part for q in questions for part in (q.question, q.chosen, q.rejected)]
        encoded = iter(self._lexicon.ids_of_each(parts))
        end = np.array([self._tokenizer.eos_id], np.int32)
        pairs = [
            Pair(question, np.concatenate([chosen, end]), np.concatenate([rejected, end]))
            for question, chosen, rejected in zip(encoded, encoded, encoded, strict=True)
        ]
        return Prompt(ids, pairs)


def _fewest_needles(kind: str, task: str) -> int:
    return 2 if kind == "near_key" else tasks.SIZES[task][0]
