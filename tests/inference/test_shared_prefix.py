"""Many questions about one text: the same answers as prompts read whole, and the text is read once."""

import numpy as np
import pytest

from mla_jax.inference.generator import Generator
from mla_jax.inference.shared_prefix import common_prefix, generate_sharing_prefix
from mla_jax.model.transformer import init_params
from tiny import MODEL

rng = np.random.default_rng(0)
TEXT = rng.integers(3, MODEL.vocab_size, 90).tolist()
QUESTIONS = [[5, 6], [5, 7, 8], [9], [5, 6], [5, 6, 10, 11, 12]]
PROMPTS = [TEXT + question for question in QUESTIONS]


@pytest.fixture(scope="module")
def generator():
    return Generator(MODEL, init_params(MODEL, seed=0))


@pytest.fixture(scope="module")
def whole(generator):
    return [generator.generate([prompt], max_new_tokens=6)[0] for prompt in PROMPTS]


@pytest.fixture
def read(generator, monkeypatch):
    """Tokens that went through prefill, of all rows together."""
    counts = []
    prefill = generator._prefill

    def counted(session, prompts, hidden_states=False):
        counts.append(sum(map(len, prompts)) - sum(map(len, session.tokens)))
        return prefill(session, prompts, hidden_states)

    monkeypatch.setattr(generator, "_prefill", counted)
    return counts


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_answers_are_those_of_prompts_read_whole(generator, whole, read, batch_size):
    assert generate_sharing_prefix(generator, PROMPTS, max_new_tokens=6, batch_size=batch_size) == whole
    assert len(TEXT) <= sum(read) < len(TEXT) + sum(map(len, QUESTIONS)), "the text is read once"


def test_one_at_a_time_where_no_copy_fits(generator, whole, read, monkeypatch):
    monkeypatch.setattr(generator, "most_copies", lambda *_: 0)
    monkeypatch.setattr(generator, "fork", lambda *_: pytest.fail("copied"))
    assert generate_sharing_prefix(generator, PROMPTS, max_new_tokens=6) == whole
    assert sum(read) < 2 * len(TEXT)


@pytest.mark.parametrize(
    "prompts", [[], PROMPTS[:1], [PROMPTS[0]] * 3, [[5, 6, 7], [8, 9]], [TEXT, [*TEXT, 5], TEXT[:40]], [[5], [5, 6]]]
)
def test_prompts_that_are_few_equal_or_nothing_alike(generator, prompts):
    expected = [generator.generate([prompt], max_new_tokens=4)[0] for prompt in prompts]
    assert generate_sharing_prefix(generator, prompts, max_new_tokens=4) == expected


def test_common_prefix():
    assert [common_prefix(p) for p in ([[1, 2, 3], [1, 2, 4]], [[1, 2], [1, 2, 3]], [[1], [2]], [[1, 2]])] == [
        2,
        2,
        0,
        2,
    ]
