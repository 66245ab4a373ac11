"""Chunked distillation against PyTorch's float64 cross-entropy and KL divergence, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mla_jax.losses.distillation import chunked_divergence

B, T, D, TEACHER_D, VOCAB = 2, 11, 8, 5, 37
RNG = np.random.default_rng(0)


def arrays():
    weights_BT = RNG.uniform(size=(B, T)).astype(np.float32) * (RNG.uniform(size=(B, T)) < 0.7)
    return (
        RNG.normal(size=(D, VOCAB)).astype(np.float32), RNG.normal(size=(TEACHER_D, VOCAB)).astype(np.float32),
        RNG.normal(size=(B, T, D)).astype(np.float32), 2 * RNG.normal(size=(B, T, TEACHER_D)).astype(np.float32),
        RNG.integers(0, VOCAB, (B, T)), weights_BT, RNG.uniform(size=(B, T)) < 0.5,
    )  # fmt: skip


def by_torch(head, teacher_head, h, teacher, targets, weights, kl_weight):
    """The mixed sum, its parts, and gradients by head and hidden states, float64."""
    head, h = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (head, h))
    logits = (h @ head).reshape(-1, VOCAB)
    wanted = (torch.tensor(teacher, dtype=torch.float64) @ torch.tensor(teacher_head, dtype=torch.float64)).reshape(
        -1, VOCAB
    )
    weights = torch.tensor(weights, dtype=torch.float64).ravel()
    entropy = torch.nn.functional.cross_entropy(logits, torch.tensor(targets).ravel(), reduction="none") @ weights
    kl = (
        torch.nn.functional.kl_div(
            torch.log_softmax(logits, -1), torch.log_softmax(wanted, -1), reduction="none", log_target=True
        ).sum(-1)
        @ weights
    )
    loss = (1 - kl_weight) * entropy + kl_weight * kl
    loss.backward()
    return [x.detach().numpy() for x in (entropy, kl, head.grad, h.grad)]


@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("kl_weight", [0.0, 0.7, 1.0])
def test_values_and_gradients_are_those_of_torch(chunk, kl_weight):
    head, teacher_head, h, teacher, targets, weights, answers = arrays()

    def loss(head, h):
        sums = chunked_divergence(
            head, jnp.asarray(teacher_head), h, jnp.asarray(teacher), jnp.asarray(targets), jnp.asarray(weights),
            jnp.asarray(answers), chunk,
        )  # fmt: skip
        return (1 - kl_weight) * sums.cross_entropy + kl_weight * sums.kl, sums

    with jax.default_matmul_precision("highest"):
        found = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(jnp.asarray(head), jnp.asarray(h))
    (_, sums), (d_head, d_h) = found
    entropy, kl, torch_d_head, torch_d_h = by_torch(head, teacher_head, h, teacher, targets, weights, kl_weight)
    assert float(sums.cross_entropy) == pytest.approx(float(entropy), rel=1e-5)
    assert float(sums.kl) == pytest.approx(float(kl), rel=1e-5)
    assert float(sums.weight) == pytest.approx(weights.sum(), rel=1e-6)
    assert (float(sums.answers), float(sums.correct)) == (
        answers.sum(), (answers & ((h @ head).argmax(-1) == targets)).sum()
    )  # fmt: skip
    np.testing.assert_allclose(d_head, torch_d_head, atol=2e-5)
    np.testing.assert_allclose(d_h, torch_d_h, atol=2e-5)


def test_a_model_like_its_teacher_has_no_divergence_and_no_gradient():
    head, _, h, _, targets, weights, answers = map(jnp.asarray, arrays())
    kl, gradient = jax.value_and_grad(lambda x: chunked_divergence(head, head, x, h, targets, weights, answers, 4).kl)(
        h
    )
    assert float(kl) == pytest.approx(0, abs=1e-5)
    assert np.abs(gradient).max() < 1e-6
