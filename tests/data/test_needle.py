"""Needle examples, checked by reading their text as a person would."""

import dataclasses
import re

import numpy as np
import pytest

from mla_jax.config import NeedleDataConfig, StageConfig
from mla_jax.data.needle.generator import NeedleGenerator, Purpose, make_rng, passkey_prompt
from mla_jax.data.pipeline import loss_weights, make_pipeline
from mla_jax.data.text_folder import read_texts
from mla_jax.errors import InputError, UsageError
from needle_tokenizers import SPACES_FIRST, TEXT, TOKENIZERS

TASKS = ("passkey", "single", "multi_key", "multi_value", "multi_query", "variable_tracking", "absent_key")
HAYSTACKS = ("noise", "words", "needles", "text")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.txt").write_text(TEXT)
    (folder / "sub").mkdir()
    (folder / "sub" / "b.MD").write_text("Second file. It has two sentences")
    (folder / "skipped.py").write_text("import this")
    return str(folder)


def _generator(folder, tokenizer="needle-bpe", tasks=("passkey",), haystacks=("noise",), **kwargs) -> NeedleGenerator:
    config = NeedleDataConfig(
        tokenizer=tokenizer,
        tasks=dict.fromkeys(tasks, 1.0),
        haystacks=dict.fromkeys(haystacks, 1.0),
        text_folder=folder,
        **kwargs,
    )
    return NeedleGenerator(config, TOKENIZERS[tokenizer])


def _shortest(generator: NeedleGenerator) -> int:
    with pytest.raises(UsageError, match="shortest possible") as error:
        generator.check_length(2)
    return int(str(error.value).split()[-1])


def _answers(text: str) -> dict[str, str]:
    """What each question of an example should be answered, from what its haystack says."""
    numbers: dict[str, list[str]] = {}
    for key, value in re.findall(r" One of the special magic numbers for ([a-z ]+) is: (\d{5})\.", text):
        numbers.setdefault(key, []).append(value)
    variables: dict[str, list[str]] = {}
    for name, source in re.findall(r" VAR ([a-z]+) = (VAR [a-z]+|\d{5})\.", text):
        chain = next((c for c in variables.values() if source == f"VAR {c[-1]}"), None)
        if chain is None:
            chain = variables[source] = []
        chain.append(name)
    expected = {}
    for line in text.split("\n")[1:]:
        if match := re.match(r"The special magic number for ([a-z ]+) is:", line):
            (expected[match[0]],) = numbers.get(match[1], ["not found"])
        elif match := re.match(r"The special magic numbers for ([a-z ,]+) are:", line):
            expected[match[0]] = ", ".join(value for key in match[1].split(", ") for value in numbers[key])
        elif match := re.match(r"The variables with value (\d+) are:", line):
            expected[match[0]] = ", ".join(variables[match[1]])
        elif match := re.match(r"What is the pass key\? The pass key is", line):
            (expected[match[0]],) = re.findall(
                r"^The pass key is (\d+)\. Remember it\. \1 is the pass key\.$", text, re.M
            )
    return expected


@pytest.mark.parametrize("haystack", HAYSTACKS)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_every_example_has_its_length_and_answers_what_it_says(folder, name, task, haystack):
    tokenizer = TOKENIZERS[name]
    generator = _generator(folder, name, [task], [haystack])
    shortest = _shortest(generator)
    for i, length in enumerate([shortest, shortest + 1, shortest + 2, shortest + 13, 2 * shortest, 1500]):
        tokens, learned, answers = generator.example(make_rng(0, Purpose.EXAMPLE, i), length)
        assert tokens.shape == learned.shape == answers.shape == (length,)
        assert tokens.dtype == np.int32 and learned.dtype == answers.dtype == bool
        assert tokens[-1] == tokenizer.eos_id and (tokens[0] == tokenizer.bos_id or tokenizer.bos_id is None)
        body = tokens[tokenizer.bos_id is not None : -1].tolist()
        text = tokenizer.decode(body)
        # There a text's ".\n" is one token, and an introduction's ".\n\n" if no sentence follows.
        if name != "gpt4" or (haystack != "text" and (task != "passkey" or "\n\n" not in text)):
            assert tokenizer.encode(text) == body
        expected = _answers(" " + text if name in SPACES_FIRST else text)
        assert expected
        for question, answer in expected.items():
            assert text.count(f"\n{question} {answer}.") == 1
        # Exactly the answers, full stops and end are learned; the answers themselves count.
        runs = np.split(tokens, np.flatnonzero(np.diff(learned)) + 1)
        said = sorted(tokenizer.decode(run).strip() for run in runs[1::2])
        assert said == sorted(f"{answer}." for answer in expected.values())
        assert not learned[0] and learned[-1] and not (answers & ~learned).any()
        counted = tokenizer.decode(tokens[answers]).replace(" ", "")
        first = min(expected, key=lambda question: text.index(f"\n{question}"))
        assert sorted(counted) == sorted("".join(re.findall("[a-z0-9]", expected[first])))
        assert all(tokenizer.decode([token]).strip(" ,.") for token in tokens[answers])


@pytest.mark.parametrize("name", [*SPACES_FIRST, "gpt4"])
def test_text_is_written_as_people_write_it(folder, name):
    """No space that nobody types, wherever pieces meet."""
    tokenizer = TOKENIZERS[name]
    for task in TASKS:
        generator = _generator(folder, name, [task], ["noise"] if task == "passkey" else ["noise", "words", "needles"])
        for i in range(5):
            text = tokenizer.decode(generator.example(make_rng(0, Purpose.EXAMPLE, i), 400).tokens)
            assert not re.search(r"  | [.,:?]| \n|\n |\n\n", text.lstrip()), text
    ids, key = passkey_prompt(tokenizer, 150, 0.5, seed=1, index=5)
    assert ids[1:] == tokenizer.encode(tokenizer.decode(ids))
    assert f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n" in tokenizer.decode(ids)


@pytest.mark.parametrize("task", TASKS)
def test_examples_depend_on_nothing_but_their_stream(folder, task):
    first, again = (_generator(folder, tasks=[task], haystacks=HAYSTACKS) for _ in range(2))
    examples = [first.example(make_rng(3, Purpose.EXAMPLE, i), 256)[0].tolist() for i in range(8)]
    assert [again.example(make_rng(3, Purpose.EXAMPLE, i), 256)[0].tolist() for i in (7, 2)] == [
        examples[7],
        examples[2],
    ]
    assert len({tuple(example) for example in examples}) == 8
    assert first.example(make_rng(4, Purpose.EXAMPLE, 0), 256)[0].tolist() != examples[0]


def test_streams_do_not_meet():
    draws = {
        tuple(make_rng(seed, purpose, *index).integers(2**63, size=2))
        for seed in (0, 1, -1)
        for purpose in Purpose
        for index in ((), (1,), (0, 1), (0, 0, 1), (1, 1, 1))
    }
    assert len(draws) == 3 * len(Purpose) * 5


def test_as_many_questions_as_wanted_and_fit(folder):
    generator = _generator(folder, tasks=["multi_key"], max_needles=20)
    tokenizer = TOKENIZERS["needle-bpe"]
    questions = {}
    for length in (37, 110, 2000):
        texts = [tokenizer.decode(generator.example(make_rng(0, Purpose.EXAMPLE, i), length).tokens) for i in range(60)]
        questions[length] = [text.count("\n") for text in texts]
        assert questions[length] == [text.count(" One of") for text in texts]
    assert set(questions[37]) == {1}
    assert set(questions[110]) == {1, 2, 3}
    assert min(questions[2000]) == 1 and max(questions[2000]) >= 18


@pytest.mark.parametrize("length", [96, 128, 256])
def test_what_is_counted_cannot_be_answered_by_elimination(folder, length):
    """A guesser that knows the numbers of the text and, of each answer before, that it is used up."""
    generator, tokenizer = (
        _generator(folder, tasks=["multi_key"], haystacks=["noise", "words"]),
        TOKENIZERS["needle-bpe"],
    )
    every, counted, chance = [], [], []
    for i in range(300):
        tokens, _, answers = generator.example(make_rng(0, Purpose.EXAMPLE, i), length)
        haystack, _, dialogue = tokenizer.decode(tokens).partition("\n")
        values, said = re.findall(r"\d{5}", haystack), re.findall(r"\d{5}", dialogue)
        assert sorted(values) == sorted(said), "all are asked about"
        guesses = [1 / (len(values) - before) for before in range(len(said))]
        every += guesses
        counts = tokenizer.decode(tokens[answers]).replace(" ", "")
        counted += [guess for guess, number in zip(guesses, said, strict=True) if number in counts]
        chance += [1 / len(values)]
    assert counted == chance
    assert np.mean(every) > np.mean(counted) + {96: 0.1, 128: 0.1, 256: 0.02}[length]


@pytest.mark.parametrize(("fraction", "near"), [(0.0, False), (1.0, True)])
def test_near_duplicate_keys_differ_by_one_word(folder, fraction, near):
    generator = _generator(folder, tasks=["multi_key"], near_duplicate_fraction=fraction)
    text = TOKENIZERS["needle-bpe"].decode(generator.example(make_rng(9, Purpose.EXAMPLE, 0), 200).tokens)
    keys = [tuple(key.split()) for key in re.findall(r"magic numbers for ([a-z ]+) is", text)]
    assert len(keys) == len(set(keys)) > 2
    neighbours = [sum((a == c) + (b == d) == 1 for c, d in keys) for a, b in keys]
    assert (min(neighbours) > 0) == near


def test_absent_keys_are_near_present_ones_and_not_everything_is_absent(folder):
    generator = _generator(folder, tasks=["absent_key"], haystacks=["needles"])
    answers = [
        _answers(TOKENIZERS["needle-bpe"].decode(generator.example(make_rng(0, Purpose.EXAMPLE, i), 800).tokens))
        for i in range(20)
    ]
    flat = [answer for expected in answers for answer in expected.values()]
    assert 0.3 < flat.count("not found") / len(flat) < 0.9


def test_tasks_that_do_not_fit_are_left_out_and_too_short_is_an_error(folder):
    generator = _generator(folder, tasks=["passkey", "single"])
    text = [
        TOKENIZERS["needle-bpe"].decode(generator.example(make_rng(0, Purpose.EXAMPLE, i), 40).tokens) for i in range(9)
    ]
    assert not any("pass key" in t for t in text)
    with pytest.raises(UsageError, match=r"36 tokens are too short .* passkey, single: .* needle-bpe is 37"):
        generator.example(make_rng(0, Purpose.EXAMPLE, 0), 36)


def test_weight_of_the_language_model_loss():
    """A share of each row, whatever its length and its number of answers; every answer token weighs 1."""
    data = NeedleDataConfig(tokenizer="bytes", tasks={"passkey": 1.0}, haystacks={"noise": 1.0})
    for share in (0.0, 0.1, 0.5, 0.99):
        shared = dataclasses.replace(data, lm_loss_weight=share)
        for length, rows in ((256, 8), (4096, 2), (131_072, 1)):
            stage = StageConfig(seq_len=length, batch_size=rows, steps=1, learning_rate=1.0)
            batch = next(make_pipeline(shared, TOKENIZERS["bytes"], [stage], 0, 0))
            answers, weights = batch["answers"], batch["weights"]
            assert (weights[answers] == 1).all() and not weights[:, -1].any()
            learned = weights == 1
            assert (learned.sum(axis=1) == answers.sum(axis=1) + 3).all()  # the space, the full stop and <eos>
            of_others = np.where(learned, 0, weights).sum(axis=1, dtype=np.float64)
            np.testing.assert_allclose(of_others / weights.sum(axis=1, dtype=np.float64), share, rtol=1e-4)


def test_a_row_without_answers_has_no_weight():
    answers = np.array([[False, True, True, False], [False] * 4, [True, True, True, False]])
    weights = loss_weights(answers, 0.2)
    np.testing.assert_allclose(weights, [[0.5, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 0]])


def test_needles_lie_anywhere(folder):
    generator = _generator(folder, tasks=["single"], haystacks=["words"])
    places = []
    for i in range(200):
        text = TOKENIZERS["needle-bpe"].decode(generator.example(make_rng(0, Purpose.EXAMPLE, i), 1000).tokens)
        places.append(text.index(" One of") / text.index("\n"))
    assert np.histogram(places, bins=4, range=(0, 1))[0].min() > 25


def test_text_windows_come_from_all_over(folder):
    generator = _generator(folder, tasks=["single"], haystacks=["text"])
    texts = [
        TOKENIZERS["needle-bpe"].decode(generator.example(make_rng(0, Purpose.EXAMPLE, i), 120).tokens)
        for i in range(50)
    ]
    for phrase in ("It was late.", "Nobody spoke!", "Was it over?", "日本語", "Second file."):
        assert any(phrase in text for text in texts), phrase
    assert not any("import this" in text for text in texts)


def test_a_byte_order_mark_in_a_text_folder_changes_nothing(tmp_path):
    for folder, mark in (("plain", b""), ("marked", b"\xef\xbb\xbf")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_bytes(mark + "Größe: one.".encode())
        (tmp_path / folder / "b.md").write_bytes(mark + b"Two.")
    (tmp_path / "marked" / "c.txt").write_bytes(b"\xef\xbb\xbf\n")  # without text
    assert read_texts(tmp_path / "marked") == read_texts(tmp_path / "plain") == ["Größe: one.", "Two."]


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (None, "is not a folder"),
        ({"a.py": b"text"}, "no .txt or .md file"),
        ({"a.txt": b" \n"}, "no .txt or .md file"),
        ({"a.txt": b"\xff\xfe\x00"}, "a.txt cannot be read as UTF-8"),
    ],
)
def test_a_text_folder_without_text_is_named(tmp_path, files, named):
    path = tmp_path / "texts"
    if files is not None:
        path.mkdir()
        for name, content in files.items():
            (path / name).write_bytes(content)
    with pytest.raises(InputError, match=named):
        _generator(str(path), haystacks=["text"])
