"""A task of an evaluation: prompts in cells, and how an answer is scored. Each task has a file that makes one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mla_jax.config import ModelConfig
from mla_jax.errors import InputError
from mla_jax.inference.score import Score

Params = dict[str, Any]
"""Parameters of a cell: `length`, in tokens of the prompt, and one more, for instance {"length": 256, "depth": 0.5};
JSON values."""


@dataclass(frozen=True)
class Prompt:
    """A prompt and its answer, drawn from `make_rng(seed, Purpose.EVALUATION, index)`, which training never uses."""

    ids: list[int]
    """Token ids, `length` of them, or the most below that which the format allows."""
    answer: str
    seed: int
    index: int
    near: tuple[str, ...] = ()
    """Answers to questions that this one is easily mistaken for."""
    question: str = ""
    """What is asked, in words, for who judges the answer without the haystack."""
    references: tuple[str, ...] = ()
    """All that a right answer names, where that may be several things; `answer` has them joined."""


@dataclass(frozen=True)
class Task:
    """The prompts of an evaluation, in cells, and the scoring of answers."""

    name: str
    """Results are written to RUN/eval/NAME.json and NAME.png."""
    title: str
    description: str
    """The question and the criterion, for reports, which print `TITLE: DESCRIPTION`."""
    config: dict[str, Any]
    """The configuration, kept beside the results."""
    cells: tuple[Params, ...]
    """Cells of one length follow each other."""
    samples: int
    """Prompts of a cell."""
    prompt: Callable[[Params, int], Prompt]
    """(cell, sample) -> its prompt, whatever other cells and samples there are."""
    score: Callable[[Prompt, str], dict[str, float]] | None
    """(a prompt, the generated text) -> scores between 0 and 1 by name, `correct` among them; all prompts of a cell
    have the same names. None where nothing is generated."""
    max_new_tokens: Callable[[Params], int]
    """(cell) -> the most tokens of an answer."""
    batch_size: int
    """The most prompts in a batch."""
    cache_dtype: str | None
    """Type of the KV cache; None for the model's."""
    haystack: Callable[[Params, int], int] | None = None
    """(cell, sample) -> number of its haystack, which prompts of the same length share: they begin alike, up to the
    question, and are read once. None if each prompt has its own."""
    likelihood: Callable[[Params, Score], tuple[dict[str, float], dict[str, float]]] | None = None
    """(cell, the likelihood of a prompt's tokens from the second on) -> scores as of `score`, and measures that may
    have any value. Where it is set nothing is generated: prompts are texts, the same for all cells of a length."""


def require_room(model: ModelConfig, lengths: Sequence[int], max_new_tokens: int) -> None:
    """Raises InputError unless prompts of these lengths and the new tokens fit the model."""
    longest = model.max_position_embeddings - max_new_tokens
    for length in lengths:
        if length > longest:
            raise InputError(
                f"eval.lengths has {length}, but with max_position_embeddings {model.max_position_embeddings} and "
                f"{max_new_tokens} new tokens the longest prompt is {longest} tokens"
            )


def grid_index(length: int, depth: float, sample: int) -> int:
    """Index of a prompt's random generator, whatever else is in the grid: cells are independent and repeatable."""
    return ((length * 1001 + round(depth * 1000)) << 20) + sample
