"""The model: its forms agree, tokens see what they should, sizes are what is promised."""

import dataclasses
import functools

import hydra
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from mla_jax.config import ModelConfig, YarnConfig, register_schemas
from mla_jax.errors import UsageError
from mla_jax.model import decoder
from mla_jax.model.mla import scale_queries
from mla_jax.model.rope import softmax_scale
from mla_jax.model.transformer import abstract_params, bind, init_params
from tiny import MODEL, empty_cache, random_params

# Large weights, so that attention is far from uniform.
PEAKY = dataclasses.replace(MODEL, initializer_range=0.3, rope_theta=100.0)
WIDE = dataclasses.replace(PEAKY, initializer_range=0.1)  # wider sums need smaller weights for that
MODELS = {
    "plain": PEAKY,
    "q_lora, untied, yarn": dataclasses.replace(
        PEAKY,
        q_lora_rank=12,
        tie_word_embeddings=False,
        rope_scaling=YarnConfig(factor=8.0, original_max_position_embeddings=32, mscale=1.3, mscale_all_dim=0.7),
    ),
    "512+64": dataclasses.replace(WIDE, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
    "192+64": dataclasses.replace(WIDE, kv_lora_rank=192, qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=64),
}


PARAMS = random_params(PEAKY)


def random_tokens(batch, length, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, MODEL.vocab_size, (batch, length)))


@functools.partial(jax.jit, static_argnums=0)
def logits(config, params, tokens, positions=None, segments=None):
    model = bind(config, params)
    return model.logits(model(tokens, positions, segments))


@functools.partial(jax.jit, static_argnums=(0, 5))
def extend(config, params, tokens, cache, valid, absorbed):
    weights = decoder.inference_weights(config, params)
    h, cache = decoder.extend(config, weights, tokens, cache, valid, absorbed=absorbed)
    return decoder.logits(config, weights, h), cache


def assert_close(a, b, tolerance=2e-5):
    np.testing.assert_allclose(a, b, atol=tolerance * max(1, np.abs(b).max()))


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_expanded_and_absorbed_extension_equal_the_whole_forward(config):
    tokens, params = random_tokens(2, 24), random_params(config)
    expected = logits(config, params, tokens)
    assert np.std(expected) > 0.1
    for absorbed in (False, True):
        cache = empty_cache(config, 2, 30)
        parts = []
        for start in range(0, 24, 8):
            part, cache = extend(config, params, tokens[:, start : start + 8], cache, None, absorbed)
            parts.append(part)
        assert_close(np.concatenate(parts, 1), expected)
        np.testing.assert_array_equal(cache.lengths_B, 24)


@settings(max_examples=12)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=3, max_size=3),
    steps=st.lists(st.tuples(st.sampled_from([5, 16]), st.booleans()), min_size=1, max_size=6),
)
def test_any_chunks_in_any_form_equal_the_whole_forward(lengths, steps):
    """Rows of different lengths, chunk sizes and forms in any order; what is left is decoded a few tokens at a time."""
    tokens = random_tokens(3, 40)
    expected = np.asarray(logits(PEAKY, PARAMS, tokens))
    cache = empty_cache(PEAKY, 3, 40)
    got, done = np.zeros_like(expected), np.zeros(3, np.int32)
    for size, absorbed in [*steps, *[(5, True)] * 8]:
        valid = np.clip(np.array(lengths) - done, 0, size).astype(np.int32)
        chunk = np.zeros((3, size), np.int32)
        for b in range(3):
            chunk[b, : valid[b]] = tokens[b, done[b] : done[b] + valid[b]]
        new, cache = extend(PEAKY, PARAMS, chunk, cache, valid, absorbed)
        for b in range(3):
            got[b, done[b] : done[b] + valid[b]] = new[b, : valid[b]]
        done += valid
    np.testing.assert_array_equal(cache.lengths_B, lengths)
    real = np.arange(40) < np.array(lengths)[:, None]
    assert_close(got[real], expected[real])


def test_prefill_over_a_cache_of_several_chunks(monkeypatch):
    """The cache is decompressed in pieces that do not divide its capacity."""
    monkeypatch.setattr("mla_jax.model.mla.CACHE_CHUNK", 32)
    monkeypatch.setattr("mla_jax.model.mla.MIN_CACHE_CHUNK", 1)
    config = dataclasses.replace(PEAKY, rope_theta=101.0)  # compiled for this test alone
    tokens, params = random_tokens(2, 41), PARAMS
    cache = empty_cache(config, 2, 41)
    expected = logits(config, params, tokens)
    for start, stop in ((0, 20), (20, 40), (40, 41)):
        got, cache = extend(config, params, tokens[:, start:stop], cache, None, False)
        assert_close(got, expected[:, start:stop])


def test_packed_documents_do_not_see_each_other():
    tokens = random_tokens(1, 30)
    segments = np.repeat([1, 2, 0], [12, 11, 7])[None]
    positions = np.concatenate([np.arange(12), np.arange(11), np.zeros(7, int)])[None]
    packed = logits(PEAKY, PARAMS, tokens, positions, segments)
    assert_close(packed[:, :12], logits(PEAKY, PARAMS, tokens[:, :12]))
    assert_close(packed[:, 12:23], logits(PEAKY, PARAMS, tokens[:, 12:23]))
    assert np.abs(packed[:, 12:23] - logits(PEAKY, PARAMS, tokens)[:, 12:23]).max() > 0.1


def test_padding_and_later_tokens_change_nothing():
    tokens = random_tokens(1, 30)
    other = tokens.at[:, 20:].set(random_tokens(1, 10, seed=1))
    segments = np.repeat([1, 0], [20, 10])[None]
    expected = logits(PEAKY, PARAMS, tokens, None, segments)[:, :20]
    np.testing.assert_array_equal(logits(PEAKY, PARAMS, other, None, segments)[:, :20], expected)
    np.testing.assert_array_equal(logits(PEAKY, PARAMS, other)[:, :20], logits(PEAKY, PARAMS, tokens)[:, :20])


def test_only_differences_of_positions_matter():
    tokens, positions = random_tokens(1, 20), np.arange(20)[None]
    expected = logits(PEAKY, PARAMS, tokens)
    assert_close(logits(PEAKY, PARAMS, tokens, positions + 2**20), expected, 2e-4)
    assert np.abs(logits(PEAKY, PARAMS, tokens, 2 * positions) - expected).max() > 0.1


def test_gradients_do_not_depend_on_what_is_recomputed():
    def gradient(config):
        def loss(params):
            model = bind(config, params)
            return jnp.mean(model.logits(model(random_tokens(2, 140))) ** 2)

        return jax.jit(jax.grad(loss))(PARAMS)

    expected = gradient(dataclasses.replace(PEAKY, attention="reference"))
    assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(expected))
    for change in (
        {"remat": "none", "unroll": -1},
        {"remat": "dots"},
        {"remat": "full", "mlp_chunk": 48},
        {"remat": "names", "saved": ("latent_attention", "gate"), "offloaded": ("layer_input", "queries")},
    ):
        grads = gradient(dataclasses.replace(PEAKY, **change))
        jax.tree.map(functools.partial(assert_close, tolerance=2e-4), grads, expected)


def backward_pass(**change):
    config = dataclasses.replace(MODEL, **change)
    return str(jax.make_jaxpr(jax.grad(lambda p: bind(config, p)(random_tokens(1, 8)).sum()))(random_params(config)))


def test_remat_keeps_what_its_name_says():
    def attention_runs(**change):
        return backward_pass(**change).count("exp ")  # one in a forward pass of attention, one in its backward pass

    kept = attention_runs(remat="none")
    assert kept == attention_runs(remat="dots") == attention_runs(remat="names", saved=("latent_attention",))
    assert kept == attention_runs(remat="full") - 1 == attention_runs(remat="names") - 1


@pytest.mark.parametrize("name", ["latents", "queries", "gate", "up"])
def test_what_is_kept_is_not_multiplied_again(name):
    def products(**change):
        return backward_pass(remat="names", **change).count("dot_general[")

    assert products() == products(saved=(name,)) + 1 == products(offloaded=(name,)) + 1


def test_feed_forward_in_chunks_never_holds_all_tokens():
    activations = "[1,8,48]"
    assert activations in backward_pass(intermediate_size=48)
    assert activations not in backward_pass(intermediate_size=48, mlp_chunk=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"saved": ("queries",)}, "model.saved and model.offloaded need model.remat=names"),
        ({"remat": "names", "saved": ("keys",)}, "model.saved must be one of layer_input, "),
        ({"remat": "names", "saved": ("up",), "offloaded": ("up",)}, "both have up; choose one"),
        ({"remat": "names", "saved": ("up",), "mlp_chunk": 8}, "model.mlp_chunk keeps no up"),
        ({"unroll": 0}, "model.unroll must be -1 or at least 1, got 0"),
        ({"mlp_chunk": 0}, "model.mlp_chunk must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_kept_is_a_usage_error(change, message):
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(MODEL, **change)


def test_bfloat16_compute_is_float32_rounded():
    config = dataclasses.replace(MODEL, dtype="bfloat16")
    tokens = random_tokens(2, 20)
    half, full = logits(config, random_params(MODEL), tokens), logits(MODEL, random_params(MODEL), tokens)
    assert half.dtype == jnp.float32
    assert bind(config, random_params(MODEL))(tokens).dtype == jnp.bfloat16
    assert np.linalg.norm(half - full) / np.linalg.norm(full) < 0.05


@pytest.mark.parametrize("config", [MODELS["plain"], MODELS["q_lora, untied, yarn"]], ids=["plain", "q_lora, untied"])
def test_parameters_carry_hugging_face_names_and_transposed_shapes(config):
    layers, d, h, f, c = 2, 32, 2, 32, 16
    k, up = config.qk_head_dim, config.qk_nope_head_dim + config.v_head_dim
    queries = (
        {"q_proj": (layers, d, h * k)}
        if config.q_lora_rank is None
        else {"q_a_proj": (layers, d, 12), "q_a_layernorm": (layers, 12), "q_b_proj": (layers, 12, h * k)}
    )
    attention = queries | {
        "kv_a_proj_with_mqa": (layers, d, c + config.qk_rope_head_dim),
        "kv_a_layernorm": (layers, c),
        "kv_b_proj": (layers, c, h * up),
        "o_proj": (layers, h * config.v_head_dim, d),
    }
    mlp = {"gate_proj": (layers, d, f), "up_proj": (layers, d, f), "down_proj": (layers, f, d)}
    norms = {"input_layernorm": (layers, d), "post_attention_layernorm": (layers, d)}
    head = {} if config.tie_word_embeddings else {"lm_head": (d, 512)}
    expected = {"embed_tokens": (512, d), "norm": (d,), "layers": {"self_attn": attention, "mlp": mlp} | norms} | head
    assert jax.tree.map(lambda x: x.shape, abstract_params(config)) == expected
    params = init_params(config, 0)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), abstract_params(config)
    )
    assert np.std(params["layers"]["mlp"]["up_proj"]) == pytest.approx(0.3, rel=0.1)
    assert np.all(params["norm"] == 1)
    first, second = params["layers"]["mlp"]["up_proj"]
    assert not np.array_equal(first, second)
    assert not np.array_equal(params["embed_tokens"], init_params(config, 1)["embed_tokens"])


def test_the_embedding_may_start_wider_than_the_matrices():
    """`embedding_initializer_range` is the standard deviation of the embedding alone."""
    wide = init_params(dataclasses.replace(MODEL, vocab_size=4096, embedding_initializer_range=1.0), 0)
    narrow = init_params(dataclasses.replace(MODEL, vocab_size=4096), 0)
    assert float(wide["embed_tokens"].std()) == pytest.approx(1.0, rel=0.02)
    assert float(narrow["embed_tokens"].std()) == pytest.approx(MODEL.initializer_range, rel=0.02)
    jax.tree.map(np.testing.assert_array_equal, wide["layers"], narrow["layers"])


def test_infinite_1b_has_the_promised_size():
    register_schemas()
    with hydra.initialize(version_base=None, config_path="../../conf"):
        config = OmegaConf.to_object(hydra.compose("model/infinite_1b").model)
    assert isinstance(config, ModelConfig)
    parameters = sum(x.size for x in jax.tree.leaves(abstract_params(config)))
    assert parameters == pytest.approx(1.008e9, rel=5e-4)
    cache = jax.eval_shape(lambda: empty_cache(config, 1, 1024))
    bytes_held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.layers))
    assert bytes_held / 1024 == config.cache_bytes_per_token() == 7680


def test_an_unknown_attention_implementation_is_a_usage_error():
    config = dataclasses.replace(MODEL, attention="flash")
    with pytest.raises(UsageError, match="model.attention: implementation='flash' is unknown"):
        bind(config, random_params(MODEL))(random_tokens(1, 4))


@pytest.mark.parametrize("config", [MODELS["plain"], dataclasses.replace(PEAKY, q_lora_rank=12)], ids=["q", "q_lora"])
def test_scaled_queries_are_a_softmax_scale_times_the_factor(config):
    """YaRN with `mscale` changes the scale alone where all pairs rotate more often than `beta_fast`."""
    yarn = YarnConfig(
        factor=2.0, original_max_position_embeddings=512, beta_fast=0.25, beta_slow=1e-4, mscale=2.0, mscale_all_dim=2.0
    )
    sharper = dataclasses.replace(config, rope_scaling=yarn)
    params, tokens = random_params(config), random_tokens(2, 24)
    factor = softmax_scale(sharper) / softmax_scale(config)
    assert factor > 1.2
    expected = logits(sharper, params, tokens)
    assert np.abs(expected - logits(config, params, tokens)).max() > 0.1
    assert_close(logits(config, scale_queries(params, factor), tokens), expected)
