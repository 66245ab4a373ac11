"""What `tools.bench.generate` measures of our generation: contexts of random latents, timed prefill and decode."""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from latent_attention import quantize_cache
from mla_jax.inference.generator import DECODE_BLOCK, Context, Generator, decode_block
from mla_jax.inference.sampling import Sampling, knobs
from mla_jax.model.cache import LayerCache

BLOCKS = 5
"""Calls of the compiled loop that are timed; the median counts."""


class Decoding(NamedTuple):
    """Of one step, all rows."""

    seconds: float
    spread: float
    bytes_read: int
    """Weights and the part of the cache that is held."""


def random_context(generator: Generator, rows: int, tokens: int, capacity: int | None = None) -> Context:
    """A context that holds so many random latents, as if it had read a text: decoding takes as long over those."""
    config, dtype, capacity = generator.config, generator.cache_dtype or generator.config.dtype, capacity or tokens

    @jax.jit
    def layer(key: jax.Array) -> LayerCache:
        def row(key: jax.Array) -> LayerCache:  # one at a time: the random bits of all would not fit
            c_key, rope_key = jax.random.split(key)
            c = jax.random.normal(c_key, (1, capacity, config.kv_lora_rank), config.dtype)
            k_rope = jax.random.normal(rope_key, (1, capacity, config.qk_rope_head_dim), config.dtype)
            return LayerCache(*(quantize_cache(c, k_rope) if dtype == "int8" else (c, k_rope, None)))

        return jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), jax.lax.map(row, jax.random.split(key, rows)))

    layers = [jax.block_until_ready(layer(jax.random.key(i))) for i in range(config.num_hidden_layers)]
    return Context([[0] * tokens for _ in range(rows)], layers)


def time_decode(generator: Generator, context: Context, tokens: int) -> Decoding:
    """Greedy decoding over the first `tokens` of the context, as `Generator.generate` does it: a call ahead."""
    rows, plan = len(context.layers[0].c_BSC), Sampling().plan
    tokens_B, lengths_B, done_B = jnp.zeros(rows, jnp.int32), jnp.full(rows, tokens, jnp.int32), jnp.zeros(rows, bool)
    values, key = knobs(Sampling()), jax.random.key(0)
    read, started = [], None
    for _ in range(BLOCKS + 2):
        new_NB = started
        started, tokens_B, layers, _, _ = decode_block(
            generator.config, generator.weights, tokens_B, tuple(context.layers), lengths_B, done_B, None, values, key,
            jnp.int32(0), plan=plan, steps=DECODE_BLOCK,
        )  # fmt: skip
        context.layers = list(layers)
        if new_NB is not None:
            np.asarray(new_NB)
            read.append(time.perf_counter())
    jax.block_until_ready(started)
    timed = sorted(np.diff(read) / DECODE_BLOCK)  # without the first, which compiles
    median = timed[len(timed) // 2]
    held = sum(x.nbytes for x in jax.tree.leaves(context.layers)) * tokens // context.capacity
    weights = sum(x.nbytes for x in jax.tree.leaves(generator.weights))
    return Decoding(median, (timed[-1] - timed[0]) / median, weights + held)


def run_through(generator: Generator, context: Context, prompt: list[int], new: int) -> dict[str, Any]:
    """Generates as a user does; seconds of prefill, to the first text and in all."""
    marks: dict[str, float] = {}
    start = time.perf_counter()

    def read(done: int, total: int) -> None:
        marks["prefill_tokens"], marks["prefill_seconds"] = total, time.perf_counter() - start

    def shown(_: int, ids: list[int]) -> None:
        marks.setdefault("first_text_seconds", time.perf_counter() - start)

    generator.generate([prompt], max_new_tokens=new, context=context, on_prefill=read, on_tokens=shown)
    return marks | {"seconds": time.perf_counter() - start}
