"""Passkey scoring against generators whose answers are known, and a whole evaluation of a random tiny model."""

import dataclasses
import json
import re

import pytest

from mla_jax.checkpoint.run_folder import Run
from mla_jax.config import PasskeyConfig
from mla_jax.data.needle.generator import passkey_prompt
from mla_jax.data.tokenizer import load_tokenizer
from mla_jax.errors import InputError
from mla_jax.evals import passkey
from mla_jax.evals.passkey import FAILURES_KEPT, evaluate_passkey, first_integer, run_passkey
from mla_jax.model.transformer import init_params
from tiny import MODEL

TOKENIZER = load_tokenizer("needle-bpe")
GRID = PasskeyConfig(lengths=[128, 192], depths=[0.0, 0.5, 1.0], samples=5, batch_size=4, seed=11)
KEY = re.compile(r"The pass key is ([0-9]+)\.")


class Generator:
    """Stands in for `generate.Generator`: reads the key in the prompt and answers what `answer(key, depth)` says."""

    def __init__(self, answer):
        self.answer = answer
        self.batches: list[list[list[int]]] = []
        self.options: list[dict] = []

    def __call__(self, config, params, cache_dtype):
        return self

    def generate(self, prompts, **options):
        self.batches.append(prompts)
        self.options.append(options)
        texts = [TOKENIZER.decode(prompt) for prompt in prompts]
        found = [KEY.search(text) for text in texts]
        answers = [
            self.answer(match.group(1), match.start() / len(text)) for match, text in zip(found, texts, strict=True)
        ]
        return [TOKENIZER.encode(answer) for answer in answers]


@pytest.fixture
def evaluate(monkeypatch):
    """Runs a grid with a Generator; returns both report and generator."""

    def run(answer, grid=GRID, config=MODEL):
        generator = Generator(answer)
        monkeypatch.setattr(passkey, "Generator", generator)
        return evaluate_passkey(config, {}, TOKENIZER, grid), generator

    return run


@pytest.mark.parametrize(
    ("text", "number"),
    [(" 123.", 123), ("no digits", None), ("", None), (" x 7 8", 7), ("12,345", 12), ("007", 7), ("-5", 5), ("٣ 4", 4)],
)
def test_first_integer(text, number):
    assert first_integer(text) == number


def test_a_model_that_reads_the_key_scores_one(evaluate):
    report, generator = evaluate(lambda key, _: f" {key}. 999")
    assert [(c.length, c.depth, c.n, c.correct) for c in report.cells] == [
        (length, depth, 5, 5) for length in GRID.lengths for depth in GRID.depths
    ]
    assert [(c.length, c.n, c.correct) for c in report.by_length] == [(128, 15, 15), (192, 15, 15)]
    assert report.failures == ()
    assert all(o == {"max_new_tokens": 10, "eos_id": TOKENIZER.eos_id} for o in generator.options)


def test_prompts_have_their_length_and_batches_one_size(evaluate):
    _, generator = evaluate(lambda key, _: key)
    assert [[len(p) for p in batch] for batch in generator.batches] == 4 * [4 * [128]] + 4 * [4 * [192]]


@pytest.mark.parametrize(("batch_size", "sizes"), [(1, 15 * [1]), (7, 3 * [5]), (15, [15]), (100, [15])])
def test_batches_are_evenly_filled(evaluate, batch_size, sizes):
    grid = dataclasses.replace(GRID, lengths=[128], batch_size=batch_size)
    report, generator = evaluate(lambda key, _: key, grid)
    assert [len(batch) for batch in generator.batches] == sizes
    assert sum(cell.correct for cell in report.cells) == 15


def test_wrong_answers_count_in_their_own_cell(evaluate):
    report, _ = evaluate(lambda key, depth: f" {key}" if depth < 0.4 else f" 1{key}")
    assert {(c.length, c.depth): c.correct for c in report.cells} == {
        (length, depth): 5 if depth == 0 else 0 for length in GRID.lengths for depth in GRID.depths
    }
    assert len(report.failures) == 4 * FAILURES_KEPT


def test_a_failure_says_how_to_make_its_prompt_again(evaluate):
    report, _ = evaluate(lambda key, _: f" {key}0 ")
    failure = report.failures[-1]
    ids, answer = passkey_prompt(TOKENIZER, failure.length, failure.depth, failure.seed, failure.index)
    assert (len(ids), answer) == (failure.length, failure.expected)
    assert failure.generated.strip() == f"{answer}0"


def test_cells_do_not_depend_on_the_rest_of_the_grid(evaluate):
    def prompts(grid):
        _, generator = evaluate(lambda key, _: key, grid)
        return {tuple(prompt) for batch in generator.batches for prompt in batch}

    whole = prompts(GRID)
    assert len(whole) == 30, "no prompt is used twice"
    assert prompts(dataclasses.replace(GRID, lengths=[192], depths=[0.5])) < whole
    assert not prompts(dataclasses.replace(GRID, seed=12)) & whole
    keys = {KEY.search(TOKENIZER.decode(prompt)).group(1) for prompt in whole}
    assert len(keys) > 25, "cells draw their keys independently"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": [128, 503]}, r"eval.lengths has 503, .* max_position_embeddings 512 .* longest prompt is 502"),
        ({"lengths": [192, 20]}, r"passkey prompt of 20 tokens is too short: the shortest .* is \d+"),
        ({"lengths": [128, 128]}, r"eval.lengths must not repeat"),
        ({"depths": [0.5, 0.5]}, r"eval.depths must not repeat"),
    ],
)
def test_impossible_grids_are_refused_before_anything_runs(evaluate, changes, message):
    def fail(key, depth):
        raise AssertionError("nothing may be generated")

    with pytest.raises(InputError, match=message):
        evaluate(fail, dataclasses.replace(GRID, **changes))


def test_the_longest_possible_prompt_is_accepted(evaluate):
    report, _ = evaluate(lambda key, _: key, dataclasses.replace(GRID, lengths=[502]))
    assert report.by_length[0].correct == 15


def test_a_random_model_end_to_end(tmp_path, capsys):
    params = init_params(MODEL, seed=0)
    run = Run(tmp_path / "tiny", MODEL, params, TOKENIZER, step=3, trained_lengths=(64, 128))
    grid = dataclasses.replace(GRID, samples=2)
    report = run_passkey(run, grid, tmp_path / "tiny" / "eval")

    assert [cell.n for cell in report.cells] == 6 * [2]
    assert sum(cell.correct for cell in report.cells) <= 1, "an untrained model does not find keys"
    written = json.loads((tmp_path / "tiny" / "eval" / "passkey.json").read_text())
    assert written["cells"] == [cell.to_json() for cell in report.cells]
    assert written["config"] == dataclasses.asdict(grid)
    assert written["failures"] == [dataclasses.asdict(failure) for failure in report.failures]
    # Generation is deterministic, and so is everything but date and duration.
    assert {k: written["model"][k] for k in ("name", "step", "trained_lengths")} == {
        "name": "tiny",
        "step": 3,
        "trained_lengths": [64, 128],
    }
    assert written["model"]["cache_bytes_per_token"] == 2 * (16 + 8) * 2
    assert set(written["provenance"]) == {"date", "command", "git_revision", "hardware", "python", "jax"}
    assert (tmp_path / "tiny" / "eval" / "passkey.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "128 tokens" in out and "192 tokens" in out and "passkey.png" in out
    assert evaluate_passkey(MODEL, params, TOKENIZER, grid) == report


def test_the_cache_may_have_8_bits(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        passkey, "Generator", lambda *_, cache_dtype: made.append(cache_dtype) or Generator(lambda *_: "1")
    )
    grid = dataclasses.replace(GRID, cache_dtype="int8")
    run = Run(tmp_path, MODEL, init_params(MODEL, 0), TOKENIZER, step=0, trained_lengths=())
    run_passkey(run, grid, tmp_path / "eval")
    written = json.loads((tmp_path / "eval" / "passkey.json").read_text())
    assert written["model"]["cache_bytes_per_token"] == 2 * (16 + 8 + 2 * 4)
    assert made == ["int8"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    run = Run(tmp_path, MODEL, {}, TOKENIZER, step=0, trained_lengths=())
    with pytest.raises(InputError, match="could not create"):
        run_passkey(run, GRID, tmp_path / "file" / "eval")
