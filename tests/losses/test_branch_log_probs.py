"""Statistics of the tokens of branches, from logits that exist for branches only and for a chunk at a time."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from branch_rows import branch_rows, random_prompt
from mla_jax.losses.branch_log_probs import branch_log_probs
from mla_jax.model.branches import Branches
from mla_jax.model.transformer import bind, init_params
from tiny import MODEL

CONFIG = dataclasses.replace(MODEL, initializer_range=0.3)
LENGTH, SIZE = 40, 12
ROWS = branch_rows([[random_prompt(np.random.default_rng(0), 20, 7, 4)]] * 2, LENGTH, SIZE)


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, 0)


@jax.jit
def all_logits(params):
    model = bind(CONFIG, params)
    branches = Branches(ROWS["prompts"], ROWS["branches"], SIZE, False)
    return model.logits(model(ROWS["tokens"], ROWS["positions"], branches=branches)[:, -SIZE:])


@pytest.mark.parametrize("chunk", [1, 5, 12, 64])
def test_statistics_are_those_of_all_logits(params, chunk):
    targets, logits = ROWS["targets"][:, -SIZE:].copy(), np.asarray(all_logits(params), np.float64)
    targets[0, 0] = logits[0, 0].argmax()
    rows = {**ROWS, "targets": np.concatenate([ROWS["targets"][:, :-SIZE], targets], axis=1)}
    found = jax.jit(lambda params: branch_log_probs(bind(CONFIG, params), rows, SIZE, False, chunk))(params)
    log_probs = log_softmax(logits, axis=-1)
    expected = np.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(found.log_probs_BR, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found.is_greedy_BR, logits.argmax(-1) == targets)
    np.testing.assert_allclose(found.entropy_BR, -(np.exp(log_probs) * log_probs).sum(-1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.mean_logit_BR, logits.mean(-1), rtol=1e-4, atol=1e-5)
    assert found.is_greedy_BR.any() and not found.is_greedy_BR.all()


def test_only_log_probs_have_gradients(params):
    @jax.jit
    def grads(params, of):
        def total(params):
            found = branch_log_probs(bind(CONFIG, params), ROWS, SIZE, False, 5)
            return sum(jnp.sum(x) * weight for x, weight in zip(found, of, strict=True))

        return jax.grad(total)(params)

    assert all(np.any(x) for x in jax.tree.leaves(grads(params, jnp.array([1.0, 0, 0, 0]))))
    assert not any(np.any(x) for x in jax.tree.leaves(grads(params, jnp.array([0, 1.0, 1.0, 1.0]))))


def test_logits_exist_for_a_chunk_of_the_branch_region_only(params):
    """Also in the backward pass: nothing with the vocabulary as an axis is larger than a chunk's, or the table."""

    def loss(params):
        return jnp.sum(branch_log_probs(bind(CONFIG, params), ROWS, SIZE, False, 4).log_probs_BR)

    text = str(jax.make_jaxpr(jax.grad(loss))(params))
    shapes = {tuple(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", text)}
    with_vocabulary = {shape for shape in shapes if CONFIG.vocab_size in shape}
    assert (2, 4, CONFIG.vocab_size) in with_vocabulary
    table = CONFIG.vocab_size * CONFIG.hidden_size
    assert all(np.prod(shape) <= max(table, 2 * 4 * CONFIG.vocab_size) for shape in with_vocabulary)
