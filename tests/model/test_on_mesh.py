"""Parameters, gradients and tokens are the same on any mesh as on one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax import mesh
from mla_jax.config import MeshConfig
from mla_jax.errors import UsageError
from mla_jax.inference.generator import Generator, generate
from mla_jax.inference.sampling import SamplingParams
from mla_jax.losses.cross_entropy import chunked_cross_entropy
from mla_jax.model.transformer import abstract_params, bind, init_params
from tiny import MODEL

CONFIG = dataclasses.replace(
    MODEL, initializer_range=0.3, q_lora_rank=16, tie_word_embeddings=False, remat="full", rope_theta=100.0
)
MESHES = [(1, 8, 1), (1, 1, 8), (2, 2, 2)]
MESHES += [
    pytest.param(*sizes, marks=pytest.mark.integration) for sizes in ((8, 1, 1), (2, 4, 1), (2, 1, 4), (1, 4, 2))
]
PROMPTS = [[1, 2, 3], [500] * 70, [7], list(range(20))]


def gradients(params):
    """Gradients of the loss of 8 rows, once as two documents each and once as one."""
    rng = np.random.default_rng(0)
    rows = {
        "tokens": rng.integers(0, CONFIG.vocab_size, (8, 32)),
        "targets": rng.integers(0, CONFIG.vocab_size, (8, 32)),
        "positions": np.broadcast_to(np.concatenate([np.arange(10), np.arange(22)]), (8, 32)),
        "segments": np.broadcast_to(np.repeat([1, 2], [10, 22]), (8, 32)),
    }
    rows = {name: x.astype(np.int32) for name, x in rows.items()}
    rows["weights"] = rng.choice([0.0, 0.1, 1.0], (8, 32)).astype(np.float32)
    rows["answers"] = rows["weights"] > 0
    batch = mesh.place_batch(rows, 1) if mesh.has_mesh() else {name: jnp.asarray(x)[None] for name, x in rows.items()}

    def loss(params, batch):
        model = bind(CONFIG, params)
        tokens, positions, segments, *targets = (
            batch[name][0] for name in ("tokens", "positions", "segments", "targets", "weights", "answers")
        )
        total = 0.0
        for documents in (segments, None):
            h = model(tokens, positions, documents)
            total += chunked_cross_entropy(model.head(), h, *targets, 6).loss
        return total

    return jax.jit(jax.grad(loss))(params, batch)


@pytest.fixture(scope="module")
def on_one_device():
    params = init_params(CONFIG, 0)
    return jax.device_get((params, gradients(params)))


def assert_close(a, b):
    np.testing.assert_allclose(a, b, atol=1e-6 + 1e-5 * np.abs(b).max())


@pytest.mark.parametrize(("data", "fsdp", "context"), MESHES)
def test_parameters_and_gradients_do_not_depend_on_the_mesh(data, fsdp, context, on_one_device):
    with jax.set_mesh(mesh.make_mesh(MeshConfig(data=data, fsdp=fsdp, context=context))):
        params = init_params(CONFIG, 0)
        grads = gradients(params)
        layouts = jax.tree.map(lambda x: x.sharding.spec, abstract_params(CONFIG))
    expected_params, expected_gradients = on_one_device
    jax.tree.map(np.testing.assert_array_equal, params, expected_params)
    jax.tree.map(assert_close, grads, expected_gradients)
    for sharded in (params, grads):
        assert jax.tree.map(lambda x: x.sharding.spec, sharded) == layouts
        assert sharded["layers"]["mlp"]["up_proj"].addressable_shards[0].data.size * fsdp * context == 2 * 32 * 32


def test_tokens_do_not_depend_on_the_mesh(on_one_device):
    """Four prompts on eight devices, sampled in every way, on 8-bit weights and an 8-bit cache too."""

    def sample(params):
        everything = SamplingParams(temperature=0.7, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.3)
        int8 = Generator(CONFIG, params, int8_weights=True, cache_dtype="int8")
        return (
            generate(CONFIG, params, PROMPTS, max_new_tokens=6, sampling=everything),
            int8.generate(PROMPTS, max_new_tokens=6),
        )

    expected = sample(on_one_device[0])
    with jax.set_mesh(mesh.make_mesh(MeshConfig(data=2, fsdp=4))):
        assert sample(init_params(CONFIG, 0)) == expected


def test_positions_of_spread_sequences_must_be_given(on_one_device):
    with jax.set_mesh(mesh.make_mesh(MeshConfig(data=1, fsdp=2, context=4))):
        tokens = mesh.place_batch({"tokens": np.zeros((8, 32), np.int32)}, 1)["tokens"][0]
        with pytest.raises(ValueError, match="positions_BT must be given"):
            bind(CONFIG, on_one_device[0])(tokens)


def test_a_weight_that_does_not_divide_is_a_usage_error():
    config = dataclasses.replace(CONFIG, hidden_size=36)
    eight = mesh.make_mesh(MeshConfig(data=1, fsdp=4, context=2))
    with jax.set_mesh(eight), pytest.raises(UsageError, match="mesh.fsdp x mesh.context = 8 does not divide 36"):
        init_params(config, 0)
