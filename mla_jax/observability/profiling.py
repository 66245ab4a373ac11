"""A profiler trace of some steps, for TensorBoard, Perfetto and `tools.trace_summary`."""

import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path

import jax


class StepProfiler:
    """Writes a jax.profiler trace of the steps `first` to `last` of this process, counted from 1, into `folder`.

    Args:
        steps: [first, last], or empty for no trace.
        folder: where the trace goes.
    """

    def __init__(self, steps: list[int], folder: Path):
        self._first, self._last = steps or (0, 0)
        self._folder = folder
        self._step = 0
        self._tracing = False

    @contextlib.contextmanager
    def step(self, pending: list[dict[str, jax.Array]]) -> Iterator[None]:
        """Around the dispatch of a step; `pending` holds the results of steps dispatched and not yet read.

        The device is drained only where the trace begins and ends, so that it holds these steps and no others.
        """
        self._step += 1
        if self._step == self._first:
            jax.block_until_ready(pending)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # its events would crowd out the kernels'
            jax.profiler.start_trace(self._folder, profiler_options=options)
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=self._step):
            yield
        if self._step == self._last:
            jax.block_until_ready(pending)
            self.close()

    def close(self) -> None:
        """Ends a trace that is under way, if training ends within it."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
            print(f"Trace written to {self._folder}; python -m tools.trace_summary {shlex.quote(str(self._folder))}")
