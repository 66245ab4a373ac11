"""Training tasks in the formats of evaluations: answers that follow from the text, lengths, the evaluation's form."""

import dataclasses
import pickle
import re

import numpy as np
import pytest

from mla_jax.config import HashHopConfig, NeedleDataConfig, NeedlePairsConfig, RulerConfig
from mla_jax.data.needle.generator import Example, NeedleGenerator, Purpose, make_rng
from mla_jax.errors import UsageError
from mla_jax.evals.hashhop import hashhop_task
from mla_jax.evals.ruler import ruler_task
from needle_tokenizers import TOKENIZERS
from tiny import MODEL

LARGE = dataclasses.replace(MODEL, max_position_embeddings=1 << 20)
KINDS = pytest.mark.parametrize("task", ["hashhop", "ruler_vt"])
WRITERS = pytest.mark.parametrize("tokenizer", ["bytes", "needle-bpe", "foreign", "llama", "gpt4"])


def _generator(task: str, tokenizer: str = "bytes") -> NeedleGenerator:
    config = NeedleDataConfig(tokenizer=tokenizer, tasks={task: 1.0}, haystacks={"noise": 1.0})
    return NeedleGenerator(config, TOKENIZERS[tokenizer])


def _shortest(generator: NeedleGenerator) -> int:
    with pytest.raises(UsageError, match="shortest possible") as error:
        generator.check_length(2)
    return int(str(error.value).split()[-1])


def _examples(generator: NeedleGenerator, length: int, count: int) -> list[Example]:
    return [generator.example(make_rng(3, Purpose.EXAMPLE, i), length) for i in range(count)]


def _text(tokenizer: str, ids: np.ndarray) -> str:
    return TOKENIZERS[tokenizer].decode(ids.tolist())


def _expected(text: str) -> list[str]:
    """The right answers to all questions of an example, as a reader of its lines finds them."""
    if "COMPLETION" in text:
        lines, asked = text.split("\nCOMPLETION")
        leads = {a: (b, quote) for a, quote, b in re.findall(r"^([A-Za-z]{16}) = ('?)([A-Za-z]{16})'?$", lines, re.M)}
        answers = []
        for first in re.findall(r"^([A-Za-z]{16}) =", asked, re.M):
            chain, quote = [first], ""
            while not quote:
                found, quote = leads[chain[-1]]
                chain.append(found)
            answers.append(" = ".join(chain[1:]) if "CoT=True" in asked else chain[-1])
        return answers
    question = text.rsplit("\n\n", 1)[1]  # behind it are the lines of the haystack
    haystack, (value,) = question, re.findall(r"assigned the value (\d+) in the text", question)
    found, source = [], value
    while match := re.search(rf"VAR ([A-Z]{{5}}) = (?:VAR )?{source}\b", haystack):
        found.append(source := match[1])
    return [" ".join(found)]


@WRITERS
@KINDS
def test_answers_follow_from_the_text_and_are_what_is_learned(task, tokenizer):
    generator = _generator(task, tokenizer)
    for length in (_shortest(generator), 2500):
        if length < _shortest(generator):
            continue
        for example in _examples(generator, length, 12):
            assert [len(part) for part in example] == [length] * 3
            text, learned = _text(tokenizer, example.tokens), _text(tokenizer, example.tokens[example.learned])
            answers = _expected(text)
            form = " '{}'\n" if task == "hashhop" else "{}\n"
            assert re.sub(r"\s+", "", learned) == re.sub(r"\s+", "", "".join(form.format(each) for each in answers))
            first = _text(tokenizer, example.tokens[example.answers])
            assert re.sub(r"\s+", "", first) == answers[0].replace(" ", "")
            assert example.tokens[np.flatnonzero(example.learned)[-1]] == TOKENIZERS[tokenizer].eos_id


def _skeleton(text: str) -> str:
    """A text without what is drawn: names, numbers, how many lines."""
    text = re.sub(r"[A-Za-z]{16}", "HASH", text).replace("HASH = 'HASH'", "HASH = HASH")
    text = re.sub(r"\b[A-Z]{3}\b(?<!VAR)|\b[A-Z]{5}\b", "NAME", text)
    text = re.sub(r"(?m)^.*The grass is green.*\n", "", text)
    return re.sub(r"(HASH = HASH\n)+", "LINES\n", re.sub(r"\d+", "0", text))


@KINDS
def test_the_form_is_the_evaluations(task):
    tokenizer = TOKENIZERS["bytes"]
    if task == "hashhop":
        config = HashHopConfig(lengths=[2500], hops=[2], samples=1, questions=1, seed=1)
        configs = (dataclasses.replace(config, chain_of_thought=whole) for whole in (False, True))
        evaluations = [hashhop_task(LARGE, tokenizer, config) for config in configs]
    else:
        evaluations = [ruler_task(LARGE, tokenizer, RulerConfig(lengths=[2500], tasks=["vt"], samples=1, seed=1))]
    asked = {_skeleton(tokenizer.decode(each.prompt(each.cells[0], 0).ids)).strip() for each in evaluations}
    examples = _examples(_generator(task), 2500, 12)
    firsts = (int(np.argmax(example.learned)) for example in examples)
    forms = [example.tokens[:first] for example, first in zip(examples, firsts, strict=True)]
    assert {_skeleton(_text("bytes", form)).strip() for form in forms} == asked


def test_rows_too_short_for_rulers_example_have_its_question_alone():
    (short,), (long,) = (_examples(_generator("ruler_vt"), length, 1) for length in (1024, 2500))
    alone, whole = (_skeleton(_text("bytes", each.tokens[: int(np.argmax(each.learned))])) for each in (short, long))
    assert whole.count("Memorize") == 2 and alone.count("Memorize") == 1
    assert whole.endswith(alone)


@KINDS
def test_nearly_all_of_a_length_is_text(task):
    """So that distances are what they are in evaluations; <eos> fills the rest."""
    for example in _examples(_generator(task), 6000, 8):
        last = int(np.flatnonzero(example.learned)[-1])
        assert last > 5600 and set(example.tokens[last:].tolist()) == {TOKENIZERS["bytes"].eos_id}


@KINDS
def test_examples_are_pure_functions_of_their_generator(task):
    """In worker processes too, which get a pickled one, whatever was made before."""
    one = _generator(task)
    other = pickle.loads(pickle.dumps(one))
    _examples(other, 3000, 3)
    for a, b in zip(_examples(one, 2500, 4), _examples(other, 2500, 4), strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)


def test_other_tasks_are_drawn_where_a_length_is_too_short():
    config = NeedleDataConfig(tokenizer="bytes", tasks={"ruler_vt": 1.0, "passkey": 0.01}, haystacks={"noise": 1.0})
    generator = NeedleGenerator(config, TOKENIZERS["bytes"])
    assert "pass key" in _text("bytes", _examples(generator, 500, 1)[0].tokens)


@KINDS
def test_preference_pairs_have_no_such_questions(task):
    with pytest.raises(UsageError, match=f"data.tasks key must be one of passkey, .* absent_key; got '{task}'"):
        NeedlePairsConfig(tokenizer="bytes", tasks={task: 1.0}, haystacks={"noise": 1.0}, rejected={"near_key": 1.0})
