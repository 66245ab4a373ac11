"""Needles in the user's texts: where they stand, what a model that reads them scores, and what cannot be asked."""

import re

import numpy as np
import pytest
import tokenizers
from tokenizers import models

from mla_jax.config import NiahConfig
from mla_jax.data.needle.ring import Filler
from mla_jax.data.tokenizer import Tokenizer, load_tokenizer
from mla_jax.errors import InputError, UsageError
from mla_jax.evals.niah import names, niah_task, walked_back
from needle_tokenizers import TOKENIZERS
from tiny import MODEL

TOKENIZER = load_tokenizer("needle-bpe")
NEEDLE = r"One of the special magic numbers for (\w+ \w+) is: (\d{5})\."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    texts = [" ".join(f"This is sentence {i} of text {n}, which ends here." for i in range(30)) for n in range(4)]
    for n, text in enumerate(texts):
        (folder / f"{n}.txt").write_text(f"Title {n}\n\n{text}\n", encoding="utf-8")
    return str(folder)


def make(folder: str, **changes) -> NiahConfig:
    return NiahConfig(text_folder=folder, **{"lengths": [200, 500], "depths": [0.0, 0.3, 1.0], "samples": 4} | changes)


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_the_needle_stands_behind_the_sentence_before_its_depth(folder, tokenizer):
    task = niah_task(MODEL, tokenizer, make(folder, lengths=[300, 500]))
    for cell in task.cells:
        for sample in range(4):
            prompt = task.prompt(cell, sample)
            assert len(prompt.ids) == cell["length"]
            text = tokenizer.decode(prompt.ids)
            (match,) = re.finditer(rf" ?{NEEDLE}", text)  # the first space may go when tokens are decoded
            key, number = match.groups()
            assert prompt.answer == number and prompt.question == f"The special magic number for {key} is:"
            assert text.endswith(f"\n{prompt.question}")
            before, behind = text[: match.start()], text[match.end() : text.rindex("\n")]
            if cell["depth"] == 0:
                assert before == ""
            elif cell["depth"] == 1:
                assert behind == ""
            else:
                whole = len(before) + len(behind)
                assert before[-1] in ".?" and 0.3 * whole - 75 < len(before) <= 0.31 * whole + 8
                assert re.match(r"\s", behind)


@pytest.mark.parametrize(("depth", "place"), [(0, 0), (0.29, 0), (0.3, 3), (0.59, 3), (0.65, 6), (0.99, 6), (1, 10)])
def test_needles_are_walked_back_to_the_end_of_a_sentence(depth, place):
    assert walked_back(Filler(np.arange(10), np.array([0, 3, 6])), depth) == place


def test_prompts_have_other_parts_of_the_texts_and_do_not_depend_on_the_rest(folder):
    task = niah_task(MODEL, TOKENIZER, make(folder))
    ids = [task.prompt(cell, sample).ids for cell in task.cells for sample in range(4)]
    texts = {re.sub(NEEDLE, "", TOKENIZER.decode(each).rpartition("\n")[0]) for each in ids}
    assert len(texts) > 20
    alone = niah_task(MODEL, TOKENIZER, make(folder, lengths=[500], depths=[0.3], samples=1))
    assert alone.prompt({"length": 500, "depth": 0.3}, 3).ids == ids[19]


@pytest.mark.parametrize(
    ("text", "answer", "found"),
    [
        (" 12345. 6", "12345", True),
        ("it is 12345", "12345", True),
        ("123456", "12345", False),
        ("912345", "12345", False),
        (" Eat a SANDWICH in the park.", "eat a sandwich", True),
        (" eat a sandwiches", "eat a sandwich", False),
        ("(42)", "(42)", True),
        ("", "12345", False),
    ],
)
def test_answers_that_name_what_the_needle_says(text, answer, found):
    assert names(text, answer) == found


def test_a_needle_of_ones_own(folder):
    park = {
        "needle": "The best thing to do in San Francisco is to sit in Dolores Park.",
        "question": "The best thing to do in San Francisco is",
        "answer": "to sit in Dolores Park",
    }
    task = niah_task(MODEL, TOKENIZER, make(folder, lengths=[500], **park))
    prompt = task.prompt(task.cells[1], 0)
    text = TOKENIZER.decode(prompt.ids)
    assert f" {park['needle']} " in text and text.endswith(f"\n{park['question']}") and prompt.answer == park["answer"]
    assert task.score(prompt, " To sit in Dolores Park.") == {"correct": True}


def test_other_texts_in_the_folder_are_another_evaluation(tmp_path):
    (tmp_path / "a.txt").write_text("A sentence is here. " * 100)
    first, same = (niah_task(MODEL, TOKENIZER, make(str(tmp_path))).config for _ in range(2))
    (tmp_path / "a.txt").write_text("A sentence is there. " * 100)
    assert first == same != niah_task(MODEL, TOKENIZER, make(str(tmp_path))).config


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"lengths": [20]},
            UsageError,
            r"eval.lengths has 20, which does not hold needle and question: these take",
        ),
        ({"lengths": [200, 503]}, InputError, r"eval.lengths has 503, .* longest prompt is 502"),
        ({"folder": "nowhere"}, InputError, "nowhere is not a folder"),
        ({"depths": [1.5]}, UsageError, r"eval.depths must be in \[0, 1\]"),
        ({"needle": "{keys}"}, UsageError, r"eval.needle='{keys}' may have {key} and {number} in braces"),
        ({"question": "{"}, UsageError, r"eval.question='{' may have"),
        ({"answer": ""}, UsageError, r"eval.answer must not be empty"),
    ],
)
def test_what_cannot_be_asked(folder, changes, error, message):
    with pytest.raises(error, match=message):
        niah_task(MODEL, TOKENIZER, make(**{"folder": folder} | changes))


def test_texts_that_are_too_short_and_tokenizers_that_lack_letters(tmp_path):
    (tmp_path / "a.txt").write_text("Short. But it is a text.")
    with pytest.raises(UsageError, match=r"eval.text_folder=\S+ has \d\d tokens .* too few for the 500 in"):
        niah_task(MODEL, TOKENIZER, make(str(tmp_path)))
    backend = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "Short": 2}, "<unk>"))
    lacking = Tokenizer(backend, {"eos_token": "</s>", "unk_token": "<unk>"}, "words")
    with pytest.raises(UsageError, match="eval.needle: tokenizer words cannot write its prompts"):
        niah_task(MODEL, lacking, make(str(tmp_path)))
