"""Being told to stop: by a terminal, by SLURM, more than once."""

import os
import signal
import stat
from pathlib import Path

import pytest

from mla_jax.distributed import preemption
from mla_jax.distributed.preemption import StopRequest, requeue


@pytest.fixture(autouse=True)
def handlers():
    """What the process does on SIGTERM and SIGINT stays as it is."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "terminated"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_a_signal_asks_for_a_stop_and_a_second_one_acts_as_usual(number, terminated, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    seen = []
    signal.signal(number, lambda *_: seen.append(number))
    with StopRequest() as stop:
        assert not stop.reached("step 1")
        signal.raise_signal(number)
        assert stop.reached("step 1") and stop.terminated == terminated and seen == []
        signal.raise_signal(number)
        assert seen == [number]
    signal.raise_signal(number)
    assert seen == [number] * 2


def test_slurm_may_send_sigterm_again_while_the_checkpoint_is_saved(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.reached("step 1")
    signal.raise_signal(signal.SIGTERM)  # would end the test run


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Commands that stand in for SLURM's: `squeue` prints the state given, `scontrol` notes what it is asked."""

    def install(state: str, scontrol: str = f'echo "$@" >>{tmp_path}/asked') -> list[str]:
        for name, line in (("squeue", f"echo {state}"), ("scontrol", scontrol)):
            (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
            (tmp_path / name).chmod(stat.S_IRWXU)
        slept = []
        monkeypatch.setattr(preemption.time, "sleep", slept.append)
        requeue()
        asked = Path(tmp_path / "asked")
        return [*(asked.read_text().splitlines() if asked.exists() else []), *("slept" for _ in slept)]

    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    return install


def test_a_running_job_is_requeued_and_waits(slurm):
    assert slurm("RUNNING") == ["requeue 7", "slept"]


def test_a_running_job_is_requeued_though_munged_hangs_up_on_the_command(slurm, tmp_path):
    assert slurm("RUNNING", f'kill -PIPE $$; echo "$@" >>{tmp_path}/asked') == ["requeue 7", "slept"]


@pytest.mark.parametrize("state", ["COMPLETING", "PENDING"])
def test_a_job_that_slurm_stops_by_itself_only_waits(slurm, state):
    assert slurm(state) == ["slept"]


def test_a_job_that_cannot_be_requeued_says_so_and_ends(slurm, capsys):
    assert slurm("RUNNING", "echo Requested operation is disabled >&2; exit 1") == []
    assert capsys.readouterr().out == "Job 7 cannot be requeued (Requested operation is disabled); submit it again\n"


def test_without_slurm_nothing_is_requeued(slurm, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID")
    assert slurm("RUNNING") == []
