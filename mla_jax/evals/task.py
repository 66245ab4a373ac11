"""A task of an evaluation: prompts in cells, and how an answer is scored. Each task has a file that makes one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Params = dict[str, Any]
"""The values that a cell stands for: the prompts' `length` in tokens and one more, {"length": 256, "depth": 0.5} for
instance; as JSON has them."""


@dataclass(frozen=True)
class Prompt:
    """A question to the model."""

    ids: list[int]
    """Token ids; as many as the `length` of the cell."""
    answer: str
    seed: int
    index: int
    """`make_rng(seed, Purpose.EVALUATION, index)` makes it, which training never uses."""


@dataclass(frozen=True)
class Task:
    """What is asked in an evaluation, and how answers are scored."""

    name: str
    """Results are written to RUN/eval/NAME.json and NAME.png."""
    title: str
    description: str
    """What is asked, and what counts as correct: half a sentence, which follows `title` and a colon."""
    config: dict[str, Any]
    """What the task was made with; kept beside the results."""
    cells: tuple[Params, ...]
    """Cells of one length follow each other."""
    samples: int
    """Prompts of a cell."""
    prompt: Callable[[Params, int], Prompt]
    """Makes the prompt of a cell and sample; independent of the other cells and samples."""
    is_correct: Callable[[str, str], bool]
    """Scores (the prompt's answer, the text that the model wrote)."""
    max_new_tokens: int
    batch_size: int
    """The most prompts that are answered together."""
    cache_dtype: str | None
    """Type of the cache during generation; None is the model's."""
