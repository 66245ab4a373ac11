"""RULER (arXiv 2404.06654): retrieval, tracing and aggregation at a given length, with its prompts and its metric.

Eleven of its thirteen tasks; the other two ask about data sets. Prompts are drawn with other random generators than
RULER's, so scores compare as those of other samples of the same distribution do.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence

import numpy as np

from mla_jax.config import ModelConfig, RulerConfig
from mla_jax.config.evaluate import RULER_TASKS, RULER_WITH_TEXT
from mla_jax.data.needle.generator import Purpose, make_rng
from mla_jax.data.needle.ruler.niah import TASKS, Text, niah_prompt
from mla_jax.data.needle.ruler.variable_tracking import HOPS, example_size, variable_prompt
from mla_jax.data.needle.ruler.word_counts import (
    COMMON_WORDS,
    FREQUENT_SIZE,
    common_words_prompt,
    frequent_words_prompt,
)
from mla_jax.data.needle.ruler.words import wonderwords
from mla_jax.data.needle.text_prompt import Maker, TextPrompt, encode_prompt, fitting_prompt, largest_haystack
from mla_jax.data.text_folder import fingerprint, read_texts
from mla_jax.data.tokenizer import Tokenizer
from mla_jax.errors import UsageError
from mla_jax.evals.task import Params, Prompt, Task, require_room
from mla_jax.evals.text_prompts import require_writable

NAME = "ruler"
TITLE = "RULER"
DESCRIPTION = "share of the expected answers that the generated text names, prompt and answer within the length"
NEW_TOKENS = {"vt": 30, "cwe": 120, "fwe": 50}
"""Tokens of an answer by task; 128 of the others."""
LEAST = {"vt": HOPS + 1, "cwe": 2 * COMMON_WORDS, "fwe": FREQUENT_SIZE, **{name: 4 for name in RULER_WITH_TEXT}}
"""Items of the smallest haystack by task; 1 of the others."""
_SIZING = 1
"""Index of the random generators whose prompts are only measured."""


def ruler_task(model: ModelConfig, tokenizer: Tokenizer, config: RulerConfig) -> Task:
    """RULER's tasks at each length.

    Args:
        model: the model to evaluate.
        tokenizer: the model's.
        config: lengths, tasks, prompts a cell and their seed.

    Raises:
        InputError: a length that does not fit the model, or a text folder that cannot be read.
        UsageError: a length that a task does not fit, a text that is too short for one, or a tokenizer that cannot
            write the prompts.
    """
    source = _Source(tokenizer, config)

    def prompt(cell: Params, sample: int) -> Prompt:
        index = source.index(cell["length"], cell["task"]) + sample
        made, ids = source.prompt(cell["length"], cell["task"], index)
        question = made.text.rpartition("\n")[2].strip()
        return Prompt(ids, ", ".join(made.answers), config.seed, index, question=question, references=made.answers)

    require_room(model, config.lengths, 0)
    source.check()
    return Task(
        name=NAME,
        title=TITLE,
        description=DESCRIPTION,
        config=dataclasses.asdict(config) | source.about_text(),
        cells=tuple(
            {"length": length, "task": name}
            for length in config.lengths
            for name in sorted(config.tasks, key=RULER_TASKS.index)
        ),
        samples=config.samples,
        prompt=prompt,
        score=lambda prompt, text: {"correct": string_match_all(text, prompt.references)},
        max_new_tokens=lambda cell: new_tokens(cell["task"]),
        batch_size=config.batch_size,
        cache_dtype=config.cache_dtype,
    )


def string_match_all(text: str, references: Sequence[str]) -> float:
    """RULER's metric: the share of the references that are in a text, whatever their case."""
    text = re.sub(r"[\x00-\x1f]", "\n", text.strip()).strip().lower()
    return sum(reference.lower() in text for reference in references) / len(references)


def new_tokens(name: str) -> int:
    """The tokens that RULER lets a model write in a task."""
    return NEW_TOKENS.get(name, 128)


class _Source:
    """The prompts of all tasks; how much of a haystack fits a length is found out once."""

    def __init__(self, tokenizer: Tokenizer, config: RulerConfig):
        self._tokenizer, self._config = tokenizer, config
        folder = config.text_folder
        self._text = None if folder is None else Text(" ".join(read_texts(folder)).split())
        self._size = functools.cache(self._find_size)
        self._maker = functools.cache(self._make_maker)

    def index(self, length: int, name: str) -> int:
        """Index of the random generator of the first sample of a cell."""
        return (length * len(RULER_TASKS) + RULER_TASKS.index(name)) << 20

    def prompt(self, length: int, name: str, index: int) -> tuple[TextPrompt, list[int]]:
        """The prompt that the random generator `index` draws, as text and as ids."""
        return fitting_prompt(
            self._tokenizer, self._maker(length, name), self._rng(index),
            length - new_tokens(name), self._size(length, name), LEAST.get(name, 1),
        )  # fmt: skip

    def about_text(self) -> dict[str, str]:
        """The fingerprint of the texts, which tells others in the same folder apart; empty without texts."""
        folder = self._config.text_folder
        return {} if folder is None else {"text_fingerprint": fingerprint(folder)}

    def check(self) -> None:
        """Raises UsageError for what `ruler_task` says of lengths, text and tokenizer."""
        config = self._config
        for name in config.tasks:
            least = LEAST.get(name, 1)
            for length in config.lengths:
                text = self._maker(length, name)(self._rng(self.index(length, name), _SIZING), least).text
                require_writable(self._tokenizer, text, f"eval.tasks={name}")
                needed = len(encode_prompt(self._tokenizer, text)) + new_tokens(name)
                if needed > length:
                    raise UsageError(
                        f"eval.lengths has {length}, but the shortest prompt of {name} takes {needed} tokens with its "
                        f"answer and tokenizer {self._tokenizer.source}; take longer ones or leave it out of eval.tasks"
                    )
            if name in RULER_WITH_TEXT:
                self._check_text(name, max(config.lengths))

    def _check_text(self, name: str, length: int) -> None:
        assert self._text is not None
        words = min(len(self._text.words), 2 * length)  # more than that are never needed: few tokens hold two words
        index = self.index(length, name)
        text = self._maker(length, name)(self._rng(index, _SIZING), words).text
        taken = len(encode_prompt(self._tokenizer, text)) + new_tokens(name)
        if taken <= length:
            raise UsageError(
                f"eval.text_folder={self._config.text_folder} has {words} words: with question and answer of {name} "
                f"{taken} tokens, too few for the {length} in eval.lengths; add texts or take shorter lengths"
            )

    def _rng(self, *index: int) -> np.random.Generator:
        return make_rng(self._config.seed, Purpose.EVALUATION, *index)

    def _find_size(self, length: int, name: str) -> int:
        return largest_haystack(
            self._tokenizer, self._maker(length, name),
            functools.partial(self._rng, self.index(length, name), _SIZING),
            length - new_tokens(name), LEAST.get(name, 1),
        )  # fmt: skip

    def _make_maker(self, length: int, name: str) -> Maker[TextPrompt]:
        match name:
            case "vt":
                size = example_size(self._tokenizer, functools.partial(self._rng, 0, _SIZING))
                return functools.partial(variable_prompt, example_size=size)
            case "cwe":
                return functools.partial(common_words_prompt, length=length, words=wonderwords())
            case "fwe":
                different = max((length - new_tokens(name)) // 50, 5)
                return functools.partial(frequent_words_prompt, different=different)
        text = self._text if TASKS[name].haystack == "text" else None
        return functools.partial(niah_prompt, task=TASKS[name], words=wonderwords(), text=text)
