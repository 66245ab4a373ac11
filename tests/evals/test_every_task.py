"""What holds for every task: interrupted it goes on, it notices what changed, and the report has all of its scores."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from experiments.evaluate import TASKS
from mla_jax.checkpoint.run_folder import Run
from mla_jax.config import (
    EvalConfig,
    HallucinationConfig,
    HashHopConfig,
    MultikeyConfig,
    NiahConfig,
    PasskeyConfig,
    PerplexityConfig,
    RulerConfig,
)
from mla_jax.data.tokenizer import load_tokenizer
from mla_jax.evals import asking, runner
from mla_jax.evals.cells import NATS
from mla_jax.evals.html_report import report_on
from mla_jax.evals.report import format_value
from mla_jax.evals.results import read_results
from mla_jax.evals.runner import evaluate
from mla_jax.inference.generator import Generator as RealGenerator
from mla_jax.inference.score import Score, score
from results_schema import SCHEMA
from tiny import MODEL, random_params

TOKENIZER = load_tokenizer("needle-bpe")
TEXTS = Path(__file__).resolve().parent.parent.parent / "docs"
CONFIGS: dict[str, EvalConfig] = {
    "passkey": PasskeyConfig(lengths=[128, 192], depths=[0.0, 1.0], samples=3, batch_size=2),
    "passkey_infinitebench": PasskeyConfig(
        format="infinitebench", lengths=[192, 256], depths=[0.0, 1.0], samples=3, batch_size=2
    ),
    "hallucination": HallucinationConfig(lengths=[192, 256], samples=4, questions=2, needles=3),
    "hashhop": HashHopConfig(lengths=[300, 400], hops=[1, 2], samples=4, questions=2),
    "multikey": MultikeyConfig(lengths=[192, 256], keys=[2, 6], samples=4, questions=2),
    "niah": NiahConfig(text_folder=str(TEXTS), lengths=[128, 192], depths=[0.0, 1.0], samples=3, batch_size=2),
    "perplexity": PerplexityConfig(text_folder=str(TEXTS), lengths=[96, 128], samples=6, parts=2, batch_size=2),
    "ruler": RulerConfig(lengths=[384, 512], tasks=["niah_single_1", "niah_multikey_2"], samples=3, batch_size=2),
}


def test_all_tasks_are_here():
    assert {type(config) for config in CONFIGS.values()} == set(TASKS)


class Generator:
    """Stands in for `generator.Generator`: answers some prompts, and is interrupted after a number of calls."""

    def __init__(self, calls: float = float("inf")):
        self.left, self.asked = calls, []

    def __call__(self, *_, **__):
        return self

    def generate(self, prompts, **_):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.asked += [tuple(prompt) for prompt in prompts]
        return [TOKENIZER.encode(f" {sum(prompt)}") for prompt in prompts]

    def score(self, contexts, continuations):
        """What `inference.score.score` is called for."""
        self.generate([[*one, *other] for one, other in zip(contexts, continuations, strict=True)])
        return [Score(-np.array(ids) / 100, np.array(ids) % 2 == 0) for ids in continuations]

    def read(self, session, prompts, **_):
        session.tokens = prompts

    def most_copies(self, session, wanted):
        return wanted

    def fork(self, session, rows):
        return session


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """Evaluates a task with a generator; returns the results, None if it was interrupted."""
    monkeypatch.setattr(runner, "provenance", lambda: {"git_revision": "same"})
    for plot in ("plot_heatmap", "plot_curves"):
        monkeypatch.setattr(runner, plot, lambda *_, **__: None)
    monkeypatch.setattr(asking, "score", lambda generator, *texts: generator.score(*texts))
    run = Run(tmp_path, MODEL, {}, TOKENIZER, step=4, trained_lengths=())

    def evaluated(config: EvalConfig, generator: Generator, out: str):
        monkeypatch.setattr(runner, "Generator", generator)
        try:
            return evaluate(run, TASKS[type(config)](MODEL, TOKENIZER, config), tmp_path / out)
        except KeyboardInterrupt:
            return None

    return evaluated


@pytest.mark.parametrize("name", CONFIGS)
def test_killed_at_any_moment_it_goes_on_with_the_cells_that_are_left(name, ask, tmp_path):
    config, whole = CONFIGS[name], Generator()
    wanted = ask(config, whole, "whole")
    task = TASKS[type(config)](MODEL, TOKENIZER, config)
    prompts = {
        tuple(cell.items()): [tuple(task.prompt(cell, i).ids) for i in range(task.samples)] for cell in task.cells
    }
    assert set(whole.asked) == {prompt for of_cell in prompts.values() for prompt in of_cell}
    killed = 0
    for calls in range(1, len(whole.asked)):
        out = f"killed at {calls}"
        if ask(config, Generator(calls), out) is not None:
            break
        killed += 1
        unfinished = tmp_path / out / f"{task.name}.json.unfinished"
        finished = read_results(unfinished, finished=False).cells if unfinished.exists() else ()
        again = Generator()
        assert ask(config, again, out).cells == wanted.cells
        answered = {prompt for cell in finished for prompt in prompts[tuple(cell.params.items())]}
        assert set(again.asked) == {prompt for of_cell in prompts.values() for prompt in of_cell} - answered
    assert killed >= 3


@pytest.mark.parametrize("name", CONFIGS)
def test_results_fit_the_schema_and_the_report_has_every_score_of_every_cell(name, ask, tmp_path):
    results = ask(CONFIGS[name], Generator(), "out")
    model = results.model | {"parameters": 1}  # this one has no weights
    jsonschema.validate(results.to_json() | {"model": model}, SCHEMA)
    page = report_on(tmp_path / "out").read_text()
    cells = [*results.cells, *results.by_length]
    assert page.count("<td style=") == sum(len(cell.all_rates) + len(cell.means) for cell in cells)
    params = sorted({format_value(key, cell.params[key]) for cell in cells for key in cell.params if key != "length"})
    assert all(f'<th scope="row">{value}</th>' in page for value in params)


def test_evaluations_that_end_together_write_one_report(ask, tmp_path):
    ask(CONFIGS["passkey"], Generator(), "out")
    alone = report_on(tmp_path / "out").read_bytes()
    with ThreadPoolExecutor(8) as threads:
        paths = list(threads.map(report_on, [tmp_path / "out"] * 24))
    assert all(path.read_bytes() == alone for path in paths)


@pytest.mark.parametrize("name", CONFIGS)
def test_another_seed_is_noticed(name, ask, tmp_path):
    calls = 3 if name in ("passkey", "passkey_infinitebench", "niah", "ruler") else 2
    assert ask(CONFIGS[name], Generator(calls), "out") is None
    generator = Generator()
    other = dataclasses.replace(CONFIGS[name], seed=7)
    assert ask(other, generator, "out").config["seed"] == 7
    task = TASKS[type(other)](MODEL, TOKENIZER, other)
    prompts = {tuple(task.prompt(cell, sample).ids) for cell in task.cells for sample in range(task.samples)}
    assert set(generator.asked) == prompts, "all of them again"


@pytest.mark.integration
@pytest.mark.parametrize("name", CONFIGS)
def test_a_real_model_answers_with_an_8_bit_cache_as_it_does_prompt_by_prompt(name, tmp_path):
    """Whatever was read together: batches, haystacks, parts of texts."""
    config = dataclasses.replace(CONFIGS[name], cache_dtype="int8", lengths=CONFIGS[name].lengths[:1])
    task = TASKS[type(config)](MODEL, TOKENIZER, config)
    run = Run(tmp_path, MODEL, random_params(MODEL), TOKENIZER, step=4, trained_lengths=())
    results = evaluate(run, task, tmp_path / "eval")
    model = RealGenerator(MODEL, run.params, cache_dtype="int8")
    for cell in results.cells:
        for sample in range(task.samples):
            prompt = task.prompt(cell.params, sample)
            if task.likelihood is not None:
                (scored,) = score(model, [prompt.ids[:1]], [prompt.ids[1:]])
                assert cell.measures[NATS][sample] == pytest.approx(
                    task.likelihood(cell.params, scored)[1][NATS], rel=1e-3
                )
                continue
            most = task.max_new_tokens(cell.params)
            (alone,) = model.generate([prompt.ids], max_new_tokens=most, eos_id=TOKENIZER.eos_id)
            assert cell.answers[sample].generated == TOKENIZER.decode(alone)
