"""Perplexity by position: of a uniform model, against the likelihood of whole windows, and what cannot be measured."""

import json
import math

import jax
import jsonschema
import numpy as np
import pytest

from mla_jax.bridge.hf.model_card import model_card
from mla_jax.checkpoint.run_folder import Run
from mla_jax.config import PerplexityConfig
from mla_jax.data.tokenizer import load_tokenizer
from mla_jax.errors import InputError, UsageError
from mla_jax.evals.cells import NATS, Cell, totals_by_length
from mla_jax.evals.html_report import write_report
from mla_jax.evals.perplexity import perplexity_task
from mla_jax.evals.report import format_table
from mla_jax.evals.results import read_results
from mla_jax.evals.runner import evaluate
from mla_jax.evals.tracking import metrics_of
from mla_jax.inference.generator import Generator
from mla_jax.inference.score import Score, rolling_log_probs
from results_schema import SCHEMA
from tiny import MODEL, random_params

TOKENIZER = load_tokenizer("needle-bpe")
PARAMS = random_params(MODEL)
TEXT = "\n".join(f"Sentence {i} stands here. It is the {i * 7919 % 1000}th of its kind!" for i in range(60))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.txt").write_text(TEXT, encoding="utf-8")
    return str(folder)


def make(folder: str, **changes) -> PerplexityConfig:
    return PerplexityConfig(**{"text_folder": folder, "lengths": [65, 97], "samples": 3, "parts": 4} | changes)


def test_windows_are_spread_over_the_texts_and_do_not_overlap(folder):
    task = perplexity_task(MODEL, TOKENIZER, make(folder))
    whole, starts = TOKENIZER.encode(f"\n{TEXT}"), [0, 1, 2]
    for length in (65, 97):
        windows = [task.prompt({"length": length, "position": 1.0}, sample).ids for sample in range(3)]
        assert all(len(window) == length and window[0] == TOKENIZER.bos_id for window in windows)
        for sample, window in enumerate(windows):
            starts[sample] = sample * len(whole) // 3
            assert window[1:] == whole[starts[sample] : starts[sample] + length - 1]
    assert {task.haystack(cell, 1) for cell in task.cells} == {1}


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(folder, tmp_path, capsys):
    run = Run(tmp_path, MODEL, jax.tree.map(np.zeros_like, PARAMS), TOKENIZER, step=0, trained_lengths=(64,))
    results = evaluate(run, perplexity_task(MODEL, TOKENIZER, make(folder)), tmp_path / "eval")
    for cell in results.cells:
        assert cell.means[NATS].mean == pytest.approx(math.log(MODEL.vocab_size), rel=1e-6)
        assert cell.answers == () and cell.n == 3
    out = capsys.readouterr().out
    assert f"{MODEL.vocab_size} [{MODEL.vocab_size}-{MODEL.vocab_size}]" in out and "12.5%" not in out and "25%" in out
    assert results.failures == ()
    assert (tmp_path / "eval" / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    assert read_results(tmp_path / "eval" / "perplexity.json") == results
    jsonschema.validate(results.to_json(), SCHEMA)
    write_report([results], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<b>512</b><span>of 3<br>512 to 512</span>" in page and "Wrong answers" not in page
    card = model_card("hf", MODEL, "float32", [results])
    assert "| 65 | perplexity | 12 | 512 | 512 to 512 |" in card and "512 [512-512]" in card
    assert metrics_of(results)["eval/perplexity/97/position_0.5/nats_per_token"] == pytest.approx(math.log(512))


def test_parts_are_those_of_whole_windows(folder, tmp_path):
    config = make(folder, lengths=[97], batch_size=2, cache_dtype="int8")
    task = perplexity_task(MODEL, TOKENIZER, config)
    results = evaluate(Run(tmp_path, MODEL, PARAMS, TOKENIZER, step=0, trained_lengths=()), task, tmp_path / "eval")
    generator = Generator(MODEL, PARAMS, cache_dtype="int8")
    whole = [-rolling_log_probs(generator, task.prompt(task.cells[0], sample).ids) for sample in range(3)]
    for part, cell in enumerate(results.cells):
        assert cell.params == {"length": 97, "position": (part + 1) / 4}
        expected = [nats[24 * part : 24 * (part + 1)].mean() for nats in whole]
        np.testing.assert_allclose(cell.measures[NATS], expected, rtol=1e-4)
    (total,) = totals_by_length(results.cells)
    assert total.means[NATS].mean == pytest.approx(np.concatenate(whole).mean(), rel=1e-4)
    means = [nats.mean() for nats in whole]
    half = 4.302653 * np.std(means, ddof=1) / math.sqrt(3)  # Student's t with 2 degrees of freedom
    assert total.means[NATS].interval[1] - total.means[NATS].mean == pytest.approx(half, rel=1e-3)


def test_the_share_of_most_likely_tokens_of_each_part(folder):
    task = perplexity_task(MODEL, TOKENIZER, make(folder))
    scored = Score(-np.arange(10.0), np.arange(10) < 5)  # parts of 3, 3, 2 and 2 tokens
    found = [task.likelihood({"length": 11, "position": position}, scored) for position in (0.25, 0.5, 0.75, 1.0)]
    assert [scores["correct"] for scores, _ in found] == [1, pytest.approx(2 / 3), 0, 0]
    assert [measures[NATS] for _, measures in found] == [1, 4, 6.5, 8.5]


def test_the_table_has_perplexities():
    cells = [
        Cell({"length": 64, "position": end}, {"correct": (0.5, 0.5)}, measures={NATS: (math.log(a), math.log(b))})
        for end, a, b in ((0.5, 4, 9), (1.0, 16, 16))
    ]
    lines = format_table(cells).splitlines()
    assert lines[0].split() == ["position", "64", "tokens"] and lines[2].split()[:2] == ["50%", "6"]
    assert lines[3].split() == ["100%", "16", "[16-16]"] and lines[5].split()[:2] == ["all", "9.798"]


def test_what_a_cell_cannot_have(folder):
    cell = Cell({"length": 64, "position": 1.0}, {"correct": (1, 0)}, measures={NATS: (1.0, 2.0)}).to_json()
    assert Cell.from_json(json.loads(json.dumps(cell))).measures == {NATS: (1.0, 2.0)}
    for values in ([1.0], [1.0, math.nan], [1.0, "x"]):
        with pytest.raises((ValueError, TypeError)):
            Cell.from_json(cell | {"measures": {NATS: values}})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"lengths": [65, 513]}, InputError, r"eval.lengths has 513, .* longest prompt is 512"),
        ({"lengths": [4]}, UsageError, r"eval.lengths has 4, too few tokens for eval.parts=4"),
        ({"samples": 1}, UsageError, r"eval.samples must be at least 2, got 1"),
        ({"parts": 0}, UsageError, r"eval.parts must be at least 1, got 0"),
        (
            {"samples": 30},
            UsageError,
            r"eval.text_folder=\S+ has \d+ tokens .* eval.samples=30 windows of 96 take",
        ),
        ({"text_folder": "nowhere"}, InputError, "nowhere is not a folder"),
    ],
)
def test_what_cannot_be_measured(folder, changes, error, message):
    with pytest.raises(error, match=message):
        perplexity_task(MODEL, TOKENIZER, make(folder, **changes))
