"""Worker processes: whose batches they are, and what happens when something goes wrong with them or around them."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from batch_sources import Failing, KilledBeforeItIsSent, KilledWhileSending, Numbers, SentOnce
from mla_jax.data.workers import WorkerProcesses
from mla_jax.errors import InputError


@pytest.fixture
def start():
    """Starts workers and ends them."""
    started = []

    def make(source, count: int = 1) -> WorkerProcesses:
        started.append(WorkerProcesses(source, count))
        return started[-1]

    yield make
    for workers in started:
        workers.close()
    assert not multiprocessing.active_children()


def pid_of_the_only_worker() -> int:
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    return worker.pid


def test_threads_get_what_they_ask_for_from_all_processes(start):
    workers = start(Numbers(), 2)
    with ThreadPoolExecutor(3) as threads:
        batches = list(threads.map(workers.__getitem__, range(100)))
    assert [int(batch["index"]) for batch in batches] == list(range(100))
    assert all((batch["more"] == i).all() for i, batch in enumerate(batches))
    assert {int(batch["pid"]) for batch in batches} == {worker.pid for worker in multiprocessing.active_children()}


def test_an_error_in_a_worker_is_raised_with_its_traceback_and_costs_that_batch_only(start):
    workers = start(Failing())
    with pytest.raises(ValueError, match="batch 3 is bad") as raised:
        workers[3]
    assert any("in __getitem__" in note for note in raised.value.__notes__)
    assert workers[4]["index"] == 4


@pytest.mark.parametrize("source", [KilledBeforeItIsSent(), KilledWhileSending()])
def test_a_worker_that_is_killed_at_a_bad_moment_is_an_error(start, source):
    with pytest.raises(InputError, match=r"worker process died \(exit code -9\), .*lower data\.workers"):
        start(source)[0]


def test_an_answer_that_was_not_awaited_is_not_taken_for_another(start, monkeypatch):
    workers = start(Numbers())
    with monkeypatch.context() as patch:
        patch.setattr(Connection, "recv", interrupted)
        with pytest.raises(KeyboardInterrupt):
            workers[7]
    with pytest.raises(InputError, match="worker process died"):
        workers[8]


def interrupted(*_) -> None:
    raise KeyboardInterrupt


def test_if_one_cannot_start_the_others_end():
    with pytest.raises(ValueError, match="enough") as raised:  # while it is held, so is what was started
        WorkerProcesses(SentOnce(), 2)
    assert not multiprocessing.active_children(), raised


def test_workers_end_with_the_object_that_nobody_holds_any_more():
    workers = WorkerProcesses(Numbers(), 2)
    assert workers[0]["index"] == 0
    del workers
    gc.collect()
    assert not multiprocessing.active_children()


def test_one_that_dies_while_nobody_asks_is_an_error_when_somebody_does(start):
    workers = start(Numbers())
    os.kill(pid_of_the_only_worker(), signal.SIGKILL)
    with pytest.raises(InputError, match="worker process died"):
        workers[0]


PROGRAM = """
import os, signal, sys, time
from batch_sources import Numbers, SentOnce
from mla_jax.data.workers import WorkerProcesses

if __name__ == "__main__":
    what = sys.argv[1]
    workers = WorkerProcesses(SentOnce() if what == "failed start" else Numbers(), 2)
    pid = int(workers[0]["pid"])
    if what == "signals":
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(pid, number)
        time.sleep(0.2)
        assert [int(workers[i]["index"]) for i in range(4)] == [0, 1, 2, 3]
    elif what == "failure":
        sys.exit("a reason")
    elif what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    ("what", "code"), [("signals", 0), ("end", 0), ("failure", 1), ("kill", -signal.SIGKILL), ("failed start", 1)]
)
def test_workers_live_as_long_as_the_program_that_did_not_close_them(what, code, tmp_path):
    """Signals to all processes of a job do not end them, and the end of the program does, whatever it is."""
    (tmp_path / "program.py").write_text(PROGRAM)
    tests = str(Path(__file__).parents[1])
    done = subprocess.run(  # until nobody has its standard output any more
        [sys.executable, str(tmp_path / "program.py"), what],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([tests, *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stderr
