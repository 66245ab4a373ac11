import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from mla_jax.losses.cross_entropy import chunked_cross_entropy
from mla_jax.losses.log_probs import target_log_probs


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    h = rng.normal(size=(2, 13, 8)).astype(np.float32)
    w = rng.normal(size=(8, 11)).astype(np.float32)
    targets = rng.integers(0, 11, (2, 13)).astype(np.int32)
    weights = rng.choice([0.0, 0.1, 1.0], (2, 13)).astype(np.float32)
    answers = rng.random((2, 13)) < 0.5
    return h, w, targets, weights, answers


def _oracle(h, w, targets, weights, answers):
    """Float64, all logits at once."""
    logits = h.astype(np.float64) @ w.astype(np.float64)
    nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return (nll * weights).sum(), weights.sum(), (answers & (logits.argmax(-1) == targets)).sum(), answers.sum()


@pytest.mark.parametrize("chunk", [1, 4, 12, 13, 64])
def test_sums_equal_the_float64_oracle_for_every_chunk(case, chunk):
    h, w, *targets = map(jnp.asarray, case)
    sums = chunked_cross_entropy(w, h, *targets, chunk)
    np.testing.assert_allclose(sums, _oracle(*case), rtol=1e-5)


def test_chunks_leave_gradients_unchanged(case):
    h, w, *targets = map(jnp.asarray, case)

    def loss(w, h, chunk):
        return chunked_cross_entropy(w, h, *targets, chunk).loss

    whole = jax.grad(loss, (0, 1))(w, h, 64)
    chunked = jax.grad(loss, (0, 1))(w, h, 4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), whole, chunked)


def test_the_logits_of_a_whole_sequence_never_exist(case):
    h, w, *targets = map(jnp.asarray, case)
    jaxpr = jax.make_jaxpr(jax.grad(lambda h: chunked_cross_entropy(w, h, *targets, 4).loss))(h)
    assert "2,13,11]" not in str(jaxpr) and "2,16,11]" not in str(jaxpr) and "4,2,4,11]" not in str(jaxpr)
    assert "2,4,11]" in str(jaxpr)


def test_log_probs_of_targets_are_scipys_and_every_most_likely_token_is_greedy():
    logits = np.array([[[3.0, 1.0, 3.0], [1e4, 0.0, -1e4]]], np.float32)
    for targets, greedy in (([2, 0], [True, True]), ([0, 1], [True, False]), ([1, 2], [False, False])):
        found = target_log_probs(jnp.asarray(logits), jnp.asarray([targets]))
        expected = log_softmax(logits.astype(np.float64), axis=-1)[0, [0, 1], targets]
        np.testing.assert_allclose(found.log_probs_Bt[0], expected, rtol=1e-6)
        np.testing.assert_allclose(found.log_sum_exp_Bt[0], [3 + np.log(2 + np.exp(-2)), 1e4], rtol=1e-6)
        assert found.is_greedy_Bt[0].tolist() == greedy
