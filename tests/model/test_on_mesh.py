"""On any mesh: the same parameters, gradients and tokens as on one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax import mesh
from mla_jax.config import MeshConfig
from mla_jax.errors import UsageError
from mla_jax.generate import generate
from mla_jax.model.transformer import abstract_params, bind, init_params
from tiny import MODEL

CONFIG = dataclasses.replace(
    MODEL, initializer_range=0.3, q_lora_rank=16, tie_word_embeddings=False, remat="full", rope_theta=100.0
)
MESHES = [(2, 4), (8, 1), (1, 8)]
PROMPTS = [[1, 2, 3], [500] * 70, [7], list(range(20))]


def gradients(params):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, CONFIG.vocab_size, (8, 24)).astype(np.int32)
    positions = np.broadcast_to(np.concatenate([np.arange(10), np.arange(14)]), (8, 24)).astype(np.int32)
    segments = np.broadcast_to(np.repeat([1, 2], [10, 14]), (8, 24)).astype(np.int32)

    def loss(params, *batch):
        model = bind(CONFIG, params)
        return jnp.mean(model.logits(model(*batch)) ** 2)

    return jax.jit(jax.grad(loss))(params, *(mesh.shard_batch(x) for x in (tokens, positions, segments)))


@pytest.fixture(scope="module")
def on_one_device():
    params = init_params(CONFIG, 0)
    return jax.device_get((params, gradients(params)))


def assert_close(a, b):
    np.testing.assert_allclose(a, b, atol=1e-6 + 1e-5 * np.abs(b).max())


@pytest.mark.parametrize(("data", "fsdp"), MESHES)
def test_parameters_and_gradients_do_not_depend_on_the_mesh(data, fsdp, on_one_device):
    with jax.set_mesh(mesh.make_mesh(MeshConfig(data=data, fsdp=fsdp))):
        params = init_params(CONFIG, 0)
        grads = gradients(params)
        layouts = jax.tree.map(lambda x: x.sharding.spec, abstract_params(CONFIG))
    expected_params, expected_gradients = on_one_device
    jax.tree.map(np.testing.assert_array_equal, params, expected_params)
    jax.tree.map(assert_close, grads, expected_gradients)
    for sharded in (params, grads):
        assert jax.tree.map(lambda x: x.sharding.spec, sharded) == layouts
        assert sharded["layers"]["mlp"]["up_proj"].addressable_shards[0].data.size * fsdp == 2 * 32 * 32


def test_tokens_do_not_depend_on_the_mesh(on_one_device):
    """Four prompts on eight devices, sampled, which takes the path of greedy decoding and more."""

    def sample(params):
        return generate(CONFIG, params, PROMPTS, max_new_tokens=6, temperature=0.7)

    expected = sample(on_one_device[0])
    with jax.set_mesh(mesh.make_mesh(MeshConfig(data=2, fsdp=4))):
        assert sample(init_params(CONFIG, 0)) == expected


def test_a_weight_that_does_not_divide_is_a_usage_error():
    config = dataclasses.replace(CONFIG, hidden_size=36)
    eight = mesh.make_mesh(MeshConfig(data=1, fsdp=8))
    with jax.set_mesh(eight), pytest.raises(UsageError, match="mesh.fsdp=8 does not divide 36"):
        init_params(config, 0)
