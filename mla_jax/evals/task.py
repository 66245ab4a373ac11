"""A task of an evaluation: prompts in cells, and how an answer is scored. Each task has a file that makes one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Params = dict[str, Any]
"""Parameters of a cell: `length`, in tokens of the prompt, and one more, for instance {"length": 256, "depth": 0.5};
JSON values."""


@dataclass(frozen=True)
class Prompt:
    """A prompt and its answer, drawn from `make_rng(seed, Purpose.EVALUATION, index)`, which training never uses."""

    ids: list[int]
    """Token ids, `length` of them."""
    answer: str
    seed: int
    index: int


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
    is_correct: Callable[[str, str], bool]
    """(the prompt's answer, the generated text) -> whether it is correct."""
    max_new_tokens: int
    batch_size: int
    """The most prompts in a batch."""
    cache_dtype: str | None
    """Type of the KV cache; None for the model's."""
