"""Files of results: written and read again, those of before there were versions, and those that are damaged."""

import copy
import dataclasses
import json

import jsonschema
import pytest

from mla_jax.errors import InputError
from mla_jax.evals.answers import Answer, Failure
from mla_jax.evals.cells import Cell
from mla_jax.evals.results import VERSION, Results, read_results, results_of_run
from results_schema import SCHEMA

RESULTS = Results(
    task="hops",
    title="Hops",
    description="one thing after another",
    model={"name": "tiny", "step": 7, "parameters": 5, "cache_bytes_per_token": 4, "trained_lengths": [64]},
    provenance={"date": "2026-01-02T03:04:05+00:00", "hardware": "2 CPU cores (x86_64)"},
    seconds=1.5,
    config={"lengths": [64, 128], "samples": 4},
    cells=tuple(Cell.counted({"length": length, "hops": hops}, 4, hops) for length in (64, 128) for hops in (1, 2)),
    failures=(Failure({"length": 64, "hops": 1}, 3, 1 << 40, "12", " 21"),),
)

# Of `python -m experiments.evaluate` at commit b748e46, with fewer cells and failures.
WITHOUT_VERSION = """\
{
  "task": "passkey",
  "model": {
    "name": "run",
    "step": 2,
    "parameters": 28352,
    "cache_bytes_per_token": 96,
    "trained_lengths": [
      128
    ]
  },
  "provenance": {
    "date": "2026-11-29T10:33:43+00:00",
    "command": "python -m experiments.evaluate run=run eval.lengths=[128,192] eval.depths=[0.5] eval.samples=2",
    "git_revision": "b748e460aeb2286fb208ffadceb5c0dc7e32f4ef",
    "hardware": "2 CPU cores (x86_64)",
    "python": "3.11.7",
    "jax": "0.10.2"
  },
  "seconds": 23.5,
  "config": {
    "lengths": [
      128,
      192
    ],
    "depths": [
      0.5
    ],
    "samples": 2,
    "batch_size": 8,
    "max_new_tokens": 10,
    "cache_dtype": null,
    "seed": 1000003
  },
  "by_length": [
    {
      "length": 128,
      "depth": null,
      "n": 2,
      "correct": 1,
      "accuracy": 0.5,
      "interval": [
        0.094531,
        0.905469
      ]
    },
    {
      "length": 192,
      "depth": null,
      "n": 2,
      "correct": 2,
      "accuracy": 1.0,
      "interval": [
        0.34238,
        1.0
      ]
    }
  ],
  "cells": [
    {
      "length": 128,
      "depth": 0.5,
      "n": 2,
      "correct": 1,
      "accuracy": 0.5,
      "interval": [
        0.094531,
        0.905469
      ]
    },
    {
      "length": 192,
      "depth": 0.5,
      "n": 2,
      "correct": 2,
      "accuracy": 1.0,
      "interval": [
        0.34238,
        1.0
      ]
    }
  ],
  "failures": [
    {
      "length": 128,
      "depth": 0.5,
      "seed": 1000003,
      "index": 134873088000,
      "expected": "14427",
      "generated": "7"
    }
  ]
}
"""


def test_results_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "hops.json"
    path.write_text(json.dumps(RESULTS.to_json()))
    assert read_results(path) == RESULTS
    assert RESULTS.counts == (6, 16)


def test_a_file_without_a_version_is_read_and_its_numbers_written_again(tmp_path):
    path = tmp_path / "passkey.json"
    path.write_text(WITHOUT_VERSION)
    results = read_results(path)
    assert results.counts == (3, 4)
    text = "the key hidden at several depths of a haystack, found by greedy generation; exact match"
    assert (results.task, results.title, results.description) == ("passkey", "Passkey retrieval", text)
    assert results.cells[0] == Cell.counted({"length": 128, "depth": 0.5}, 2, 1)
    assert results.failures == (
        Failure({"length": 128, "depth": 0.5}, seed=1000003, index=134873088000, expected="14427", generated="7"),
    )
    new = {"version", "title", "description"}
    written = {key: value for key, value in results.to_json().items() if key not in new}
    for cell in written["cells"]:
        del cell["scores"]
    assert written == json.loads(WITHOUT_VERSION)


SHARED = Cell(
    {"length": 64, "question": "absent"},
    {"correct": (1.0, 0.0, 0.5), "made_up": (0.0, 1.0, 0.0)},
    dict.fromkeys(("correct", "made_up"), (7, 7, 9)),
    (Answer("Where?", "12", ("21",), " 12."), Answer("Who?", "not found", (), ""), Answer("", "5", ("6", "7"), "5 6")),
)


def test_scores_haystacks_and_answers_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "hops.json"
    results = dataclasses.replace(RESULTS, cells=(SHARED,))
    path.write_text(json.dumps(results.to_json()))
    assert read_results(path) == results
    cell = json.loads(path.read_text())["cells"][0]
    assert (cell["n"], cell["correct"], cell["accuracy"], cell["haystacks"]) == (3, 1.5, 0.5, [7, 7, 9])
    assert cell["answers"][0] == {"question": "Where?", "expected": "12", "near": ["21"], "generated": " 12."}
    assert cell["rates"]["made_up"]["n"] == 3 and cell["rates"]["made_up"]["rate"] == pytest.approx(1 / 3, abs=1e-6)


def test_what_is_written_fits_the_schema():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["properties"]["version"]["const"] == VERSION
    of_one_cell = dataclasses.replace(RESULTS, cells=(SHARED,), failures=(), provenance={"git_revision": None})
    for results in (RESULTS, of_one_cell):
        jsonschema.validate(results.to_json(), SCHEMA)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["other"], 1),
        (["version"], 2),
        (["model", "step"], "7"),
        (["cells"], []),
        (["cells", 0, "accuracy"], 1.5),
        (["cells", 0, "interval"], [0.5]),
        (["cells", 0, "scores"], {"made_up": [1]}),
        (["cells", 0, "answers"], [{"question": "Where?"}]),
        (["by_length", 0, "rates"], {"made_up": 0.5}),
        (["failures", 0], {"length": 64}),
    ],
)
def test_the_schema_refuses_what_is_no_results_file(path, value):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(json.loads(changed(path, value)), SCHEMA)


def test_totals_keep_haystacks_apart_and_count_a_score_where_there_is_one():
    present = Cell({"length": 64, "question": "present"}, {"correct": (1, 1)}, {"correct": (7, 9)})
    longer = Cell(
        {"length": 128, "question": "absent"}, {"correct": (0,), "made_up": (1,)}, {"correct": (7,), "made_up": (7,)}
    )
    results = dataclasses.replace(RESULTS, cells=(SHARED, present, longer))
    total = results.total
    assert (total.n, total.correct, total.rate("made_up").n) == (6, 3.5, 4)
    assert total.answers == () and len(set(total.haystacks["correct"])) == 3, "7 and 9 of 64 tokens, 7 of 128"
    assert total.haystacks["correct"][:3] == (total.haystacks["correct"][3],) * 2 + (total.haystacks["correct"][4],)


def test_a_run_has_the_results_of_all_its_tasks(tmp_path):
    assert results_of_run(tmp_path) == []
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "passkey.json").write_text(WITHOUT_VERSION)
    (tmp_path / "eval" / "hops.json").write_text(json.dumps(RESULTS.to_json()))
    (tmp_path / "eval" / "other.json.unfinished").write_text("{")
    assert [results.task for results in results_of_run(tmp_path)] == ["hops", "passkey"]


ANSWER = SHARED.answers[0].to_json()


def test_version_2_had_no_answers(tmp_path):
    path = tmp_path / "hops.json"
    results = dataclasses.replace(RESULTS, cells=(dataclasses.replace(SHARED, answers=()),))
    path.write_text(json.dumps(results.to_json() | {"version": 2}))
    assert read_results(path) == results


def changed(path: list, value) -> str:
    content = copy.deepcopy(RESULTS.to_json())
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(content)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        WITHOUT_VERSION[:500],
        changed(["version"], 4),
        changed(["model"], {}),
        changed(["model", "step"], "7"),
        changed(["model", "trained_lengths"], ["64"]),
        changed(["task"], None),
        changed(["cells"], []),
        changed(["cells", 0], {"length": 64, "n": 4, "correct": 1}),
        changed(["cells", 0], {"length": 64, "depth": 1.0, "n": 4, "correct": 1}),
        changed(["cells", 0, "n"], 0),
        changed(["cells", 0, "correct"], 5),
        changed(["cells", 0, "length"], "64"),
        changed(["cells", 0, "hops"], None),
        changed(["cells", 0, "hops"], "one"),
        changed(["cells", 0, "hops"], 2),
        changed(["cells", 0, "length"], 65),
        changed(["cells", 0, "scores", "correct"], [1, 0, 0]),
        changed(["cells", 0, "scores", "correct"], [1, 1, 0, 0]),
        changed(["cells", 0, "scores", "correct"], [2, -1, 0, 0]),
        changed(["cells", 0, "haystacks"], [1]),
        changed(["cells", 0, "answers"], [ANSWER]),
        changed(["cells", 0, "answers"], [ANSWER, ANSWER, ANSWER, ANSWER | {"near": 5}]),
        changed(["cells", 0, "answers"], [ANSWER, ANSWER, ANSWER, ANSWER | {"expected": 5}]),
        changed(["cells", 0, "answers"], [ANSWER, ANSWER, ANSWER, ANSWER | {"other": ""}]),
        changed(["cells", 0, "answers"], [ANSWER, ANSWER, ANSWER, []]),
        changed(["failures", 0], {}),
        changed(["provenance"], None),
    ],
)
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "hops.json").write_text(text)
    with pytest.raises(
        InputError, match=r"hops\.json cannot be read \(.*evaluate the run again or remove the file"
    ) as e:
        results_of_run(tmp_path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("text", ["[]", "{}", "null", '{"verdicts": [], "model": {"step": 7}}', '["task", "cells"]'])
def test_json_that_is_no_results_is_left_out_of_a_run_but_not_read_by_name(tmp_path, text):
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "hops.json").write_text(json.dumps(RESULTS.to_json()))
    (tmp_path / "eval" / "judge.json").write_text(text)
    assert results_of_run(tmp_path) == [RESULTS]
    with pytest.raises(InputError, match=r"judge\.json cannot be read \(.*evaluate the run again or remove the file"):
        read_results(tmp_path / "eval" / "judge.json")


def test_a_file_of_some_cells_is_read_where_it_may_be_unfinished(tmp_path):
    path = tmp_path / "hops.json.unfinished"
    some = dataclasses.replace(RESULTS, cells=RESULTS.cells[:3])
    path.write_text(json.dumps(some.to_json()))
    assert read_results(path, finished=False) == some
    with pytest.raises(InputError, match="not a whole grid"):
        read_results(path)
