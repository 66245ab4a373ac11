"""Answers to judge as they are read, planted ones as they are made, and replies as they are understood."""

import dataclasses
import gzip
import json
import math
import re

import pytest

from mla_jax.errors import InputError
from mla_jax.evals.answers import Answer
from mla_jax.evals.cells import Cell
from mla_jax.evals.judge import verdicts as v
from mla_jax.evals.judge.items import Item, normalized, read_items
from mla_jax.evals.judge.planted import plant, plant_pairs
from mla_jax.evals.judge.text import in_words, worth
from mla_jax.evals.results import Results

LINE = {"question": "Where?", "gold": "Under the stairs.", "prediction": "under stairs"}


def read(tmp_path, *lines, name="answers.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_items(path)


def test_lines_are_read(tmp_path):
    items = read(
        tmp_path,
        LINE,
        {"question": "Who?", "answer": None, "distractors": ["Ann"], "prediction": "Not found.", "length": 128},
        {"question": "Who?", "answer": "Ann", "prediction": "", "haystack": 7, "length": 128},
        {"question": "Who?", "gold": "Bob", "prediction": "It is Bob", "haystack": 7, "length": 128},
    )
    assert [item.exact for item in items] == [True, True, False, False]
    assert [item.right for item in items] == [v.CORRECT, v.CORRECT_REFUSAL, v.CORRECT, v.CORRECT]
    assert items[1] == Item("Who?", "not found", ("Ann",), "Not found.", "line 2", True, 128)
    assert items[2].haystack == items[3].haystack == "128/7"
    path = tmp_path / "answers.jsonl.gz"
    path.write_bytes(gzip.compress((json.dumps(LINE) + "\n\n").encode()))
    assert read_items(path) == items[:1]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ([], "line 2: expected a JSON object"),
        ({**LINE, "golden": "x"}, "line 2: unknown key 'golden'; known are answer, distractors, gold"),
        ({**LINE, "answer": "x"}, "line 2: expected the right answer as either gold or answer"),
        ({"question": "Where?", "prediction": ""}, "line 2: expected the right answer"),
        ({**LINE, "gold": 5}, "line 2: gold must be text, got 5"),
        ({**LINE, "prediction": None}, "line 2: prediction must be text, got None"),
        ({"gold": "x", "prediction": "y"}, "line 2: question must be text, got None"),
        ({**LINE, "distractors": "x"}, "line 2: distractors must be a list of texts, got 'x'"),
        ({**LINE, "length": "long"}, "line 2: length must be a number of tokens, got 'long'"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, said):
    with pytest.raises(InputError, match=re.escape(said)):
        read(tmp_path, LINE, line)


def test_a_line_that_is_not_json_and_files_without_answers(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text("{\n")
    with pytest.raises(InputError, match=r"answers\.jsonl, line 1: not JSON"):
        read_items(path)
    with pytest.raises(InputError, match="has no answers to judge"):
        read(tmp_path)
    with pytest.raises(InputError, match=r"none\.jsonl cannot be read"):
        read_items(tmp_path / "none.jsonl")


def results(cell: Cell) -> Results:
    return Results("keys", "Keys", "", {"name": "m", "step": 1}, {}, 0.0, {}, (cell,), ())


def test_results_are_read(tmp_path):
    answers = (Answer("Which?", "12", ("21", "3"), " 12."), Answer("Which?", "not found", (), "5"))
    params = {"length": 64, "kind": "absent"}
    cell = Cell(params, {"correct": (1, 0.5)}, {"correct": (3, 3)}, answers)
    path = tmp_path / "keys.json"
    path.write_text(json.dumps(results(cell).to_json()))
    assert read_items(path) == [
        Item("Which?", "12", ("21", "3"), "12.", "64/3", True, 64),
        Item("Which?", "not found", (), "5", "64/3", False, 64),
    ]
    path.write_text(json.dumps(results(dataclasses.replace(cell, haystacks={})).to_json()))
    assert len({item.haystack for item in read_items(path)}) == 2, "each its own"
    path.write_text(json.dumps(results(Cell.counted(params, 4, 1)).to_json()))
    with pytest.raises(InputError, match="files of before version 3 have none"):
        read_items(path)


NUMBERS = [Item(f"Number {i}?", str(10_000 + i), (str(20_000 + i), "777"), "", str(i), False) for i in range(40)]
WORDS = [
    Item(f"Word {i}?", word, (), "", str(i), False) for i, word in enumerate("cellar attic garden kitchen".split())
]
ABSENT = [Item(f"Absent {i}?", "not found", ("888",), "", str(i), False) for i in range(10)]


def kind(item: Item) -> str:
    """The class of an answer, told from its text alone."""
    number = re.search(r"\d+|cellar|attic|garden|kitchen", item.answer)
    if number is None:
        letters = normalized(item.answer)
        if any(sorted(item.gold) == sorted(word) for word in letters.split()):
            return v.NEAR_MISS
        return v.FALSE_REFUSAL if item.has_answer else v.CORRECT_REFUSAL
    if number[0] == item.gold:
        return v.CORRECT
    if number[0] in item.distractors:
        return v.DISTRACTOR
    digits = zip(number[0], item.gold, strict=False)
    close = len(number[0]) == len(item.gold) and sum(x != y for x, y in digits) == 1
    return v.NEAR_MISS if close else v.HALLUCINATED


def test_planted_answers_are_of_their_class_and_no_exact_match():
    planted = plant([*NUMBERS, *ABSENT], 8, seed=3)
    assert [each.verdict for each in planted] == [name for name in v.VERDICTS for _ in range(8)]
    told = [kind(each.item) for each in planted]
    # An invented number may by chance differ by a digit.
    assert sum(one != each.verdict for one, each in zip(told, planted, strict=True)) <= 1
    for each in planted:
        assert normalized(each.item.answer) != normalized(each.item.gold) and not each.item.exact
    assert any(" " in each.item.answer for each in planted if each.verdict == v.NEAR_MISS)
    assert planted == plant([*NUMBERS, *ABSENT], 8, seed=3) != plant([*NUMBERS, *ABSENT], 8, seed=4)


def test_planted_words():
    planted = plant(WORDS, 10, seed=0)
    counts = {name: sum(each.verdict == name for each in planted) for name in v.VERDICTS}
    assert counts == {
        v.CORRECT: 4, v.NEAR_MISS: 4, v.DISTRACTOR: 0, v.HALLUCINATED: 4, v.FALSE_REFUSAL: 4, v.CORRECT_REFUSAL: 4,
    }  # fmt: skip
    assert all(kind(each.item) == each.verdict for each in planted)
    refused = [each.item for each in planted if each.verdict == v.CORRECT_REFUSAL]
    assert all(item.gold == "not found" for item in refused), "none was without an answer: some were made so"


def test_what_nothing_can_be_planted_for():
    assert plant([], 5, seed=0) == [] == plant_pairs([], 5, seed=0)
    assert plant(NUMBERS, 0, seed=0) == []
    only = Item("What?", "?", (), "", "0", False)
    assert {each.verdict for each in plant([only], 5, 0)} == {v.CORRECT, v.FALSE_REFUSAL, v.CORRECT_REFUSAL}
    assert plant_pairs(ABSENT, 5, seed=0) == []


def test_planted_pairs_have_a_right_and_a_wrong_answer():
    pairs = plant_pairs([*NUMBERS, *ABSENT], 30, seed=1)
    assert len(pairs) == 30 and len({pair.item.question for pair in pairs}) == 30
    for pair in pairs:
        assert pair.item.gold in pair.right and pair.item.gold not in pair.wrong
    kinds = {kind(dataclasses.replace(pair.item, answer=pair.wrong)) for pair in pairs}
    assert kinds == {v.NEAR_MISS, v.DISTRACTOR, v.HALLUCINATED, v.FALSE_REFUSAL}


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("It says so. GRADE: correct", "correct"),
        ("GRADE: correct refusal", "correct refusal"),
        ("**Grade:** Near Miss.", "Near Miss"),
        ('{\n "grade": "false refusal"\n}', "false refusal"),
        ("GRADE: correct? No.\nGRADE: distractor", "distractor"),
        ("GRADE: incorrect", None),
        ("The answer is correct.", None),
        ("downgrade: correct", None),
        ("GRADE: hallucinatedly", None),
        ("", None),
    ],
)
def test_the_last_grade_of_a_reply_counts(reply, verdict):
    found = re.search(v.pattern("grade", tuple(v.VERDICTS)), reply)
    assert (found and found.group(1)) == verdict


def test_words_for_kappa():
    """Landis and Koch's table: poor below 0, slight to 0.20, fair to 0.40, moderate to 0.60, substantial to 0.80."""
    words = [in_words(kappa) for kappa in (-0.01, 0, 0.2, 0.21, 0.41, 0.6, 0.61, 0.81, 1 + 1e-12, math.nan)]
    assert words == [
        "poor", "slight", "slight", "fair", "moderate", "moderate", "substantial", "almost perfect", "almost perfect",
        "undefined",
    ]  # fmt: skip


def share(rate: float, half: float, n: int = 20) -> dict:
    return {"n": n, "rate": rate, "interval": [rate - half, rate + half]}


@pytest.mark.parametrize(
    ("sensitivity", "specificity", "begins"),
    [
        (
            share(0.95, 0.05),
            share(0.9, 0.1),
            "This judge is right about most: of planted answers it calls 95 % of the right",
        ),
        (share(0.8, 0.1), share(0.8, 0.1), "A weak judge: "),
        (share(1.0, 0.2), share(0.2, 0.1), "This judge is not shown to be better than guessing: "),
        (share(math.nan, 0, n=0), share(0.2, 0.1), "Nothing was planted"),
    ],
)
def test_what_a_judge_is_worth(sensitivity, specificity, begins):
    planted = {"sensitivity": sensitivity, "specificity": specificity}
    said = worth({"planted": planted, "agreement": {"kappa": {"value": 0.5, "interval": [0.1, 0.9]}}})
    assert said.startswith(begins)
    assert begins.startswith("Nothing") or "its kappa with exact match is 0.50 (moderate)" in said
