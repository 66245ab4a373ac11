"""Prompts that are texts: encoded in pieces as in one, sized to what fits, and refused where a tokenizer loses some."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_jax.data.needle import text_prompt
from mla_jax.data.needle.text_prompt import TextPrompt, encode_prompt, fitting_prompt, largest_haystack
from mla_jax.data.tokenizer import load_tokenizer
from mla_jax.errors import UsageError
from mla_jax.evals.text_prompts import require_writable
from needle_tokenizers import TOKENIZERS

TEXT = (
    "Below is:\nThe sun is yellow. Go back.\n\nVAR ABC = 12345\nVAR DEF = VAR ABC \n 'x'\n_y\n7. red\nred = 'owl'\n"
    * 40
)


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("piece", [1, 30, 1000])
def test_pieces_give_the_ids_of_the_whole_text(tokenizer, piece, monkeypatch):
    monkeypatch.setattr(text_prompt, "PIECE_CHARS", piece)
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for text in (TEXT, TEXT.strip(), "one line " * 50, ""):
        assert encode_prompt(tokenizer, text) == bos + tokenizer.encode(text)


BYTES = load_tokenizer("bytes")


def lines(rng: np.random.Generator, size: int) -> TextPrompt:
    """Lines of 10 to 19 bytes and a question of 20."""
    return TextPrompt("".join("x" * int(n) for n in rng.integers(10, 20, size=size)) + "?" * 20, ())


@given(st.integers(60, 5000), st.integers(0, 5))
def test_the_largest_haystack_fits_and_leaves_hardly_anything(tokens, seed):
    size = largest_haystack(BYTES, lines, lambda: np.random.default_rng(seed), tokens, 2)
    at, beyond = (len(encode_prompt(BYTES, lines(np.random.default_rng(seed), n).text)) for n in (size, size + 1))
    assert at <= tokens and (beyond > tokens or at >= 0.999 * tokens)


def test_a_haystack_that_does_not_fit_is_the_least():
    assert largest_haystack(BYTES, lines, lambda: np.random.default_rng(0), 10, 3) == 3


def test_few_prompts_are_encoded_to_find_the_size(monkeypatch):
    calls = []
    monkeypatch.setattr(text_prompt, "encode_prompt", lambda *each: calls.append(each) or encode_prompt(*each))
    assert largest_haystack(BYTES, lines, lambda: np.random.default_rng(0), 60_000, 1) > 3_500
    assert len(calls) < 20


def test_prompts_that_turn_out_longer_get_fewer_items():
    rng = np.random.default_rng(0)
    for _ in range(20):
        prompt, ids = fitting_prompt(BYTES, lines, rng, 500, 60, 2)
        assert len(ids) <= 500 and len(ids) == len(prompt.text) + 1
    with pytest.raises(UsageError, match=r"eval.lengths is too short: \d+ tokens are needed .* 30 are left"):
        fitting_prompt(BYTES, lines, rng, 30, 5, 2)


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_tokenizers_that_know_bytes_write_anything(tokenizer):
    require_writable(tokenizer, "Größe: 12,5 µm – jalapeño?\n日本語 'x'  y\tz", "eval.tasks")


def test_what_is_lost_is_named(monkeypatch):
    monkeypatch.setattr(type(BYTES), "decode", lambda self, ids: re.sub("[é?]", "", bytes(ids).decode()))
    with pytest.raises(UsageError, match=r"^eval.key: tokenizer bytes cannot write its prompts \(not 'café', for inst"):
        require_writable(BYTES, "a café or two?", "eval.key")
    require_writable(BYTES, "a cafe or\ntwo", "eval.key")
