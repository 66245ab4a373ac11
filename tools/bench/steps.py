"""The training step that tools measure: composed from a config, compiled, with a batch of random tokens."""

import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax.config import ModelConfig, RunConfig
from mla_jax.errors import UsageError
from mla_jax.lengths import LENGTH_PATTERN, format_length, parse_length
from mla_jax.losses.cross_entropy import CrossEntropy
from mla_jax.mesh import place_batch, rows_here
from mla_jax.optim import make_optimizer
from mla_jax.state import abstract_state
from mla_jax.training.step import make_train_step

STEPS, LEAST_STEPS, SECONDS = 10, 2, 12.0
"""Steps are timed until there are so many, or at least two that have taken so long."""
LONG_STEP = 60.0
"""Seconds from which on a step is timed by its first run, warm-up or not, and not run again."""


class Shape(NamedTuple):
    """Sequences and tokens per sequence of a batch."""

    batch: int
    tokens: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Parses `BATCHxTOKENS`, 4x8k for instance."""
        match = re.fullmatch(rf"(\d+)x{LENGTH_PATTERN}", text)
        if match is None:
            raise UsageError(f"shape {text!r} is not BATCHxTOKENS, 4x8k for instance")
        return cls(int(match[1]), parse_length(match[2]))

    def __str__(self) -> str:
        return f"{self.batch} x {format_length(self.tokens)}"


def random_batch(model: ModelConfig, shape: Shape, accumulation: int) -> dict[str, jax.Array]:
    """One batch on the mesh: random tokens, each the target of the one before, all with loss weight 1."""
    rows = rows_here(shape.batch, accumulation)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (shape.batch, shape.tokens + 1), np.int32)[rows]
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones((len(rows), shape.tokens), np.float32),
        "answers": np.ones((len(rows), shape.tokens), bool),
        "positions": np.tile(np.arange(shape.tokens, dtype=np.int32), (len(rows), 1)),
    }
    return place_batch(batch, accumulation)


def compile_step(config: RunConfig, shape: Shape) -> tuple[Any, tuple, dict[str, Any]]:
    """The compiled step, its arguments, and its cost: seconds to compile, bytes on a device, bytes on the host."""
    model, optimizer = config.model, make_optimizer(config.optim)
    train_step = make_train_step(model, optimizer, CrossEntropy(config.train.loss_chunk))
    arguments = random_batch(model, shape, config.train.grad_accumulation), jnp.float32(1e-4)
    start = time.perf_counter()
    compiled = train_step.lower(abstract_state(model, optimizer), *arguments).compile()
    memory = compiled.memory_analysis()
    return compiled, arguments, {
        "compile_seconds": time.perf_counter() - start,
        "bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        "host_bytes": memory.host_temp_size_in_bytes,
    }  # fmt: skip


def time_steps(step: Callable[[], Any]) -> dict[str, float]:
    """Seconds of a compiled step (the median) and their spread, (longest - shortest) / median.

    `step` returns arrays to wait for; the first of its runs warms up and is not counted, unless it is a `LONG_STEP`.
    """

    def run() -> float:
        start = time.perf_counter()
        jax.block_until_ready(step())
        return time.perf_counter() - start

    first = run()
    seconds = [first] if first > LONG_STEP else []
    while first <= LONG_STEP and (len(seconds) < LEAST_STEPS or (len(seconds) < STEPS and sum(seconds) < SECONDS)):
        seconds.append(run())
    median = sorted(seconds)[len(seconds) // 2]
    return {"seconds": median, "spread": (max(seconds) - min(seconds)) / median}
