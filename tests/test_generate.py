"""Generation through the cache equals asking the whole model for one token after another."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax import generate as generate_module
from mla_jax.errors import InputError
from mla_jax.generate import generate
from mla_jax.model.transformer import bind, init_params
from tiny import MODEL

CONFIG = dataclasses.replace(MODEL, initializer_range=0.5, tie_word_embeddings=False, max_position_embeddings=200)
PARAMS = init_params(CONFIG, 0)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, CONFIG.vocab_size, n).tolist() for n in (1, 150, 2, 64, 65)]
NEW = 12


@functools.cache
def one_after_another():
    """Greedy continuations from the whole forward pass, padded to one length so that it compiles once."""
    forward = jax.jit(lambda tokens: bind(CONFIG, PARAMS).logits(bind(CONFIG, PARAMS)(tokens)))
    rows = np.zeros((len(PROMPTS), 170), np.int32)
    for row, prompt in zip(rows, PROMPTS, strict=True):
        row[: len(prompt)] = prompt
    for i in range(NEW):
        best = np.argmax(forward(rows), -1)
        for row, prompt, choice in zip(rows, PROMPTS, best, strict=True):
            row[len(prompt) + i] = choice[len(prompt) + i - 1]
    return [row[len(p) : len(p) + NEW].tolist() for row, p in zip(rows, PROMPTS, strict=True)]


def test_greedy_tokens_of_a_ragged_batch_are_those_of_the_whole_model():
    expected = one_after_another()
    assert len({token for row in expected for token in row}) > 20, "the test would not notice much"
    assert generate(CONFIG, PARAMS, PROMPTS, max_new_tokens=NEW) == expected


@pytest.mark.parametrize("chunk", [1, 64, 100])
def test_the_prefill_chunk_changes_nothing(chunk):
    assert generate(CONFIG, PARAMS, PROMPTS, max_new_tokens=NEW, prefill_chunk=chunk) == one_after_another()


def test_a_row_ends_before_eos_and_the_others_go_on():
    expected = one_after_another()
    eos = expected[1][4]
    cut = [row[: row.index(eos)] if eos in row else row for row in expected]
    assert generate(CONFIG, PARAMS, PROMPTS, max_new_tokens=NEW, eos_id=eos) == cut
    assert generate(CONFIG, PARAMS, PROMPTS[1:2], max_new_tokens=NEW, eos_id=expected[1][0]) == [[]]


def test_one_compiled_loop_serves_all_tokens_seeds_and_eos(monkeypatch):
    generate(CONFIG, PARAMS, PROMPTS[3:4], max_new_tokens=NEW)
    monkeypatch.delattr(generate_module.transformer, "bind")  # nothing can be traced any more
    assert generate(CONFIG, PARAMS, PROMPTS[3:4], max_new_tokens=NEW, eos_id=3, seed=5)
    with pytest.raises(AttributeError):
        generate(CONFIG, PARAMS, PROMPTS[3:4], max_new_tokens=NEW + 1)


def test_samples_follow_the_softmax_at_the_temperature():
    n, temperature = 4000, 1.5
    first = np.ravel(generate(CONFIG, PARAMS, [[5]] * n, max_new_tokens=1, temperature=temperature, seed=1))
    model = bind(CONFIG, PARAMS)
    probabilities = np.asarray(jax.nn.softmax(model.logits(model(jnp.array([[5]])))[0, 0] / temperature))
    top = np.argsort(probabilities)[-5:]
    expected = probabilities[top]
    assert expected.max() > 0.02
    spread = np.sqrt(expected * (1 - expected) / n)
    np.testing.assert_array_less(np.abs([np.mean(first == t) for t in top] - expected), 4 * spread)


def test_samples_are_a_function_of_the_seed():
    sample = functools.partial(generate, CONFIG, PARAMS, PROMPTS, max_new_tokens=NEW, temperature=1.0)
    assert sample(seed=1) == sample(seed=1) != sample(seed=2)


def test_memory_of_prefill_does_not_grow_with_the_cache():
    def temporaries(capacity):
        cache = jax.eval_shape(lambda: generate_module.init_cache(CONFIG, 2, capacity))
        lowered = generate_module._prefill.lower(CONFIG, PARAMS, jnp.zeros((2, 64), int), cache, jnp.zeros(2, int))
        analysis = lowered.compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    assert temporaries(65536) == temporaries(16384)


def test_nothing_to_do_gives_nothing():
    assert generate(CONFIG, PARAMS, [], max_new_tokens=3) == []


def test_a_prompt_may_fill_the_model_to_the_last_position():
    prompt = [3] * (CONFIG.max_position_embeddings - 2)
    assert len(generate(CONFIG, PARAMS, [prompt], max_new_tokens=2)[0]) == 2


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1] * 198], {}, "prompt 0 of 198 tokens and 3 new ones exceed .* max_position_embeddings 200"),
        ([[1, 512]], {}, "token 512, outside the vocabulary of 512"),
        ([[1, -1]], {}, "token -1, outside the vocabulary"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ([[1]], {"prefill_chunk": 0}, "prefill_chunk must be at least 1"),
        ([[1]], {"temperature": -1.0}, "temperature must be 0"),
        ([[1]], {"temperature": float("nan")}, "temperature must be 0"),
    ],
)
def test_bad_input_is_named(prompts, options, message):
    with pytest.raises(InputError, match=message):
        generate(CONFIG, PARAMS, prompts, **{"max_new_tokens": 3, **options})
