"""RULER: its metric, the lengths of its prompts, and what cannot be asked."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from mla_jax.config import RulerConfig
from mla_jax.config.evaluate import RULER_TASKS, RULER_WITH_TEXT
from mla_jax.data.tokenizer import Tokenizer, load_tokenizer
from mla_jax.errors import InputError, UsageError
from mla_jax.evals.ruler import ruler_task, string_match_all
from mla_jax.evals.task import Prompt
from tiny import MODEL

TOKENIZER = load_tokenizer("needle-bpe")
LARGE = dataclasses.replace(MODEL, max_position_embeddings=1 << 20)
WITHOUT_TEXT = [name for name in RULER_TASKS if name not in RULER_WITH_TEXT]
CONFIG = RulerConfig(lengths=[2048], tasks=WITHOUT_TEXT, samples=3, seed=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.txt").write_text(" ".join(f"This is sentence {i}." for i in range(500)), encoding="utf-8")
    return str(folder)


def ruler_string_match_all(preds: list[str], refs: list[list[str]]) -> float:
    """As github.com/NVIDIA/RULER defines it in scripts/eval, postprocess_pred included; percent."""
    preds = [re.compile(r"[\x00-\x1f]").sub("\n", pred.strip()).strip() for pred in preds]
    hits = [sum(1.0 if r.lower() in pred.lower() else 0.0 for r in ref) for pred, ref in zip(preds, refs, strict=True)]
    return sum(hit / len(ref) for hit, ref in zip(hits, refs, strict=True)) / len(preds) * 100


@pytest.fixture(scope="module")
def harness():
    """RULER's functions in lm-evaluation-harness, without the rest of that package, which takes long to import."""
    package = importlib.util.find_spec("lm_eval").submodule_search_locations[0]
    file = Path(package) / "tasks" / "ruler" / "common_utils.py"
    spec = importlib.util.spec_from_file_location("ruler_common_utils", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PIECES = st.lists(st.sampled_from(["Fox", "owl", "12", "3", "-", " ", "\n", "\x07", "a"]), max_size=8).map("".join)


@given(answers=st.lists(st.tuples(PIECES, st.lists(PIECES, min_size=1, max_size=4)), min_size=1, max_size=5))
def test_the_metric_is_rulers(harness, answers):
    preds, refs = (list(each) for each in zip(*answers, strict=True))
    ours = [string_match_all(pred, ref) for pred, ref in answers]
    assert 100 * sum(ours) / len(ours) == pytest.approx(ruler_string_match_all(preds, refs))
    assert sum(ours) / len(ours) == pytest.approx(harness.string_match_all(harness.postprocess_pred(preds), refs))


@pytest.mark.parametrize(
    ("text", "references", "score"),
    [
        (" 123, 456.", ("123", "456"), 1),
        ("1234", ("123", "456"), 0.5),  # a recall of substrings, as RULER has it
        ("", ("123",), 0),
        ("AD HOC-Fox", ("ad hoc-fox",), 1),
    ],
)
def test_scores_of_answers(text, references, score):
    task = ruler_task(LARGE, TOKENIZER, CONFIG)
    assert task.score(Prompt([], "", 0, 0, references=references), text) == {"correct": score}


@pytest.mark.parametrize("tokenizer", ["needle-bpe", "bytes"])
def test_prompt_and_answer_fill_the_length(tokenizer, folder):
    tokenizer = load_tokenizer(tokenizer)
    config = dataclasses.replace(CONFIG, lengths=[2200, 3500], tasks=list(RULER_TASKS[::-1]), text_folder=folder)
    task = ruler_task(LARGE, tokenizer, config)
    assert [cell["task"] for cell in task.cells] == 2 * list(RULER_TASKS)
    limits = dict.fromkeys(RULER_TASKS, 128) | {"vt": 30, "cwe": 120, "fwe": 50}
    for cell in task.cells:
        assert task.max_new_tokens(cell) == limits[cell["task"]]
        for sample in range(3):
            prompt = task.prompt(cell, sample)
            taken = len(prompt.ids) + limits[cell["task"]]
            assert 0.88 * cell["length"] < taken <= cell["length"], cell
            assert prompt.ids[0] == tokenizer.bos_id
            text = tokenizer.decode(prompt.ids)
            assert all(reference in text for reference in prompt.references)
            assert prompt.answer == ", ".join(prompt.references)
            assert text.rstrip().endswith(prompt.question) and len(prompt.question) > 80


def test_prompts_do_not_depend_on_the_rest_and_differ():
    task = ruler_task(LARGE, TOKENIZER, CONFIG)
    ids = {(cell["task"], sample): task.prompt(cell, sample).ids for cell in task.cells for sample in range(3)}
    assert len({tuple(each) for each in ids.values()}) == len(ids)
    other = ruler_task(LARGE, TOKENIZER, dataclasses.replace(CONFIG, tasks=["vt"], lengths=[3000, 2048], samples=1))
    assert other.prompt({"length": 2048, "task": "vt"}, 2).ids == ids["vt", 2]
    seeded = ruler_task(LARGE, TOKENIZER, dataclasses.replace(CONFIG, seed=6))
    assert seeded.prompt({"length": 2048, "task": "vt"}, 2).ids != ids["vt", 2]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"lengths": [4096, 1 << 21]}, InputError, r"eval.lengths has 2097152, .* longest prompt is 1048576 tokens"),
        ({"lengths": [1000]}, UsageError, r"eval.lengths has 1000, but the shortest prompt of cwe takes \d{4} tokens"),
        ({"lengths": [4096]}, UsageError, r"shortest prompt of cwe takes \d{4} tokens .* leave it out of eval.tasks"),
        ({"tasks": ["niah_single_2"], "text_folder": "nowhere"}, InputError, "nowhere is not a folder"),
    ],
)
def test_what_cannot_be_asked(changes, error, message):
    with pytest.raises(error, match=message):
        ruler_task(LARGE, TOKENIZER, dataclasses.replace(CONFIG, **changes))


def test_a_text_that_is_too_short(folder):
    config = dataclasses.replace(CONFIG, tasks=["niah_single_2"], text_folder=folder, lengths=[2048, 16384])
    with pytest.raises(UsageError, match=r"eval.text_folder=\S+ has 2000 words: .* \d+ tokens, .* the 16384 in"):
        ruler_task(LARGE, TOKENIZER, config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": []}, r"eval\.tasks needs at least one of niah_single_1, "),
        ({"tasks": ["vt", "vt"]}, r"eval\.tasks must not repeat"),
        ({"tasks": ["qa_1"]}, r"eval\.tasks must be one of .*vt, cwe, fwe; got 'qa_1'"),
        ({"tasks": ["niah_multiquery"]}, r"eval\.tasks has niah_multiquery, .* set eval\.text_folder=FOLDER"),
        ({"lengths": [4096, 4096]}, r"eval\.lengths must not repeat"),
    ],
)
def test_tasks_that_are_not_there(changes, message):
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize(
    ("lacks", "message"), [("V", r"vt: .* \(not 'VAR', for"), (" ", "vt: "), ("?", "niah_single_1: ")]
)
def test_a_tokenizer_that_lacks_a_character(lacks, message):
    characters = {chr(code) for code in range(32, 127)} - {lacks} | {"\n"}
    backend = tokenizers.Tokenizer(
        models.WordLevel({c: i for i, c in enumerate(["<unk>", "</s>", *characters])}, "<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    lacking = Tokenizer(backend, {"eos_token": "</s>", "unk_token": "<unk>"}, "letters")
    tasks = ["vt", "niah_single_1"]
    with pytest.raises(UsageError, match=f"^eval.tasks={message}") as e:
        ruler_task(LARGE, lacking, dataclasses.replace(CONFIG, tasks=tasks, lengths=[9000]))
    assert "tokenizer letters cannot write its prompts" in str(e.value)
