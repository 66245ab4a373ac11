"""Passkey scoring against generators whose answers are known, and a whole evaluation of a random tiny model."""

import dataclasses
import json
import re

import jsonschema
import pytest

from mla_jax.checkpoint.manifest import write_manifest
from mla_jax.checkpoint.run_folder import Run
from mla_jax.config import PasskeyConfig
from mla_jax.data.needle.generator import passkey_prompt
from mla_jax.data.tokenizer import load_tokenizer
from mla_jax.errors import InputError
from mla_jax.evals import asking, runner
from mla_jax.evals.cells import totals_by_length
from mla_jax.evals.passkey import first_integer, passkey_task
from mla_jax.evals.results import read_results
from mla_jax.evals.runner import FAILURES_KEPT, evaluate, measure
from mla_jax.inference import generator as model_generator
from mla_jax.model.transformer import init_params
from results_schema import SCHEMA
from tiny import MODEL

TOKENIZER = load_tokenizer("needle-bpe")
GRID = PasskeyConfig(lengths=[128, 192], depths=[0.0, 0.5, 1.0], samples=5, batch_size=4, seed=11)
KEY = re.compile(r"The pass key is ([0-9]+)\.")


class Generator:
    """Stands in for `generator.Generator`: reads the key in the prompt and answers what `answer(key, depth)` says."""

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


def ask(answer, grid=GRID, config=MODEL):
    """Runs a grid with a Generator; returns cells, failures and generator."""
    generator = Generator(answer)
    measured = list(measure(passkey_task(config, TOKENIZER, grid), generator, TOKENIZER))
    return (
        [cell for cell, _ in measured],
        [f for _, failures in measured for f in failures],
        generator,
    )


@pytest.mark.parametrize(
    ("text", "number"),
    [(" 123.", 123), ("no digits", None), ("", None), (" x 7 8", 7), ("12,345", 12), ("007", 7), ("-5", 5), ("٣ 4", 4)],
)
def test_first_integer(text, number):
    assert first_integer(text) == number


def test_a_model_that_reads_the_key_scores_one():
    cells, failures, generator = ask(lambda key, _: f" {key}. 999")
    assert [(c.params, c.n, c.correct) for c in cells] == [
        ({"length": length, "depth": depth}, 5, 5) for length in GRID.lengths for depth in GRID.depths
    ]
    assert [(c.length, c.n, c.correct) for c in totals_by_length(cells)] == [(128, 15, 15), (192, 15, 15)]
    assert failures == []
    assert {answer.question for cell in cells for answer in cell.answers} == {"What is the pass key? The pass key is"}
    assert all(a.generated == f" {a.expected}. 999" and a.near == () for cell in cells for a in cell.answers)
    expected = {"max_new_tokens": 10, "eos_id": TOKENIZER.eos_id, "session": None}
    assert all(options == expected for options in generator.options)


def test_prompts_have_their_length_and_batches_one_size():
    _, _, generator = ask(lambda key, _: key)
    assert [[len(p) for p in batch] for batch in generator.batches] == 4 * [4 * [128]] + 4 * [4 * [192]]


@pytest.mark.parametrize(("batch_size", "sizes"), [(1, 15 * [1]), (7, 3 * [5]), (15, [15]), (100, [15])])
def test_batches_are_evenly_filled(batch_size, sizes):
    grid = dataclasses.replace(GRID, lengths=[128], batch_size=batch_size)
    cells, _, generator = ask(lambda key, _: key, grid)
    assert [len(batch) for batch in generator.batches] == sizes
    assert sum(cell.correct for cell in cells) == 15


def test_wrong_answers_count_in_their_own_cell():
    cells, failures, _ = ask(lambda key, depth: f" {key}" if depth < 0.4 else f" 1{key}")
    assert {(c.length, c.params["depth"]): c.correct for c in cells} == {
        (length, depth): 5 if depth == 0 else 0 for length in GRID.lengths for depth in GRID.depths
    }
    assert len(failures) == 4 * FAILURES_KEPT


def test_a_failure_says_how_to_make_its_prompt_again():
    failure = ask(lambda key, _: f" {key}0 ")[1][-1]
    length, depth = failure.params["length"], failure.params["depth"]
    ids, answer = passkey_prompt(TOKENIZER, length, depth, failure.seed, failure.index)
    assert (len(ids), answer) == (length, failure.expected)
    assert failure.generated.strip() == f"{answer}0"


def test_cells_do_not_depend_on_the_rest_of_the_grid():
    def prompts(grid):
        _, _, generator = ask(lambda key, _: key, grid)
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
def test_impossible_grids_are_refused_before_anything_runs(changes, message):
    with pytest.raises(InputError, match=message):
        passkey_task(MODEL, TOKENIZER, dataclasses.replace(GRID, **changes))


def test_the_longest_possible_prompt_is_accepted():
    cells, _, _ = ask(lambda key, _: key, dataclasses.replace(GRID, lengths=[502]))
    assert totals_by_length(cells)[0].correct == 15


def test_a_random_model_end_to_end(tmp_path, capsys):
    params = init_params(MODEL, seed=0)
    run = Run(tmp_path / "tiny", MODEL, params, TOKENIZER, step=3, trained_lengths=(64, 128))
    grid = dataclasses.replace(GRID, samples=2)
    task = passkey_task(MODEL, TOKENIZER, grid)
    report = evaluate(run, task, tmp_path / "tiny" / "eval")

    assert [cell.n for cell in report.cells] == 6 * [2]
    assert sum(cell.correct for cell in report.cells) <= 1, "an untrained model does not find keys"
    written = json.loads((tmp_path / "tiny" / "eval" / "passkey.json").read_text())
    jsonschema.validate(written, SCHEMA)
    assert written["cells"] == [cell.to_json() for cell in report.cells]
    assert written["config"] == dataclasses.asdict(grid)
    assert written["failures"] == [failure.to_json() for failure in report.failures]
    assert read_results(tmp_path / "tiny" / "eval" / "passkey.json") == report
    assert {path.name for path in (tmp_path / "tiny" / "eval").iterdir()} == {"passkey.json", "passkey.png"}
    # Generation is deterministic, and so is everything but date and duration.
    assert {k: written["model"][k] for k in ("name", "step", "trained_lengths")} == {
        "name": "tiny",
        "step": 3,
        "trained_lengths": [64, 128],
    }
    assert written["model"]["cache_bytes_per_token"] == 2 * (16 + 8) * 2
    assert set(written["provenance"]) == {"date", "command", "version", "git_revision", "hardware", "python", "jax"}
    assert (tmp_path / "tiny" / "eval" / "passkey.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "128 tokens" in out and "192 tokens" in out and "passkey.png" in out
    again = evaluate(run, task, tmp_path / "again")
    assert (again.cells, again.failures) == (report.cells, report.failures)


def test_the_cache_may_have_8_bits(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        runner, "Generator", lambda *_, cache_dtype: made.append(cache_dtype) or Generator(lambda *_: "1")
    )
    grid = dataclasses.replace(GRID, cache_dtype="int8")
    run = Run(tmp_path, MODEL, init_params(MODEL, 0), TOKENIZER, step=0, trained_lengths=())
    evaluate(run, passkey_task(MODEL, TOKENIZER, grid), tmp_path / "eval")
    written = json.loads((tmp_path / "eval" / "passkey.json").read_text())
    assert written["model"]["cache_bytes_per_token"] == 2 * (16 + 8 + 2 * 4)
    assert made == ["int8"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    run = Run(tmp_path, MODEL, {}, TOKENIZER, step=0, trained_lengths=())
    with pytest.raises(InputError, match="could not create"):
        evaluate(run, passkey_task(MODEL, TOKENIZER, GRID), tmp_path / "file" / "eval")


class Interrupted(Generator):
    """Is interrupted at the prompts of 192 tokens."""

    def generate(self, prompts, **options):
        if len(prompts[0]) == 192:
            raise KeyboardInterrupt
        return super().generate(prompts, **options)


@pytest.mark.parametrize("revision", ["same", "same-dirty"])
def test_an_interrupted_evaluation_goes_on_unless_the_source_was_changed(tmp_path, monkeypatch, capsys, revision):
    dates = iter(["yesterday", "today"])
    monkeypatch.setattr(runner, "provenance", lambda: {"date": next(dates), "git_revision": revision})
    run, task = (
        Run(tmp_path, MODEL, {}, TOKENIZER, step=4, trained_lengths=(128,)),
        passkey_task(MODEL, TOKENIZER, GRID),
    )
    monkeypatch.setattr(runner, "Generator", Interrupted(lambda key, depth: key if depth > 0.4 else "1"))
    with pytest.raises(KeyboardInterrupt):
        evaluate(run, task, tmp_path / "eval")
    assert [path.name for path in (tmp_path / "eval").iterdir()] == ["passkey.json.unfinished"]
    generator = Generator(lambda key, depth: key if depth > 0.4 else "1")
    monkeypatch.setattr(runner, "Generator", generator)
    results = evaluate(run, task, tmp_path / "eval")
    resumed = revision == "same"
    assert {len(batch[0]) for batch in generator.batches} == ({192} if resumed else {128, 192})
    assert ("has 3 finished cells: going on from there" in capsys.readouterr().out) == resumed
    assert [(c.length, c.params["depth"], c.correct) for c in results.cells] == [
        (length, depth, 5 if depth else 0) for length in GRID.lengths for depth in GRID.depths
    ]
    assert {path.name for path in (tmp_path / "eval").iterdir()} == {"passkey.json", "passkey.png"}


@pytest.mark.parametrize("other", [{"step": 5}, {"samples": 4}])
def test_what_was_measured_of_another_step_or_grid_is_measured_again(tmp_path, monkeypatch, other):
    monkeypatch.setattr(runner, "provenance", lambda: {"git_revision": "same"})
    monkeypatch.setattr(runner, "Generator", Interrupted(lambda key, _: "1"))
    run = Run(tmp_path, MODEL, {}, TOKENIZER, step=4, trained_lengths=())
    with pytest.raises(KeyboardInterrupt):
        evaluate(run, passkey_task(MODEL, TOKENIZER, GRID), tmp_path / "eval")
    monkeypatch.setattr(runner, "Generator", Generator(lambda key, _: key))
    run = dataclasses.replace(run, step=other.get("step", 4))
    grid = dataclasses.replace(GRID, samples=other.get("samples", 5))
    results = evaluate(run, passkey_task(MODEL, TOKENIZER, grid), tmp_path / "eval")
    assert results.counts == (6 * grid.samples, 6 * grid.samples)


class Stopped(Generator):
    """Is interrupted after a number of batches."""

    def __init__(self, answer, batches):
        super().__init__(answer)
        self.left = batches

    def generate(self, prompts, **options):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return super().generate(prompts, **options)


@pytest.mark.parametrize(("batches", "kept"), [(1, 0), (2, 1), (3, 2), (4, 3), (5, 3), (6, 4), (7, 5)])
def test_an_interrupted_evaluation_keeps_every_cell_that_it_finished(tmp_path, monkeypatch, batches, kept):
    """Of 4 prompts a batch and 5 a cell, in cells of 2 lengths x 3 depths."""

    def answer(key, depth):
        return key if depth > 0.4 else "1"

    monkeypatch.setattr(runner, "provenance", lambda: {"git_revision": "same"})
    monkeypatch.setattr(runner, "Generator", Stopped(answer, batches))
    run, task = Run(tmp_path, MODEL, {}, TOKENIZER, step=4, trained_lengths=()), passkey_task(MODEL, TOKENIZER, GRID)
    with pytest.raises(KeyboardInterrupt):
        evaluate(run, task, tmp_path / "eval")
    unfinished = tmp_path / "eval" / "passkey.json.unfinished"
    if kept:
        assert [cell.params for cell in read_results(unfinished, finished=False).cells] == list(task.cells[:kept])
    else:
        assert not unfinished.exists()
    generator = Generator(answer)
    monkeypatch.setattr(runner, "Generator", generator)
    results = evaluate(run, task, tmp_path / "eval")
    asked = {tuple(prompt) for batch in generator.batches for prompt in batch}
    assert len(asked) == 5 * (6 - kept)
    assert [cell.params for cell in results.cells] == list(task.cells)
    assert [cell.correct for cell in results.cells] == 2 * [0, 5, 5]
    assert len(results.failures) == 2 * FAILURES_KEPT
    assert read_results(tmp_path / "eval" / "passkey.json") == results


CELLS = passkey_task(MODEL, TOKENIZER, GRID).cells


@pytest.mark.parametrize("cells", [(), CELLS[:5], CELLS + CELLS[:1], (*CELLS, {"length": 128, "hops": 2})])
def test_cells_that_are_no_grid_are_refused_before_the_model_runs(tmp_path, monkeypatch, cells):
    generator = Generator(lambda key, _: key)
    monkeypatch.setattr(runner, "Generator", generator)
    run = Run(tmp_path, MODEL, {}, TOKENIZER, step=0, trained_lengths=())
    task = dataclasses.replace(passkey_task(MODEL, TOKENIZER, GRID), cells=cells)
    with pytest.raises(ValueError, match="not a whole grid|cells of different parameters"):
        evaluate(run, task, tmp_path / "eval")
    assert generator.batches == [] and not (tmp_path / "eval").exists()


@pytest.mark.parametrize("changed", ["nothing", "config", "weights", "version"])
def test_an_interrupted_evaluation_goes_on_only_with_the_same_model_and_version(tmp_path, monkeypatch, changed):
    """In an installed package, which has no git revision."""
    folder = tmp_path / "checkpoints" / "4" / "params"
    folder.mkdir(parents=True)
    (folder / "data").write_text("weights")
    write_manifest(folder.parent)
    source = {"version": "1.0", "git_revision": None}
    monkeypatch.setattr(runner, "provenance", lambda: source)
    monkeypatch.setattr(runner, "Generator", Interrupted(lambda key, _: key))
    run = Run(tmp_path, MODEL, {}, TOKENIZER, step=4, trained_lengths=())
    with pytest.raises(KeyboardInterrupt):
        evaluate(run, passkey_task(MODEL, TOKENIZER, GRID), tmp_path / "eval")
    if changed == "config":
        run = dataclasses.replace(run, model=dataclasses.replace(MODEL, rope_theta=2 * MODEL.rope_theta))
    elif changed == "weights":
        (folder / "data").write_text("Weights")
        write_manifest(folder.parent)
    elif changed == "version":
        source["version"] = "1.1"
    generator = Generator(lambda key, _: key)
    monkeypatch.setattr(runner, "Generator", generator)
    evaluate(run, passkey_task(MODEL, TOKENIZER, GRID), tmp_path / "eval")
    assert {len(batch[0]) for batch in generator.batches} == ({192} if changed == "nothing" else {128, 192})


class Reading(model_generator.Generator):
    """A `generator.Generator` that counts the tokens of prompts that it reads."""

    read_tokens = 0

    def generate(self, prompts, *, session=None, **options):
        if session is not None:
            session.keep_common_prefix(prompts)
        read = session.tokens if session is not None else [[]] * len(prompts)
        self.read_tokens += sum(map(len, prompts)) - sum(map(len, read))
        return super().generate(prompts, session=session, **options)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_of_long_prompts_the_noise_before_the_needle_is_read_once(monkeypatch, batch_size):
    """The answers are those of prompts that are read whole, up to the order of sums."""
    grid = PasskeyConfig(lengths=[512], depths=[0.0, 0.5, 1.0], samples=4, batch_size=batch_size, seed=11)
    config = dataclasses.replace(MODEL, max_position_embeddings=1024, dtype="float32")
    task, params = passkey_task(config, TOKENIZER, grid), init_params(config, 0)
    whole, sharing = (Reading(config, params, prefill_chunk=64) for _ in range(2))
    expected = dict(_answers(measure(task, whole, TOKENIZER)))
    monkeypatch.setattr(asking, "LONG", 64)
    assert dict(_answers(measure(task, sharing, TOKENIZER))) == expected
    # Each row reads 512 tokens first, next to nothing again at depth 1, half at 0.5 and all but the introduction at 0.
    assert whole.read_tokens == 12 * 512
    assert sharing.read_tokens < batch_size * 512 + (0.1 + 0.6 + 1.0) * 4 * 512


def _answers(measured):
    for cell, _ in measured:
        yield cell.params["depth"], [answer.generated for answer in cell.answers]
