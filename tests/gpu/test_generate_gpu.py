"""Generation on a GPU: the fused batch-1 step against the model in XLA, and memory against its plan."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_attention import jax_triton_loader
from latent_attention.gpu import local_gpu
from mla_jax.config import ModelConfig
from mla_jax.inference.generator import Generator
from mla_jax.model import decoder, fused_decode
from mla_jax.model.cache import LatentCache, init_layer
from mla_jax.model.rope import rope_cos_sin
from mla_jax.model.transformer import init_params
from tiny import MODEL

MODELS = {
    "even widths": dataclasses.replace(
        MODEL, dtype="bfloat16",
        vocab_size=1024, hidden_size=512, num_hidden_layers=3, num_attention_heads=8, qk_nope_head_dim=64,
        qk_rope_head_dim=64, v_head_dim=128, kv_lora_rank=256, q_lora_rank=256, intermediate_size=1536,
        tie_word_embeddings=False,
    ),
    "a layer in one kernel": dataclasses.replace(
        MODEL, dtype="bfloat16",
        vocab_size=1024, hidden_size=1536, num_hidden_layers=3, num_attention_heads=16, qk_nope_head_dim=64,
        qk_rope_head_dim=64, v_head_dim=128, kv_lora_rank=256, q_lora_rank=512, intermediate_size=1536,
        tie_word_embeddings=False,
    ),
    "odd widths, tied": dataclasses.replace(
        MODEL, dtype="bfloat16",
        vocab_size=1000, hidden_size=328, num_hidden_layers=2, num_attention_heads=5, qk_nope_head_dim=40,
        qk_rope_head_dim=32, v_head_dim=56, kv_lora_rank=192, q_lora_rank=136, intermediate_size=872,
        tie_word_embeddings=True,
    ),
}  # fmt: skip
EACH = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
TOKENS, CAPACITY = 200, 256


def require_kernels(config: ModelConfig, cache_dtype: str | None = None) -> None:
    reason = fused_decode.why_not(config, (jax.eval_shape(lambda: init_layer(config, 1, 256, cache_dtype)),), False)
    gpu = local_gpu()
    if gpu is None or gpu.capability < (8, 0) or jax_triton_loader.why_not():
        pytest.skip(str(reason))
    assert reason is None


def params_of(config: ModelConfig) -> dict:
    """Random parameters whose norm weights are not all ones."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: x * rng.normal(1, 0.1, x.shape).astype(x.dtype) if x.ndim < 3 else x * 4, init_params(config, 0)
    )


@EACH
@pytest.mark.parametrize("cache_dtype", [None, "int8"])
@pytest.mark.parametrize(("dtype", "int8"), [("bfloat16", False), ("bfloat16", True), ("float16", False)])
def test_a_fused_step_is_as_close_to_float32_as_xla_is(config, dtype, int8, cache_dtype):
    config = dataclasses.replace(config, dtype=dtype)
    require_kernels(config, cache_dtype)
    weights = decoder.inference_weights(config, params_of(config), int8)
    tokens = jax.random.randint(jax.random.key(1), (1, TOKENS), 0, config.vocab_size)
    empty = LatentCache(tuple(init_layer(config, 1, CAPACITY, cache_dtype) for _ in range(config.num_hidden_layers)),
                        jnp.zeros(1, jnp.int32))  # fmt: skip

    def xla(config, weights, cache):
        h, cache = decoder.extend(config, weights, tokens[:, -1:], cache, absorbed=True)
        return decoder.logits(config, weights, h[:, 0]), cache

    cached = jax.jit(decoder.extend, static_argnums=0, static_argnames="absorbed")(
        config, weights, tokens[:, :-1], empty, absorbed=True
    )[1]
    theirs, expected = jax.jit(xla, static_argnums=0)(config, weights, cached)
    cos_sin = rope_cos_sin(config, cached.lengths_B[0])
    workspace = fused_decode.init_workspace(config, weights, cached.layers)
    ours, cache, _ = jax.jit(fused_decode.step, static_argnums=0)(
        config, weights, tokens[:, -1], cos_sin, cached, workspace
    )
    wide = dataclasses.replace(config, dtype="float32", decode="xla")
    up = lambda x: x.astype(jnp.float32) if x.dtype == dtype else x  # noqa: E731
    with jax.default_matmul_precision("highest"):
        exact, _ = jax.jit(xla, static_argnums=0)(wide, jax.tree.map(up, weights), jax.tree.map(up, cached))

    def error(logits):
        return np.linalg.norm(logits - exact) / np.linalg.norm(exact)

    assert error(ours) < 2 * error(theirs) + 1e-3
    assert cache.lengths_B == expected.lengths_B == TOKENS
    for ours_layer, theirs_layer, before in zip(cache.layers, expected.layers, cached.layers, strict=True):
        for mine, other, old in zip(*map(jax.tree.leaves, (ours_layer, theirs_layer, before)), strict=True):
            axis = 2 if mine.shape[1] == 2 else 1  # scales
            last = [slice(None)] * axis + [TOKENS - 1]
            mine, other, old = (np.asarray(x, np.float32) for x in (mine, other, old))
            np.testing.assert_allclose(mine[tuple(last)], other[tuple(last)], atol=0.06 * np.abs(other).max())
            np.testing.assert_array_equal(np.delete(mine, TOKENS - 1, axis), np.delete(old, TOKENS - 1, axis))


@EACH
@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_a_full_cache_stays_as_it_is(config, cache_dtype):
    require_kernels(config, cache_dtype)
    weights = decoder.inference_weights(config, params_of(config))
    empty = init_layer(config, 1, 64, cache_dtype)
    layers = tuple(jax.tree.map(jnp.ones_like, empty) for _ in range(config.num_hidden_layers))
    cache = LatentCache(layers, jnp.full(1, 64, jnp.int32))
    cos_sin, workspace = rope_cos_sin(config, jnp.int32(64)), fused_decode.init_workspace(config, weights, layers)
    tokens = jnp.zeros(1, jnp.int32)
    _, after, _ = jax.jit(fused_decode.step, static_argnums=0)(config, weights, tokens, cos_sin, cache, workspace)
    assert all((x == 1).all() for x in jax.tree.leaves(after.layers))


@EACH
@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_greedy_tokens_are_those_of_the_largest_logits(config, cache_dtype):
    """Several calls of the loop, and a cache that grows."""
    require_kernels(config, cache_dtype)
    params, prompt, new = params_of(config), list(range(2, 90)), 100
    generator = Generator(config, params, cache_dtype=cache_dtype, prefill_chunk=64)
    tokens = prompt + generator.generate([prompt], max_new_tokens=new)[0]
    weights = generator.weights
    empty = LatentCache(tuple(init_layer(config, 1, 192, cache_dtype) for _ in range(config.num_hidden_layers)),
                        jnp.zeros(1, jnp.int32))  # fmt: skip
    h, _ = jax.jit(decoder.extend, static_argnums=0, static_argnames="absorbed")(
        config, weights, jnp.asarray([tokens[:-1]]), empty, absorbed=True
    )
    logits = np.asarray(decoder.logits(config, weights, h[0]))[len(prompt) - 1 :]
    chosen = logits[np.arange(new), tokens[len(prompt) :]]
    # In 8 bits, what differs in the last of 16 bits here and there may be rounded to neighbouring units of int8.
    atol = (0.05 if cache_dtype is None else 0.1) * logits.std()
    np.testing.assert_allclose(chosen, logits.max(-1), atol=atol)


@pytest.mark.parametrize("options", [[], ["--int8-cache", "--int8-weights"]], ids=["16 bits", "8 bits"])
def test_no_more_memory_than_planned(options, tmp_path):
    """A process of its own, with JAX's usual allocator, which counts."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_PYTHON_CLIENT_ALLOCATOR"}
    env["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    model = ["num_hidden_layers=2", "vocab_size=8192", "max_position_embeddings=65536"]
    command = [sys.executable, "-m", "tools.bench.generate", *(f"model.{key}" for key in model), "--no-ceilings"]
    command += ["--read", "32k", "--json", str(tmp_path / "read.json"), *options]
    subprocess.run(command, env=env, check=True, timeout=300)
    (row,) = json.loads((tmp_path / "read.json").read_bytes())["rows"]
    assert 0.5 * row["planned_bytes"] < row["peak_bytes"] <= row["planned_bytes"]
