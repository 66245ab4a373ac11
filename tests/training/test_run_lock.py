"""One job trains a run at a time: the second says who does, and what a dead process left is taken over."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import SoftFileLease

from mla_jax.checkpoint import run_lock
from mla_jax.checkpoint.run_folder import load_run
from mla_jax.checkpoint.run_lock import lock_run
from mla_jax.errors import InputError
from processes import printed_by
from tiny import make_config, train

ROOT = Path(__file__).parent.parent.parent
HOLD = """
import sys, time
from pathlib import Path
from mla_jax.checkpoint.run_lock import lock_run
from mla_jax.errors import one_line_errors
with one_line_errors(), lock_run(Path(sys.argv[1])) as lock:
    print("holds", flush=True)
    sys.stdin.readline()
    lock.check()
"""
TRAIN = """
import sys
sys.path.insert(0, "tests")
import conftest
from pathlib import Path
from mla_jax.data import pipeline
from mla_jax.errors import one_line_errors
from tiny import make_config, train
make_pipeline = pipeline.make_pipeline
def make_when_told(*args, **kwargs):  # called by the one that holds the lock
    sys.stdin.readline()
    return make_pipeline(*args, **kwargs)
pipeline.make_pipeline = make_when_told
with one_line_errors():
    print("Finished at", train(make_config(Path(sys.argv[1]), [{"seq_len": 96, "steps": 30}])).step)
"""
ONE_STEP = [{"seq_len": 96, "steps": 1}]


def start(code: str, run_dir: Path, **environment: str) -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code, str(run_dir)], cwd=ROOT, env=os.environ | environment, **pipes)


def start_holder(run_dir: Path, **environment: str) -> subprocess.Popen:
    process = start(HOLD, run_dir, **environment)
    assert process.stdout and process.stdout.readline() == "holds\n"
    return process


@pytest.fixture
def quick(monkeypatch):
    """A short lease, in this process."""
    monkeypatch.setattr(run_lock, "LEASE_S", 2.0)
    monkeypatch.setattr(run_lock, "HEARTBEAT_S", 0.5)


def test_the_second_process_says_who_trains_and_leaves_everything_as_it_is(tmp_path):
    holder = start_holder(tmp_path / "run", SLURM_JOB_ID="17")
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    with pytest.raises(InputError) as refused:
        train(make_config(tmp_path / "run", ONE_STEP))
    who = rf"run is being trained by process {holder.pid} on \S+ since [\d-]+ [\d:]+ UTC \(SLURM job 17\); stop that"
    assert re.search(who, str(refused.value))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before == ["train.lock", "trainer.json"]
    assert holder.communicate("\n") == ("", "") and holder.returncode == 0
    assert not (tmp_path / "run").exists()
    assert train(make_config(tmp_path / "run", ONE_STEP)).finished


def test_of_two_that_start_together_one_trains_and_one_is_refused(tmp_path):
    both = [start(TRAIN, tmp_path / "run") for _ in range(2)]
    deadline = time.monotonic() + 300
    while all(process.poll() is None for process in both) and time.monotonic() < deadline:
        time.sleep(0.1)
    running = [process for process in both if process.poll() is None]
    output = printed_by(both, timeout=300)  # closes their inputs, for which the one that trains has waited
    assert sorted(process.returncode for process in both) == [0, 1], output
    (out, _), (_, error) = sorted(output, key=lambda texts: "Finished" not in texts[0])
    (winner,) = running
    assert winner.returncode == 0 and "Finished at 30" in out
    assert error.strip().splitlines()[-1].startswith(f"error: {tmp_path}/run is being trained by process {winner.pid} ")
    assert load_run(tmp_path / "run").step == 30


def test_the_lock_of_a_process_that_was_killed_here_is_taken_over_at_once(tmp_path, capsys):
    holder = start_holder(tmp_path / "run")
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert train(make_config(tmp_path / "run", ONE_STEP)).finished
    assert "Waiting" not in capsys.readouterr().err
    assert not (tmp_path / "run" / "train.lock").exists() and not (tmp_path / "run" / "trainer.json").exists()


def pretend_another_host(run_dir: Path) -> None:
    """The lock as it is left by a process of another host, whose process id says nothing here."""
    lock = run_dir / "train.lock"
    lock.write_text(re.sub(r"(?m)^host=.*", "host=n1", lock.read_text()))
    trainer = json.loads((run_dir / "trainer.json").read_text())
    (run_dir / "trainer.json").write_text(json.dumps(trainer | {"host": "n1"}))


def leave_lock(run_dir: Path) -> None:
    run_dir.mkdir()
    lease = SoftFileLease(run_dir / "train.lock", lease_duration=run_lock.LEASE_S)
    lease.acquire()
    text = (run_dir / "train.lock").read_text()
    lease.release()
    (run_dir / "train.lock").write_text(text)
    (run_dir / "trainer.json").write_text('{"host": "n1", "pid": 1, "since": "2026-01-02 03:04:05 UTC"}')
    pretend_another_host(run_dir)


def test_the_lock_of_another_host_is_taken_over_when_it_is_not_refreshed(tmp_path, quick, monkeypatch, capsys):
    """As after the failure of a node, or a job requeued on another: clocks are not compared."""
    hurried = SimpleNamespace(monotonic=itertools.count(step=10).__next__)  # so it tells at once that it waits
    monkeypatch.setattr(run_lock, "time", hurried)
    leave_lock(tmp_path / "run")
    os.utime(tmp_path / "run" / "train.lock", (2e9, 2e9))
    assert train(make_config(tmp_path / "run", ONE_STEP)).finished
    told = "Waiting 2 s for a sign of life of process 1 on n1 since 2026-01-02 03:04:05 UTC, which holds"
    assert capsys.readouterr().err.count(told) == 1


def test_the_lock_of_another_host_that_is_refreshed_is_respected(tmp_path):
    leave_lock(tmp_path / "run")
    ended = threading.Event()

    def refresh() -> None:
        while not ended.wait(0.3):
            os.utime(tmp_path / "run" / "train.lock", None)

    thread = threading.Thread(target=refresh)
    thread.start()
    try:
        with pytest.raises(InputError, match="is being trained by process 1 on n1 since 2026-01-02 03:04:05 UTC; stop"):
            train(make_config(tmp_path / "run", ONE_STEP))
    finally:
        ended.set()
        thread.join()


def test_a_process_that_stood_still_and_lost_the_run_saves_nothing_more(tmp_path, quick):
    lost = pytest.raises(InputError, match=r"is being trained by process 7 on n2 since then, which took it over")
    with lost, lock_run(tmp_path / "run") as lock:
        lock.check()
        other = tmp_path / "other"
        leave_lock(other)
        (other / "train.lock").replace(tmp_path / "run" / "train.lock")
        (tmp_path / "run" / "trainer.json").write_text('{"host": "n2", "pid": 7, "since": "then"}')
        for _ in range(600):  # until a heartbeat has seen it
            time.sleep(0.1)
            lock.check()
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"train.lock", "trainer.json"}  # the other's


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/run cannot be written to"):
        train(make_config(tmp_path / "file" / "run", ONE_STEP))
