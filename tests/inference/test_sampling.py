"""Sampling against transformers' logits processors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax.errors import InputError
from mla_jax.inference.sampling import SamplingParams, sample

torch = pytest.importorskip("torch")
logits_process = pytest.importorskip("transformers.generation.logits_process")

VOCABULARY = 50
LOGITS = np.random.default_rng(0).normal(0, 2, (3, VOCABULARY)).astype(np.float32)
PROMPTS = np.random.default_rng(1).integers(0, VOCABULARY, (3, 8))


def processed(sampling):
    """The logits after transformers' processors, in its order."""
    processors = []
    if sampling.repetition_penalty != 1:
        processors.append(logits_process.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature:
        processors.append(logits_process.TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            processors.append(logits_process.TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            processors.append(logits_process.TopPLogitsWarper(sampling.top_p))
        if sampling.min_p:
            processors.append(logits_process.MinPLogitsWarper(sampling.min_p))
    scores = torch.from_numpy(LOGITS.copy())
    for processor in processors:
        scores = processor(torch.from_numpy(PROMPTS), scores)
    return scores.numpy()


def seen():
    seen_BX = np.zeros(LOGITS.shape, bool)
    np.put_along_axis(seen_BX, PROMPTS, True, axis=1)
    return jnp.asarray(seen_BX)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 1.5, "top_k": 5},
        {"temperature": 1.5, "top_k": 1000},
        {"temperature": 1.5, "top_p": 0.8},
        {"temperature": 1.0, "top_p": 1e-6},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.7},
    ],
)
def test_draws_follow_the_probabilities_of_transformers(options):
    sampling = SamplingParams(**options)
    expected = torch.softmax(torch.from_numpy(processed(sampling)), -1).numpy()
    n = 20_000
    draw = jax.jit(jax.vmap(lambda key: sample(sampling.plan, sampling.arrays(), jnp.asarray(LOGITS), seen(), key)))
    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), n)))
    for row in range(len(LOGITS)):
        share = np.bincount(drawn[:, row], minlength=VOCABULARY) / n
        assert np.all(share[expected[row] == 0] == 0), "a token that is filtered out was drawn"
        spread = np.sqrt(expected[row] * (1 - expected[row]) / n)
        assert np.all(np.abs(share - expected[row]) <= 5 * spread + 1e-9)


@pytest.mark.parametrize("penalty", [1.0, 1.8, 0.6])
def test_greedy_choice_with_the_penalty_is_that_of_transformers(penalty):
    sampling = SamplingParams(repetition_penalty=penalty)
    got = sample(sampling.plan, sampling.arrays(), jnp.asarray(LOGITS), seen(), jax.random.key(0))
    np.testing.assert_array_equal(got, processed(sampling).argmax(-1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"top_k": 2**31}, "top_k must be 0"),
        ({"seed": 2**63}, "seed must be 0"),
        ({"top_p": 0.9}, "set a temperature above 0"),
        ({"min_p": 0.1}, "set a temperature above 0"),
        ({"top_k": 5}, "set a temperature above 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1, got 1.1"),
        ({"min_p": 2.0}, "min_p must be from 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
    ],
)
def test_what_makes_no_sense_is_named(options, message):
    with pytest.raises(InputError, match=message):
        SamplingParams(**options)
