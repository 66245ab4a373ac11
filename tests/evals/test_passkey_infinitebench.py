"""InfiniteBench's passkey: its prompts as its scripts put them together, and its score."""

import dataclasses
import re

import pytest

from mla_jax.config import PasskeyConfig
from mla_jax.data.tokenizer import load_tokenizer
from mla_jax.errors import InputError, UsageError
from mla_jax.evals.passkey import passkey_task
from mla_jax.evals.task import Prompt
from tiny import MODEL

GRID = PasskeyConfig(
    format="infinitebench", lengths=[300, 490], depths=[0.0, 0.4, 1.0], samples=4, max_new_tokens=6, seed=3
)
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"


def published(noises: int, before: int, key: str) -> str:
    """What build_passkey of github.com/OpenBMB/InfiniteBench gives, in its template for YaRN-Mistral."""
    context = (
        NOISE * before + f"The pass key is {key}. Remember it. {key} is the pass key.\n" + NOISE * (noises - before)
    )
    return (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you "
        f"about the important information.\n\n{context}\n\nWhat is the pass key?\n\nThe pass key is"
    )


@pytest.mark.parametrize("name", ["needle-bpe", "bytes"])
def test_prompts_are_infinitebenchs_and_fill_the_length(name):
    tokenizer = load_tokenizer(name)
    grid = GRID if name == "needle-bpe" else dataclasses.replace(GRID, lengths=[700, 1500])
    task = passkey_task(dataclasses.replace(MODEL, max_position_embeddings=2048), tokenizer, grid)
    assert task.name == "passkey_infinitebench"
    line = len(tokenizer.encode(NOISE))
    for cell in task.cells:
        for sample in range(4):
            prompt = task.prompt(cell, sample)
            text = tokenizer.decode(prompt.ids)
            noises = text.count(NOISE)
            assert cell["length"] - line < len(prompt.ids) <= cell["length"]
            assert text == published(noises, round(cell["depth"] * noises), prompt.answer)
            assert tokenizer.encode(text) == prompt.ids[1:] and re.fullmatch(r"\d{5}", prompt.answer)


def test_a_key_may_begin_with_zero_and_zeros_count():
    task = passkey_task(MODEL, load_tokenizer("needle-bpe"), dataclasses.replace(GRID, samples=60))
    keys = {task.prompt(cell, sample).answer for cell in task.cells for sample in range(60)}
    assert any(key.startswith("0") for key in keys) and {key[0] for key in keys} == set("0123456789")
    for text, correct in ((" 00123.", True), (" 123.", False), ("x00123 5", True), ("001234", False), ("", False)):
        assert task.score(Prompt([], "00123", 0, 0), text) == {"correct": correct}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"lengths": [80]},
            UsageError,
            r"eval.lengths is too short: \d+ tokens are needed .* 80 are left",
        ),
        ({"lengths": [300, 507]}, InputError, r"eval.lengths has 507, .* 6 new tokens the longest prompt is 506"),
        ({"format": "llama"}, UsageError, r"eval.format must be one of landmark, infinitebench; got 'llama'"),
    ],
)
def test_what_cannot_be_asked(changes, error, message):
    with pytest.raises(error, match=message):
        passkey_task(MODEL, load_tokenizer("needle-bpe"), dataclasses.replace(GRID, **changes))
