"""The models that the repository ships answer, and their cards tell the truth."""

import re
from pathlib import Path

import pytest

from mla_jax.bridge.hf.model_card import model_card
from mla_jax.bridge.run_or_hf import load_run_or_hf
from mla_jax.config import HallucinationConfig, MultikeyConfig, PasskeyConfig
from mla_jax.data.turns import stop_ids
from mla_jax.evals.cells import totalled
from mla_jax.evals.hallucination import hallucination_task
from mla_jax.evals.multikey import multikey_task
from mla_jax.evals.passkey import passkey_task
from mla_jax.evals.runner import measure
from mla_jax.inference.generator import Generator

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "weights"


def card_of(name: str) -> str:
    return (WEIGHTS / name / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def nano():
    run = load_run_or_hf(WEIGHTS / "nano")
    return run, Generator(run.model, run.params)


def test_it_finds_the_number_of_the_example(nano):
    run, generator = nano
    text = (ROOT / "examples" / "haystack.txt").read_text(encoding="utf-8")
    ids = [run.tokenizer.bos_id, *run.tokenizer.encode(text)]
    (answer,) = generator.generate([ids], max_new_tokens=10, eos_id=stop_ids(run.tokenizer))
    assert run.tokenizer.decode(answer).strip() == re.search(r"The pass key is (\d+)\.", text)[1] + "."


@pytest.mark.parametrize(("name", "dtype"), [("nano", "float32"), ("lookup", "bfloat16")])
def test_a_card_is_of_these_weights(name, dtype):
    run = load_run_or_hf(WEIGHTS / name)
    assert card_of(name).startswith(model_card(name, run.model, dtype, ()).partition("## Evaluation")[0])
    assert sum(file.stat().st_size for file in (WEIGHTS / name).iterdir()) <= 6e6


def test_its_card_promises_no_more_than_other_prompts_show(nano):
    run, generator = nano
    card = card_of("nano").partition("### Passkey retrieval")[2]
    rows = re.findall(r"^\| (\d+) \| correct \| (\d+) \| [\d.]+ % \| ([\d.]+) to [\d.]+ % \|$", card, re.MULTILINE)
    lengths = tuple(int(length) for length, _, _ in rows)
    assert lengths == (128, 192, 256) and all(int(n) >= 100 for _, n, _ in rows)
    grid = PasskeyConfig(lengths=lengths, depths=(0.1, 0.6, 0.9), samples=6, seed=77)
    cells = [cell for cell, _ in measure(passkey_task(run.model, run.tokenizer, grid), generator, run.tokenizer)]
    for length, _, low in rows:
        of_length = [cell for cell in cells if cell.length == int(length)]
        right, asked = sum(cell.correct for cell in of_length), sum(cell.n for cell in of_length)
        assert right / asked >= float(low) / 100 - 0.1, (length, right, asked)


def test_lookup_tells_keys_apart_and_makes_up_the_number_of_one_that_is_missing():
    """As its card says; `make dpo-example` starts from this."""
    run = load_run_or_hf(WEIGHTS / "lookup")
    generator = Generator(run.model, run.params)
    many = MultikeyConfig(lengths=(256,), keys=(8,), questions=2, samples=20, seed=77)
    missing = HallucinationConfig(lengths=(256,), needles=2, questions=2, samples=20, seed=77)
    tasks = (multikey_task(run.model, run.tokenizer, many), hallucination_task(run.model, run.tokenizer, missing))
    found, asked = (totalled([cell for cell, _ in measure(task, generator, run.tokenizer)]) for task in tasks)
    for answers, score in ((found, "correct"), (asked, "retrieval"), (asked, "hallucination")):
        assert f"| 256 | {score} | 200 | 100 % | 96.3 to 100.0 % |" in card_of("lookup")
        assert answers.rate(score).rate >= 0.963 - 0.1, score
