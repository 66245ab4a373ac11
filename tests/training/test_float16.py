"""Gradients of a training step that computes in float16, whose numbers go from 6e-8 to 65,504."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mla_jax.losses.cross_entropy import CrossEntropy
from mla_jax.model.transformer import init_params
from mla_jax.state import TrainState
from mla_jax.training.step import make_train_step
from tiny import MODEL

KEEP_GRADIENTS = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params), lambda updates, state, params=None: (updates, updates)
)
"""An optimizer whose state is the last gradient."""


@dataclasses.dataclass(frozen=True)
class OfALargeBatch(CrossEntropy):
    """Divides the sum by the weight of 4,096 times as many tokens, as if these were a part of the batch."""

    def normalizer(self, batch):
        """The loss weight of the whole batch."""
        return 4096 * super().normalizer(batch)


def random_batch(parts: int) -> dict[str, np.ndarray]:
    """128 tokens in `parts` micro-batches."""
    rng, shape = np.random.default_rng(0), (parts, 4 // parts, 32)
    return {
        "tokens": rng.integers(0, MODEL.vocab_size, shape, np.int32),
        "targets": rng.integers(0, MODEL.vocab_size, shape, np.int32),
        "positions": np.broadcast_to(np.arange(32, dtype=np.int32), shape),
        "weights": np.ones(shape, np.float32),
        "answers": np.ones(shape, bool),
    }


def gradients(dtype: str, loss: CrossEntropy, batch: dict[str, np.ndarray]) -> dict:
    model = dataclasses.replace(MODEL, dtype=dtype, initializer_range=0.2)
    params = init_params(model, 0)
    state = TrainState(jnp.zeros((), jnp.int32), params, KEEP_GRADIENTS.init(params))
    state, _ = make_train_step(model, KEEP_GRADIENTS, loss)(state, batch, jnp.float32(0))
    return jax.device_get(state.opt_state)


def assert_parallel(left: dict, right: dict) -> None:
    """Every parameter's gradient in `left` has a cosine of at least 0.9999 with that in `right`, and its norm."""

    def check(path, a, b):
        a, b = (np.asarray(x, np.float64).ravel() for x in (a, b))
        norms = np.linalg.norm(a), np.linalg.norm(b)
        assert min(norms) > 0, path
        assert a @ b / np.prod(norms) >= 0.9999, path
        np.testing.assert_allclose(*norms, rtol=0.01, err_msg=jax.tree_util.keystr(path))

    jax.tree.map_with_path(check, left, right)


@pytest.mark.parametrize("parts", [1, 2])
def test_gradients_of_a_batch_of_524_288_tokens_do_not_vanish(parts):
    batch = random_batch(parts)
    half, single = (gradients(dtype, OfALargeBatch(1024), batch) for dtype in ("float16", "float32"))
    assert_parallel(half, single)


def test_gradients_that_65_536_tokens_agree_on_do_not_overflow():
    """All rows ask for the same, so that sums over tokens grow with their number."""
    batch = {name: np.repeat(x[:, :1], 2048, axis=1) for name, x in random_batch(1).items()}
    half, single = (gradients(dtype, CrossEntropy(1024), batch) for dtype in ("float16", "float32"))
    assert_parallel(half, single)
