"""Time of one call in steady state, the same way for JAX and PyTorch.

A fixed sequence of calls is launched again and again, as a CUDA graph: XLA makes its command buffers, PyTorch's are
captured. The calls of a sequence take turns at copies of the data, so that none finds its data in the L2 cache. A time
is that of the whole sequence by the number of calls, the gaps between kernels included.
"""

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

SAMPLE_SECONDS = 0.03
SAMPLES = 7
SAMPLES_OF_SLOW = 3
SLOW_SECONDS = 0.3
CALLS = 16
"""The fewest calls of a sequence where nothing else is said."""
MOST_TURNS = 48
"""The most copies of small data that take turns."""
_DATA_BYTES = 240e6  # together at least: four times the L2 cache of an H200

# Calls that do not need each other may overlap in a command buffer, which those of a model cannot.
_ONE_AFTER_THE_OTHER = {"xla_gpu_command_buffer_scheduling_mode": "SERIALIZE"}


class Timing(NamedTuple):
    """The time of one call."""

    seconds: float
    """Median of the samples."""
    spread: float
    """Largest less smallest sample, over the median."""


def turns_for(data_bytes: int) -> int:
    """Copies of the data that must take turns, lest a call finds some in the L2 cache."""
    return min(math.ceil(_DATA_BYTES / data_bytes), MOST_TURNS) if jax.default_backend() == "gpu" else 1


def has_torch_gpu() -> bool:
    """True if PyTorch is installed and sees a GPU."""
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def program(step: Callable) -> Callable:
    """Jitted function of (earlier results, shared, turns), which lists `step(*shared, *turn)` of each turn.

    The results take the memory of the earlier ones: XLA launches a command buffer as it is only at the same addresses.
    """
    step = jax.jit(step)  # so that it is lowered once

    @functools.partial(jax.jit, donate_argnums=0, keep_unused=True, compiler_options=_ONE_AFTER_THE_OTHER)
    def run_all(earlier: Any, shared: Sequence[Any], turns: Sequence[Sequence[Any]]) -> list[Any]:
        return [step(*shared, *turn) for turn in turns]

    return run_all


def time_jax(
    step: Callable, shared: Sequence[Any], turns: Sequence[Sequence[Any]], calls: int | None = None
) -> tuple[Any, Timing]:
    """Times `step(*shared, *turn)` over the turns; returns the result for the first of them too.

    A turn must hold an array: XLA would make one of calls that have all arguments in common.
    """
    turns = sequence(turns, calls)
    run_all = program(step)
    shapes = jax.eval_shape(run_all, None, shared, turns)
    results = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def run(rounds: int) -> float:
        nonlocal results
        jax.block_until_ready(results)
        start = time.perf_counter()
        for _ in range(rounds):
            results = run_all(results, shared, turns)
        jax.block_until_ready(results)
        return time.perf_counter() - start

    timing = _sample(run, len(turns))
    return results[0], timing


def time_torch(step: Callable, turns: Sequence[Sequence[Any]], calls: int | None = None) -> tuple[Any, Timing]:
    """Times `step(*turn)` over the turns; returns the result for the first of them too."""
    import torch

    turns = sequence(turns, calls)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and allocates what outlives a call
            step(*turns[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):  # XLA has threads of its own
        results = [step(*turn) for turn in turns]

    def run(rounds: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(rounds):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    timing = _sample(run, len(turns))
    return results[0], timing


def sequence(turns: Sequence[Any], calls: int | None) -> list[Any]:
    """The turns, as often as it takes to make a sequence of so many calls at least (None: CALLS)."""
    return list(turns) * math.ceil((calls or CALLS) / len(turns))


def _sample(run: Callable[[int], float], calls: int) -> Timing:
    """`run(rounds)` is the time of that many rounds of `calls` calls."""
    run(1)  # compiles
    once = run(2) / 2
    rounds = max(round(SAMPLE_SECONDS / once), 1)
    run(rounds)  # brings the clocks up
    samples = sorted(run(rounds) / rounds / calls for _ in range(SAMPLES if once < SLOW_SECONDS else SAMPLES_OF_SLOW))
    median = samples[len(samples) // 2]
    return Timing(median, (samples[-1] - samples[0]) / median)
