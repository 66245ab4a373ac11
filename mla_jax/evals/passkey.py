"""Passkey retrieval: a number hidden at a known depth of a prompt of a known length, read back by generation.

Two formats: that of landmark attention (arXiv 2305.16300), which LongLoRA and YaRN report too, where an answer is
correct if the first integer in the new tokens is the pass key; and InfiniteBench's, where it has the key's digits.
Nothing is teacher-forced: the prompt goes through the latent cache and the model writes on greedily.
"""

import dataclasses
import functools
import re
from collections.abc import Callable

import numpy as np

from mla_jax.config import ModelConfig, PasskeyConfig
from mla_jax.data.needle.generator import Purpose, make_rng, passkey_prompt
from mla_jax.data.needle.infinitebench import infinitebench_passkey
from mla_jax.data.needle.text_prompt import fitting_prompt, largest_haystack
from mla_jax.data.needle.vocabulary import PASSKEY_QUESTION
from mla_jax.data.tokenizer import Tokenizer
from mla_jax.evals.task import Params, Prompt, Task, grid_index, require_room
from mla_jax.evals.text_prompts import require_needles_writable

NAME = "passkey"
TITLE = "Passkey retrieval"
DESCRIPTION = "the key hidden at several depths of a haystack, found by greedy generation; exact match"


def passkey_task(model: ModelConfig, tokenizer: Tokenizer, grid: PasskeyConfig) -> Task:
    """Passkey retrieval in every cell of a length x depth grid.

    In landmark attention's format `passkey_prompt(tokenizer, length, depth, seed, index)` makes the prompt of a failure
    again.

    Args:
        model: the model to evaluate.
        tokenizer: the model's.
        grid: format, lengths, depths, prompts a cell and their seed.

    Raises:
        InputError: a length that does not fit the model or holds no passkey prompt.
        UsageError: a tokenizer that cannot write the prompts.
    """
    require_room(model, grid.lengths, grid.max_new_tokens)
    require_needles_writable(tokenizer, NAME)
    landmark = grid.format == "landmark"
    write = _landmark(tokenizer, grid) if landmark else _infinitebench(tokenizer, grid)

    def prompt(cell: Params, sample: int) -> Prompt:
        index = grid_index(cell["length"], cell["depth"], sample)
        ids, answer = write(cell["length"], cell["depth"], index)
        return Prompt(ids, answer, grid.seed, index, question=PASSKEY_QUESTION)

    shortest = min(grid.lengths)  # if all prompts of this length can be made, longer ones can be too
    for depth in grid.depths:
        for sample in range(grid.samples):
            prompt({"length": shortest, "depth": depth}, sample)
    return Task(
        name=NAME if landmark else f"{NAME}_{grid.format}",
        title=TITLE if landmark else f"{TITLE} (InfiniteBench)",
        description=DESCRIPTION,
        config=dataclasses.asdict(grid),
        cells=tuple({"length": length, "depth": depth} for length in grid.lengths for depth in grid.depths),
        samples=grid.samples,
        prompt=prompt,
        score=score_integer if landmark else score_digits,
        max_new_tokens=lambda _: grid.max_new_tokens,
        batch_size=grid.batch_size,
        cache_dtype=grid.cache_dtype,
    )


Write = Callable[[int, float, int], tuple[list[int], str]]
"""(length, depth, index of the random generator) -> ids of a prompt, and the key."""


def _landmark(tokenizer: Tokenizer, grid: PasskeyConfig) -> Write:
    return lambda length, depth, index: passkey_prompt(tokenizer, length, depth, grid.seed, index)


def _infinitebench(tokenizer: Tokenizer, grid: PasskeyConfig) -> Write:
    def rng(*index: int) -> np.random.Generator:
        return make_rng(grid.seed, Purpose.EVALUATION, *index)

    @functools.cache
    def lines(length: int, depth: float) -> int:
        make = functools.partial(infinitebench_passkey, depth=depth)
        return largest_haystack(tokenizer, make, lambda: rng(0, 1), length, 1)

    def write(length: int, depth: float, index: int) -> tuple[list[int], str]:
        make = functools.partial(infinitebench_passkey, depth=depth)
        made, ids = fitting_prompt(tokenizer, make, rng(index), length, lines(length, depth), 1)
        return ids, made.answers[0]

    return write


def score_integer(prompt: Prompt, text: str) -> dict[str, float]:
    """Whether the first integer of a text is the key."""
    return {"correct": first_integer(text) == int(prompt.answer)}


def score_digits(prompt: Prompt, text: str) -> dict[str, float]:
    """Whether the first digits of a text are those of the key, zeros included."""
    return {"correct": first_digits(text) == prompt.answer}


def first_digits(text: str) -> str | None:
    """The first run of digits, None without any."""
    found = re.search(r"[0-9]+", text)
    return None if found is None else found.group()


def first_integer(text: str) -> int | None:
    """The first run of digits as a number, None without any."""
    digits = first_digits(text)
    return None if digits is None else int(digits)
