"""Questions about present and absent keys against a parse of their haystacks, and scores of answers that are known."""

import dataclasses

import pytest

from key_reader import ASKED, NEEDLE, TOKENIZER, KeyReader, near_number
from mla_jax.checkpoint.run_folder import Run
from mla_jax.config import HallucinationConfig
from mla_jax.data.needle.questions import key_questions
from mla_jax.errors import InputError, UsageError
from mla_jax.evals.cells import totals_by_length
from mla_jax.evals.hallucination import hallucination_task, score
from mla_jax.evals.runner import evaluate, measure
from mla_jax.evals.task import Prompt
from mla_jax.inference.generator import Generator as RealGenerator
from mla_jax.model.transformer import init_params
from tiny import MODEL

CONFIG = HallucinationConfig(lengths=[192, 320], samples=6, questions=2, needles=6, seed=5)


def rates(answer, config=CONFIG) -> dict[str, float]:
    cells = [cell for cell, _ in measure(hallucination_task(MODEL, TOKENIZER, config), KeyReader(answer), TOKENIZER)]
    assert [cell.params for cell in cells] == [
        {"length": length, "question": kind} for length in config.lengths for kind in ("present", "absent")
    ]
    total = totals_by_length(cells)[0]
    return {"correct": total.accuracy} | {name: rate.rate for name, rate in total.rates.items()}


def test_a_model_that_reads_makes_nothing_up():
    found = rates(lambda key, numbers: f" {numbers.get(key, 'not found')}.")
    assert found == {"correct": 1, "retrieval": 1, "hallucination": 0, "false_refusal": 0, "near_miss": 0}


def test_results_keep_question_and_answer_of_each_prompt():
    task = hallucination_task(MODEL, TOKENIZER, CONFIG)
    for cell, _ in measure(task, KeyReader(lambda key, numbers: f" {numbers.get(key, key)}."), TOKENIZER):
        for sample, kept in enumerate(cell.answers):
            prompt = task.prompt(cell.params, sample)
            assert (kept.expected, kept.near) == (prompt.answer, prompt.near)
            key = ASKED.search("\n" + kept.question).group(1)
            assert TOKENIZER.decode(prompt.ids).endswith(f"\n{kept.question}")
            assert kept.generated == f" {key if prompt.answer == 'not found' else prompt.answer}."
        assert len(cell.answers) == cell.n == CONFIG.samples


def test_a_model_that_always_answers_and_one_that_never_does():
    found = rates(lambda key, numbers: f" {numbers.get(key) or near_number(key, numbers)}.")
    assert found == {"correct": 0.5, "retrieval": 1, "hallucination": 1, "false_refusal": 0, "near_miss": 0.5}
    found = rates(lambda *_: " not found.")
    assert found == {"correct": 0.5, "retrieval": 0, "hallucination": 0, "false_refusal": 1, "near_miss": 0}


@pytest.mark.parametrize(
    ("answer", "text", "scores"),
    [
        ("123", " 123. 456", {"correct": 1, "retrieval": 1, "false_refusal": 0, "near_miss": 0}),
        ("123", " 1234", {"correct": 0, "retrieval": 0, "false_refusal": 0, "near_miss": 0}),
        ("123", " 77.", {"correct": 0, "retrieval": 0, "false_refusal": 0, "near_miss": 1}),
        ("123", " Not found. 123", {"correct": 0, "retrieval": 0, "false_refusal": 1, "near_miss": 0}),
        ("123", "", {"correct": 0, "retrieval": 0, "false_refusal": 0, "near_miss": 0}),
        ("123", "\n fox\n123", {"correct": 0, "retrieval": 0, "false_refusal": 0, "near_miss": 0}),
        ("not found", " not found.", {"correct": 1, "hallucination": 0, "near_miss": 0}),
        ("not found", " 5", {"correct": 0, "hallucination": 1, "near_miss": 0}),
        ("not found", " 77", {"correct": 0, "hallucination": 1, "near_miss": 1}),
        ("not found", " fox", {"correct": 0, "hallucination": 0, "near_miss": 0}),
    ],
)
def test_scores_of_answers(answer, text, scores):
    assert score(Prompt([], answer, 0, 0, near=("77", "88")), text) == scores


@pytest.mark.parametrize("haystack", ["noise", "words"])
@pytest.mark.parametrize(("length", "needles", "questions"), [(192, 6, 2), (1000, 6, 6), (192, 1, 1), (192, 3, 3)])
def test_keys_are_where_they_are_said_to_be(haystack, length, needles, questions):
    lengths = set()
    for index in range(20):
        asked = key_questions(TOKENIZER, length, haystack, needles, questions, questions, 5, index)
        text = TOKENIZER.decode(asked.haystack.tolist())
        numbers = dict(NEEDLE.findall(text))
        assert len(numbers) == len(set(numbers.values())) == needles
        assert len(asked.present) == len(asked.absent) == questions
        for question in (*asked.present, *asked.absent):
            key = ASKED.search(TOKENIZER.decode(question.ids.tolist())).group(1)
            assert question.value == numbers.get(key)
            sharing = {n for other, n in numbers.items() if other != key and set(other.split()) & set(key.split())}
            assert set(question.near) == sharing
            assert sharing or (question.value and needles % 2), "another key differs by a word"
        assert all(q.value for q in asked.present) and not any(q.value for q in asked.absent)
        lengths.add(len(asked.haystack) + max(len(q.ids) for q in (*asked.present, *asked.absent)))
    assert lengths == {length}


def test_prompts_of_a_haystack_begin_alike_and_do_not_depend_on_the_rest():
    task = hallucination_task(MODEL, TOKENIZER, CONFIG)
    present, absent = task.cells[:2]
    ids = [task.prompt(cell, sample).ids for cell in (present, absent) for sample in range(4)]
    of = [task.haystack(cell, sample) for cell in (present, absent) for sample in range(4)]
    assert [haystack - of[0] for haystack in of] == [0, 0, 1, 1] * 2
    heads = [tuple(row[:150]) for row in ids]
    assert [heads.index(row) for row in heads] == [0, 0, 2, 2] * 2
    assert len({tuple(row) for row in ids}) == 8
    more = hallucination_task(MODEL, TOKENIZER, dataclasses.replace(CONFIG, samples=50, lengths=[192]))
    assert [more.prompt(cell, sample).ids for cell in (present, absent) for sample in range(4)] == ids


def test_a_random_model_end_to_end(tmp_path, capsys):
    run = Run(tmp_path, MODEL, init_params(MODEL, 0), TOKENIZER, step=1, trained_lengths=())
    task = hallucination_task(MODEL, TOKENIZER, dataclasses.replace(CONFIG, samples=4, lengths=[192]))
    results = evaluate(run, task, tmp_path / "eval")
    whole = RealGenerator(MODEL, run.params)
    for cell in results.cells:
        answers = []
        for sample in range(4):
            prompt = task.prompt(cell.params, sample)
            new = whole.generate([prompt.ids], max_new_tokens=10, eos_id=TOKENIZER.eos_id)[0]
            answers.append(score(prompt, TOKENIZER.decode(new)))
        assert {name: tuple(answer[name] for answer in answers) for name in answers[0]} == cell.scores
    out = capsys.readouterr().out
    assert "false refusal" in out and "hallucination" in out and (tmp_path / "eval" / "hallucination.png").is_file()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"lengths": [80]}, UsageError, r"has 80, which do not hold 6 needles and a question: these take \d+ .* fewer"),
        ({"lengths": [192, 503]}, InputError, r"eval.lengths has 503, .* longest prompt is 502"),
        ({"needles": 600}, UsageError, r"602 keys that differ are more than there are words for"),
    ],
)
def test_what_cannot_be_asked(changes, error, message):
    with pytest.raises(error, match=message):
        hallucination_task(MODEL, TOKENIZER, dataclasses.replace(CONFIG, **changes))


def test_keys_that_cannot_be():
    with pytest.raises(UsageError, match=r"eval\.questions=7 is more than eval\.needles=6"):
        dataclasses.replace(CONFIG, questions=7)
    with pytest.raises(UsageError, match=r"eval\.haystack must be one of"):
        dataclasses.replace(CONFIG, haystack="hay")
