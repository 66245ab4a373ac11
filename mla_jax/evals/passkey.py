"""Passkey retrieval: a number hidden at a known depth of a prompt of a known length, read back by generation.

The format is that of landmark attention (arXiv 2305.16300), which LongLoRA and YaRN report too; an answer is correct
when the first integer in the new tokens is the pass key. Nothing is teacher-forced: the prompt goes through the latent
cache and the model writes on greedily.
"""

import dataclasses
import re

from mla_jax.config import ModelConfig, PasskeyConfig
from mla_jax.data.needle.generator import passkey_prompt
from mla_jax.data.needle.vocabulary import PASSKEY_QUESTION
from mla_jax.data.tokenizer import Tokenizer
from mla_jax.evals.task import Params, Prompt, Task, grid_index, require_room
from mla_jax.evals.text_prompts import require_needles_writable

NAME = "passkey"
TITLE = "Passkey retrieval"
DESCRIPTION = "the key hidden at several depths of a haystack, found by greedy generation; exact match"


def passkey_task(model: ModelConfig, tokenizer: Tokenizer, grid: PasskeyConfig) -> Task:
    """Passkey retrieval in every cell of a length x depth grid.

    `passkey_prompt(tokenizer, length, depth, seed, index)` makes the prompt of a failure again.

    Args:
        model: the model to evaluate.
        tokenizer: the model's.
        grid: lengths, depths, prompts a cell and their seed.

    Raises:
        InputError: a length that does not fit the model or holds no passkey prompt.
    """

    def prompt(cell: Params, sample: int) -> Prompt:
        index = grid_index(cell["length"], cell["depth"], sample)
        ids, answer = passkey_prompt(tokenizer, cell["length"], cell["depth"], grid.seed, index)
        return Prompt(ids, answer, grid.seed, index, question=PASSKEY_QUESTION)

    require_room(model, grid.lengths, grid.max_new_tokens)
    require_needles_writable(tokenizer, NAME)
    shortest = min(grid.lengths)  # if all prompts of this length can be made, longer ones can be too
    for depth in grid.depths:
        for sample in range(grid.samples):
            prompt({"length": shortest, "depth": depth}, sample)
    return Task(
        name=NAME,
        title=TITLE,
        description=DESCRIPTION,
        config=dataclasses.asdict(grid),
        cells=tuple({"length": length, "depth": depth} for length in grid.lengths for depth in grid.depths),
        samples=grid.samples,
        prompt=prompt,
        score=lambda prompt, text: {"correct": first_integer(text) == int(prompt.answer)},
        max_new_tokens=lambda _: grid.max_new_tokens,
        batch_size=grid.batch_size,
        cache_dtype=grid.cache_dtype,
    )


def first_integer(text: str) -> int | None:
    """The first run of digits as a number, None without any."""
    found = re.search(r"[0-9]+", text)
    return None if found is None else int(found.group())
