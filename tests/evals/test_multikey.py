"""Multi-key retrieval: scores of generators whose answers are known, shared haystacks, and what cannot be asked."""

import dataclasses

import pytest

from key_reader import ASKED, NEEDLE, TOKENIZER, KeyReader, near_number
from mla_jax.config import MultikeyConfig
from mla_jax.errors import InputError, UsageError
from mla_jax.evals.cells import totalled
from mla_jax.evals.multikey import multikey_task, score
from mla_jax.evals.runner import measure
from mla_jax.evals.task import Prompt
from tiny import MODEL

LARGE = dataclasses.replace(MODEL, max_position_embeddings=4096)
CONFIG = MultikeyConfig(lengths=[1200, 1500], keys=[16, 64], samples=6, questions=3, seed=5)


def scores(answer) -> tuple[float, float]:
    cells = [cell for cell, _ in measure(multikey_task(LARGE, TOKENIZER, CONFIG), KeyReader(answer), TOKENIZER)]
    assert [cell.params for cell in cells] == [
        {"length": length, "keys": keys} for length in (1200, 1500) for keys in (16, 64)
    ]
    assert all(len(set(cell.haystacks["correct"])) == 2 for cell in cells)
    assert len({haystack for cell in cells for haystack in cell.haystacks["correct"]}) == 8
    total = totalled(cells)
    return total.accuracy, total.rates["near_miss"].rate


def test_models_that_read_the_whole_key_one_word_of_it_and_none():
    assert scores(lambda key, numbers: f" {numbers[key]}.") == (1, 0)
    assert scores(lambda key, numbers: f" {near_number(key, numbers)}.") == (0, 1)
    assert scores(lambda *_: " not found.") == (0, 0)


@pytest.mark.parametrize(
    ("text", "correct", "near_miss"), [(" 123. 4", 1, 0), (" 77", 0, 1), (" 1234", 0, 0), ("", 0, 0), ("None", 0, 0)]
)
def test_scores_of_answers(text, correct, near_miss):
    assert score(Prompt([], "123", 0, 0, near=("77",)), text) == {"correct": correct, "near_miss": near_miss}


@pytest.mark.parametrize("haystack", ["noise", "words"])
def test_every_key_is_one_word_apart_from_another(haystack):
    task = multikey_task(LARGE, TOKENIZER, dataclasses.replace(CONFIG, haystack=haystack))
    for cell in task.cells:
        prompts = [task.prompt(cell, sample) for sample in range(6)]
        assert max(len(prompt.ids) for prompt in prompts) == cell["length"]
        texts = [TOKENIZER.decode(prompt.ids) for prompt in prompts]
        bodies = [text.rpartition("\n")[0] for text in texts]
        assert bodies[0] == bodies[1] == bodies[2] != bodies[3] == bodies[4]
        for prompt, text in zip(prompts, texts, strict=True):
            numbers = dict(NEEDLE.findall(text))
            assert len(numbers) == cell["keys"] == len(set(numbers.values()))
            asked = ASKED.search(text).group(1)
            assert numbers[asked] == prompt.answer and near_number(asked, numbers) in prompt.near
            assert all(near_number(key, numbers) for key in numbers)
        assert len({prompt.answer for prompt in prompts[:3]}) == 3, "one haystack is asked about different keys"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"lengths": [800]},
            UsageError,
            r"eval.lengths has 800, which do not hold 64 needles .* these take \d+ tokens",
        ),
        ({"lengths": [1200, 4087]}, InputError, r"eval.lengths has 4087, .* longest prompt is 4086"),
        ({"keys": [16, 600]}, UsageError, r"600 keys that differ are more than there are words for"),
        ({"keys": [15]}, UsageError, r"eval.keys must be even and positive, got \[15\]"),
        ({"keys": [16, 16]}, UsageError, r"eval.keys must not repeat"),
        ({"keys": []}, UsageError, r"eval.keys needs at least one number"),
        ({"questions": 17}, UsageError, r"eval.questions=17 is more than eval.keys=16"),
        ({"haystack": "text"}, UsageError, r"eval.haystack must be one of noise, words"),
    ],
)
def test_what_cannot_be_asked(changes, error, message):
    with pytest.raises(error, match=message):
        multikey_task(LARGE, TOKENIZER, dataclasses.replace(CONFIG, **changes))
