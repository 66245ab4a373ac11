"""Work done by processes, each over a pipe of its own: batches, and chunks of text that are encoded.

A worker that is killed while it sends a batch closes its pipe, so the reader gets an end of file. In a queue, such as
Grain's own workers (0.2.18) share with their reader, the reader would wait for the rest of the batch forever.
"""

import collections
import contextlib
import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker, util
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Protocol, TypeVar

import numpy as np

from mla_jax.errors import InputError

Batch = dict[str, np.ndarray]
"""Arrays [b, T] by name, of the rows that this process makes; `make_pipeline` lists those of fine-tuning."""

Rows = dict[int, np.ndarray]
"""Rows that this process makes, ascending, by batch size."""

ENDLESS = 2**48
"""Batches in a source: more than any run takes."""

BYTES_A_PROCESS = 8 * 2**20
"""Input that keeps a process busy for longer than it takes to start."""
MOST_PROCESSES = 64


class BatchSource(Protocol):
    """Random access to batches."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Batch: ...


class Work(Protocol):
    """The work of processes, a BatchSource for instance: something made of what is asked for."""

    def __getitem__(self, asked: Any, /) -> Any: ...


class WorkerProcesses:
    """The items of `work`, made in `count` processes. Threads may ask for several at the same time.

    The processes end with `close`, and when the object or the process that started them is gone, in whatever way.
    `advice` says what to do where memory is short.

    Raises:
        InputError: a worker has died.
    """

    def __init__(self, work: Work, count: int, advice: str = "lower data.workers"):
        self._advice = advice
        self._processes: list[BaseProcess] = []
        self._idle: queue.SimpleQueue[tuple[BaseProcess, Connection]] = queue.SimpleQueue()
        # As multiprocessing.Pool does: also runs when a program ends, before that waits for its processes.
        self._end = util.Finalize(self, _kill, (self._processes,), exitpriority=0)
        try:
            with ThreadPoolExecutor(count, initializer=_block_signals) as starters:
                list(starters.map(self._start, [work] * count))
        except BaseException:
            self.close()
            raise

    def _start(self, work: Work) -> None:
        """Starts a worker; a source that is large is sent once it has imported what it needs."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs,))
        process.start()
        self._processes.append(process)
        theirs.close()  # or there would be no end of file when the worker dies
        with _death_as_input_error(process, self._advice):
            ours.send(work)
        self._idle.put((process, ours))

    def __getitem__(self, asked: Any) -> Any:
        process, connection = worker = self._idle.get()
        try:
            with _death_as_input_error(process, self._advice):
                connection.send(asked)
                answer = connection.recv()
        except BaseException:
            process.kill()  # what is still to come would be taken for the next answer
            raise
        finally:
            self._idle.put(worker)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """Ends the processes. Nothing is lost with a batch that nobody reads: it is made again from its number."""
        self._end()


Asked = TypeVar("Asked")


def on_all_cores(work: Callable[[Asked], Any], asked: Iterable[Asked], size: int) -> Iterator[Any]:
    """`work` of each item, in order; few are held at a time. `size` in bytes says if processes are worth their start.

    Raises:
        InputError: a worker has died.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(cores, size // BYTES_A_PROCESS, MOST_PROCESSES)
    if count < 2:
        yield from map(work, asked)
        return
    advice = "allow this job more memory, or fewer cores (taskset)"
    processes = WorkerProcesses(_Call(work), count, advice)
    with ThreadPoolExecutor(count) as threads, contextlib.closing(processes):
        ahead = collections.deque()
        for item in asked:
            ahead.append(threads.submit(processes.__getitem__, item))
            if len(ahead) > 2 * count:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


class _Call:
    """A function as Work."""

    def __init__(self, function: Callable[[Any], Any]):
        self._function = function

    def __getitem__(self, asked: Any) -> Any:
        return self._function(asked)


def _block_signals() -> None:
    """Blocks them in this thread, and so in the processes that it starts.

    A terminal sends SIGINT, and SLURM SIGTERM, to every process of a job, and the trainer still wants batches until it
    has saved.
    """
    resource_tracker.ensure_running()  # starting it, which the first process would do, unblocks them
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})


def _work(connection: Connection) -> None:
    with contextlib.suppress(EOFError, ConnectionError):  # the trainer has gone
        work = connection.recv()
        while True:
            connection.send(_answer(work, connection.recv()))


def _answer(work: Work, asked: Any) -> Any:
    try:
        return work[asked]
    except Exception as e:
        e.add_note(f"In a data worker:\n{traceback.format_exc()}")
        return e


_wait_lock = threading.RLock()
"""Serialises waits for processes: of two threads that wait for the same one, one would miss its end."""


def _kill(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.kill()
    with _wait_lock:
        for process in processes:
            process.join()


@contextlib.contextmanager
def _death_as_input_error(process: BaseProcess, advice: str) -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as e:
        with _wait_lock:
            process.join(1)
        killed = process.exitcode == -signal.SIGKILL
        hint = f"out of memory perhaps: {advice}" if killed else "see what it printed"
        raise InputError(
            f"a data worker process died (exit code {process.exitcode}), {hint}; "
            "the same command goes on from the last checkpoint"
        ) from e
