"""HashHop: the public format, chains that lead where the answers say, scores, and what cannot be asked."""

import dataclasses
import re

import numpy as np
import pytest

from mla_jax.config import HashHopConfig
from mla_jax.data.needle.hashhop import hash_chains
from mla_jax.data.tokenizer import load_tokenizer
from mla_jax.errors import InputError, UsageError
from mla_jax.evals.hashhop import hashhop_task, score
from mla_jax.evals.task import Prompt
from needle_tokenizers import TOKENIZERS
from tiny import MODEL

TOKENIZER = load_tokenizer("needle-bpe")
LARGE = dataclasses.replace(MODEL, max_position_embeddings=1 << 20)
CONFIG = HashHopConfig(lengths=[800, 1500], hops=[1, 2, 4], samples=6, questions=3, seed=5)
LINE = re.compile(r"([A-Za-z]+) = ('?)([A-Za-z]+)\2")


def follow(text: str, first: str) -> list[str]:
    """All hashes behind one, as a reader of the lines finds them."""
    lines = {match[1]: (match[3], match[2]) for match in map(LINE.fullmatch, text.split("\nCOMPLETION")[0].split("\n"))}
    found, quote = [], ""
    while not quote:
        first, quote = lines[first]
        found.append(first)
    return found


@pytest.mark.parametrize("hops", [1, 2, 3, 4])
@pytest.mark.parametrize("thought", [False, True])
def test_the_format_is_magics(hops, thought):
    made = hash_chains(np.random.default_rng(0), 5, hops, 16, thought)
    listed, _, rest = made.text.partition("\nCOMPLETION:\n")
    assert rest == f"Hops={hops}\n\nCoT={thought}\n\n"
    lines = listed.split("\n")
    assert len(lines) == 5 * hops and all(re.fullmatch(r"[A-Za-z]{16} = ('?)[A-Za-z]{16}\1", line) for line in lines)
    assert sum("'" in line for line in lines) == 5, "quotes end a chain"
    assert len({name for line in lines for name in re.findall("[A-Za-z]{16}", line)}) == 5 * (hops + 1)
    for chain in range(5):
        first = made.chains[chain][0]
        hashes = follow(made.text, first)
        assert made.question(chain) == f"{first} =" and len(hashes) == hops
        assert made.answer(chain) == (" = ".join(hashes) if thought else hashes[-1])


def test_lines_are_shuffled_and_short_hashes_differ():
    made = hash_chains(np.random.default_rng(0), 500, 2, letters=2)
    assert len({name for chain in made.chains for name in chain}) == 1500
    text = f"\n{made.text}"
    later = sum(text.index(f"\n{chain[0]} =") > text.index(f"\n{chain[1]} =") for chain in made.chains)
    assert 150 < later < 350


@pytest.mark.parametrize(
    ("answer", "text", "correct", "near_miss"),
    [
        ("abC", " 'abC'\nx", 1, 0),
        ("abC", "abC", 1, 0),
        ("abC", " 'abc'", 0, 0),
        ("abC", " 'abCd'", 0, 0),
        ("abC", " 'mid'", 0, 1),
        ("abC", " 'mid = abC'", 0, 0),
        ("mid = abC", " 'mid = abC'", 1, 0),
        ("mid = abC", " 'abC'", 0, 0),
        ("abC", "", 0, 0),
        ("abC", "\n\n", 0, 0),
    ],
)
def test_scores_of_answers(answer, text, correct, near_miss):
    assert score(Prompt([], answer, 0, 0, near=("mid",)), text) == {"correct": correct, "near_miss": near_miss}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_prompts_are_what_the_tokenizer_writes_and_fill_the_length(name):
    tokenizer = TOKENIZERS[name]
    task = hashhop_task(LARGE, tokenizer, dataclasses.replace(CONFIG, chain_of_thought=True))
    for cell in task.cells:
        prompts = [task.prompt(cell, sample) for sample in range(6)]
        for prompt in prompts:
            bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
            text = tokenizer.decode(prompt.ids)
            assert bos + tokenizer.encode(text) == prompt.ids
            assert cell["length"] - 60 * cell["hops"] < len(prompt.ids) <= cell["length"]
            assert text.endswith(f"CoT=True\n\n{prompt.question}") and f"\nHops={cell['hops']}\n" in text
            hashes = follow(text, prompt.question.removesuffix(" ="))
            assert prompt.answer == " = ".join(hashes) and prompt.near == tuple(hashes[:-1])
            answer = tokenizer.encode(text + f" '{prompt.answer}'")[len(prompt.ids) - len(bos) :]
            assert len(answer) <= task.max_new_tokens(cell)
        of = [task.haystack(cell, sample) - task.haystack(cell, 0) for sample in range(6)]
        assert of == [0, 0, 0, 1, 1, 1]
        assert len({prompt.question for prompt in prompts}) == 6


def test_new_tokens_suffice_for_an_answer_in_quotes():
    for thought, hops in ((False, 3), (True, 1), (True, 3)):
        task = hashhop_task(
            LARGE, load_tokenizer("bytes"), dataclasses.replace(CONFIG, hops=[hops], chain_of_thought=thought)
        )
        cell = task.cells[0]
        assert task.max_new_tokens(cell) == len(f" '{task.prompt(cell, 0).answer}'")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"lengths": [300]},
            UsageError,
            r"eval.lengths has 300, but 3 chains of 4 hops and a question take about",
        ),
        ({"lengths": [800, 1 << 20]}, InputError, r"eval.lengths has 1048576, .* 19 new tokens the longest prompt is"),
        ({"hops": [0]}, UsageError, r"eval.hops must be in \[1, 255\], got \[0\]"),
        ({"hops": []}, UsageError, r"eval.hops needs at least one number"),
        ({"hops": [1, 1]}, UsageError, r"eval.hops must not repeat"),
        ({"questions": 0}, UsageError, r"eval.questions must be at least 1"),
        ({"hash_length": 3}, UsageError, r"eval.hash_length must be at least 4, got 3"),
    ],
)
def test_what_cannot_be_asked(changes, error, message):
    with pytest.raises(error, match=message):
        hashhop_task(LARGE, TOKENIZER, dataclasses.replace(CONFIG, **changes))
