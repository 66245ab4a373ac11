"""Batches made by worker processes, each over a pipe of its own.

A worker that is killed while it sends a batch closes its pipe, so the reader gets an end of file. In a queue, such as
Grain's own workers (0.2.18) share with their reader, the reader would wait for the rest of the batch forever.
"""

import contextlib
import multiprocessing
import queue
import signal
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker, util
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Protocol

import numpy as np

from mla_jax.errors import InputError

Batch = dict[str, np.ndarray]
"""Arrays [b, T] by name, of the rows that this process makes; `make_pipeline` lists those of fine-tuning."""


class BatchSource(Protocol):
    """Random access to batches."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Batch: ...


class WorkerProcesses:
    """The batches of `source`, made in `count` processes. Threads may ask for several at the same time.

    The processes end with `close`, and when the object or the process that started them is gone, in whatever way.

    Raises:
        InputError: a worker has died.
    """

    def __init__(self, source: BatchSource, count: int):
        self._length = len(source)
        self._processes: list[BaseProcess] = []
        self._idle: queue.SimpleQueue[tuple[BaseProcess, Connection]] = queue.SimpleQueue()
        # As multiprocessing.Pool does: also runs when a program ends, before that waits for its processes.
        self._end = util.Finalize(self, _kill, (self._processes,), exitpriority=0)
        try:
            with ThreadPoolExecutor(count, initializer=_block_signals) as starters:
                list(starters.map(self._start, [source] * count))
        except BaseException:
            self.close()
            raise

    def _start(self, source: BatchSource) -> None:
        """Starts a worker; a source that is large is sent once it has imported what it needs."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs,))
        process.start()
        self._processes.append(process)
        theirs.close()  # or there would be no end of file when the worker dies
        with _death_as_input_error(process):
            ours.send(source)
        self._idle.put((process, ours))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Batch:
        process, connection = worker = self._idle.get()
        try:
            with _death_as_input_error(process):
                connection.send(index)
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


def _block_signals() -> None:
    """Blocks them in this thread, and so in the processes that it starts.

    A terminal sends SIGINT, and SLURM SIGTERM, to every process of a job, and the trainer still wants batches until it
    has saved.
    """
    resource_tracker.ensure_running()  # starting it, which the first process would do, unblocks them
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})


def _work(connection: Connection) -> None:
    with contextlib.suppress(EOFError, ConnectionError):  # the trainer has gone
        source = connection.recv()
        while True:
            connection.send(_answer(source, connection.recv()))


def _answer(source: BatchSource, index: int) -> Batch | Exception:
    try:
        return source[index]
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
def _death_as_input_error(process: BaseProcess) -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as e:
        with _wait_lock:
            process.join(1)
        killed = process.exitcode == -signal.SIGKILL
        hint = "out of memory perhaps: lower data.workers" if killed else "see what it printed"
        raise InputError(
            f"a data worker process died (exit code {process.exitcode}), {hint}; "
            "the same command goes on from the last checkpoint"
        ) from e
