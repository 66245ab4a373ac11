"""What the next stage needs before its first step, made while a stage trains: a program, and data workers."""

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from mla_jax.data.pipeline import Pipeline
from mla_jax.state import TrainState

MOST_MEMORY = 0.7
"""The share of a device's memory that training may have used for a program to be compiled beside it.

Compiling runs kernels on the device, to choose the fastest; where memory is short, that could end the run.
"""
Step = Callable[..., tuple[TrainState, dict]]
"""As `make_train_step` has it: (state, batch, learning_rate, `Loss.shared`) -> (state, sums)."""


class Ahead:
    """The training step, for batches of any shape: compiled when it is called, or before.

    Nothing is made ahead on a CPU, whose cores training needs.
    """

    def __init__(self, step: Any, enabled: bool | None = None):
        """`step` is jitted; `enabled` is for tests."""
        self._step = step
        self._enabled = jax.default_backend() != "cpu" if enabled is None else enabled
        self._threads = ThreadPoolExecutor(2, "ahead")
        self._programs: dict[tuple[int, ...], Future[Step]] = {}
        self._data: tuple[Pipeline, Future[Any]] | None = None

    def __call__(self, state: TrainState, batch: dict, rate: jax.Array, shared: dict) -> tuple[TrainState, dict]:
        """One step."""
        program = self._programs.get(batch["tokens"].shape)
        if program is None:
            return self._step(state, batch, rate, shared)
        try:
            step = program.result()
        except Exception:  # of memory, perhaps, which training held too: compiled alone it fits, or says what is wrong
            del self._programs[batch["tokens"].shape]
            step = self._step
        return step(state, batch, rate, shared)

    def prepare(
        self, arguments: tuple[TrainState, dict, jax.Array, dict], batch_size: int, seq_len: int,
        make_data: Callable[[], Pipeline] | None,
    ) -> None:  # fmt: skip
        """Begins to compile for [batch_size, seq_len], and to start the workers of the pipeline that `make_data` makes.

        Waits for the step that the state comes from.

        Args:
            arguments: those of a step, of which only the batch has another shape.
            batch_size: rows of the batches to come, over all micro-batches.
            seq_len: their tokens.
            make_data: None if it has no workers.
        """
        if not self._enabled:
            return
        state, batch, rate, shared = arguments
        accumulation = batch["tokens"].shape[0]
        shape = accumulation, batch_size // accumulation, seq_len
        if shape not in self._programs and _memory_used(state) <= MOST_MEMORY:
            batch = {name: _abstract(x, shape) for name, x in batch.items()}
            state, shared = jax.tree.map(lambda x: _abstract(x, x.shape), (state, shared))
            rate = jax.ShapeDtypeStruct(rate.shape, rate.dtype)  # of no sharding, as numbers are
            asked = state, batch, rate, shared
            self._programs[shape] = self._threads.submit(self._compile, jax.sharding.get_mesh(), asked)
        if make_data is not None:
            pipeline = make_data()
            self._data = pipeline, self._threads.submit(pipeline.start)

    def _compile(self, mesh: Any, arguments: tuple) -> Step:
        with jax.set_mesh(mesh):
            return self._step.lower(*arguments).compile()

    def take_data(self) -> Pipeline | None:
        """The pipeline of the stage that was prepared last, if it has one."""
        if self._data is None:
            return None
        (pipeline, started), self._data = self._data, None
        started.result()
        return pipeline

    def close(self) -> None:
        """Ends the workers of a stage that is not reached; a program that is being compiled is waited for."""
        with contextlib.suppress(Exception):  # of workers that nobody wants any more
            pipeline = self.take_data()
            if pipeline is not None:
                pipeline.close()
        self._threads.shutdown(cancel_futures=True)


def _abstract(x: jax.Array, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, x.dtype, sharding=x.sharding)


def _memory_used(state: TrainState) -> float:
    """The largest share of a device's memory that was in use at a time, up to the step that the state comes from."""
    jax.block_until_ready(state)
    stats = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    return max((each["peak_bytes_in_use"] / each["bytes_limit"] for each in stats), default=0.0)
