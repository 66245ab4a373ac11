"""Measurements of our generation for `tools.bench.generate`: sessions of random latents, timed prefill and decode."""

import dataclasses
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from latent_attention import quantize_cache
from mla_jax.inference.decode_loop import DecodeState, decode_block
from mla_jax.inference.generator import DECODE_BLOCK, Generator
from mla_jax.inference.sampling import SamplingParams
from mla_jax.inference.session import Session
from mla_jax.model.cache import LayerCache

BLOCKS = 5
"""Calls of the compiled loop that are timed; the median counts."""


class Decoding(NamedTuple):
    """Timing of one decode step of all rows."""

    seconds: float
    spread: float
    bytes_read: int
    """Bytes of the weights and of the valid part of the cache, which a step must read."""


def random_session(generator: Generator, rows: int, tokens: int, capacity: int | None = None) -> Session:
    """A session with so many cached tokens of random latents; decoding takes as long over those as over a text's."""
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
    return Session([[0] * tokens for _ in range(rows)], layers)


def time_decode(generator: Generator, session: Session, tokens: int) -> Decoding:
    """Times greedy decoding over the first `tokens` of the session, as `Generator.generate` does it: a call ahead."""
    rows, greedy, key = len(session.layers[0].c_BSC), SamplingParams(), jax.random.key(0)
    lengths_B, done_B = jnp.full(rows, tokens, jnp.int32), jnp.zeros(rows, bool)
    state = DecodeState(jnp.zeros(rows, jnp.int32), tuple(session.layers), lengths_B, None)
    params, read, started = greedy.arrays(), [], None
    for _ in range(BLOCKS + 2):
        new_NB = started
        # Every call at the same length.
        state = dataclasses.replace(state, lengths_B=lengths_B)
        started, state = decode_block(
            generator.config, generator.weights, state, done_B, params, key, jnp.int32(0), plan=greedy.plan,
            steps=DECODE_BLOCK,
        )  # fmt: skip
        session.layers = list(state.layers)
        if new_NB is not None:
            np.asarray(new_NB)
            read.append(time.perf_counter())
    jax.block_until_ready(started)
    timed = sorted(np.diff(read) / DECODE_BLOCK)  # without the first, which compiles
    median = timed[len(timed) // 2]
    cached = sum(x.nbytes for x in jax.tree.leaves(session.layers)) * tokens // session.capacity
    weights = sum(x.nbytes for x in jax.tree.leaves(generator.weights))
    return Decoding(median, (timed[-1] - timed[0]) / median, weights + cached)


def run_through(generator: Generator, session: Session, prompt: list[int], new: int) -> dict[str, Any]:
    """Generates as a user does; returns seconds of prefill, to the first text and in all."""
    marks: dict[str, float] = {}
    start = time.perf_counter()

    def read(done: int, total: int) -> None:
        marks["prefill_tokens"], marks["prefill_seconds"] = total, time.perf_counter() - start

    def shown(_: int, ids: list[int]) -> None:
        marks.setdefault("first_text_seconds", time.perf_counter() - start)

    generator.generate([prompt], max_new_tokens=new, session=session, on_prefill=read, on_tokens=shown)
    return marks | {"seconds": time.perf_counter() - start}
