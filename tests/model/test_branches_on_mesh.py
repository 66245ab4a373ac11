"""Branches on a mesh: log-probs come in the order of the row, and gradients are those of one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from branch_rows import branch_rows, random_prompt
from mla_jax import mesh
from mla_jax.config import MeshConfig
from mla_jax.losses.branch_log_probs import branch_log_probs
from mla_jax.model.branches import branch_region
from mla_jax.model.transformer import bind, init_params
from tiny import MODEL

CONFIG = dataclasses.replace(
    MODEL, initializer_range=0.3, q_lora_rank=16, tie_word_embeddings=False, remat="full", rope_theta=100.0
)
LENGTH, SIZE = 48, 16
MESHES = [(1, 1, 8), (2, 2, 2)]
MESHES += [
    pytest.param(*sizes, marks=pytest.mark.integration) for sizes in ((8, 1, 1), (1, 8, 1), (2, 1, 4), (1, 4, 2))
]


def make_rows():
    """Eight rows: prompts of one token to all that there is room for, padding, several pairs of a prompt."""
    rng = np.random.default_rng(0)
    one = [[random_prompt(rng, 33, 8, 8)], [random_prompt(rng, 1, 3, 2)], [random_prompt(rng, 12, 5, 1)]]
    several = [[random_prompt(rng, n, 3, 2, 1, 2) for n in (11, 14)], [random_prompt(rng, n, 2, 1) for n in (3, 1, 17)]]
    rows = branch_rows([*one, *several, [], *several], LENGTH, SIZE)
    return rows | {"weights": rng.normal(size=(8, LENGTH)).astype(np.float32) * (rows["targets"] > 0)}


def gradients_and_log_probs(params):
    """Of a sum in which every target counts differently, masked as packed rows and as rows of one prompt."""
    rows = make_rows()
    if mesh.has_mesh():
        rows = {name: x[0] for name, x in mesh.place_batch(rows, 1, SIZE).items()}

    def loss(params, rows):
        model, weights = bind(CONFIG, params), branch_region(rows["weights"], SIZE)
        found = [branch_log_probs(model, rows, SIZE, packed, 5).log_probs_BR for packed in (False, True)]
        return sum(jnp.sum(x * weights) for x in found), found

    grads, found = jax.jit(jax.grad(loss, has_aux=True))(params, rows)
    return jax.device_get((grads, found))


@pytest.fixture(scope="module")
def on_one_device():
    return gradients_and_log_probs(init_params(CONFIG, 0))


@pytest.mark.parametrize(("data", "fsdp", "context"), MESHES)
def test_log_probs_and_gradients_do_not_depend_on_the_mesh(data, fsdp, context, on_one_device):
    with jax.set_mesh(mesh.make_mesh(MeshConfig(data=data, fsdp=fsdp, context=context))):
        found = gradients_and_log_probs(init_params(CONFIG, 0))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 + 2e-5 * np.abs(b).max()), found, on_one_device
    )
