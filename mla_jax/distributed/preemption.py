"""Stopping a run without loss on Ctrl-C and SIGTERM, and requeuing a SLURM job that was preempted or timed out."""

import os
import signal
import subprocess
import time

import jax
from jax.experimental import multihost_utils

from mla_jax.distributed.join import is_main, print_on_main

SECONDS_TO_BE_KILLED = 300


class Stopped(Exception):
    """A run was told to stop while it computed something that its next step needs."""


class StopRequest:
    """While entered, SIGINT and SIGTERM ask for a stop instead of ending the process.

    On one process a second signal acts as usual, but under SLURM, which sends SIGTERM several times, that one is
    ignored. On several processes JAX itself takes SIGTERM, and all stop at one step even if just one was told.
    """

    def __init__(self):
        self.terminated = False
        """True for SIGTERM (somebody needs the machine), False for Ctrl-C."""
        self._requested = False
        self._asked = 0
        self._previous: dict = {}

    def __enter__(self) -> "StopRequest":
        if jax.process_count() > 1:
            self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, _as_sigterm)
        else:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def reached(self, what: str) -> bool:
        """Returns True to stop now, at `what` (`step 7`). Every process must ask at the same points."""
        self._asked += 1  # all processes stop at the same number
        if multihost_utils.reached_preemption_sync_point(self._asked):  # False on one process
            self.terminated = True
            print_on_main(f"\nAll processes stop at {what}; the checkpoint is saved first")
            return True
        return self._requested

    def _request(self, number: int, frame) -> None:
        self._requested, self.terminated = True, number == signal.SIGTERM
        if self.terminated and "SLURM_JOB_ID" in os.environ:
            self._previous[signal.SIGTERM] = signal.SIG_IGN
        self.__exit__()
        print("\nStopping after this step; the checkpoint is saved first", flush=True)


def _as_sigterm(number: int, frame) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def requeue() -> None:
    """Puts this SLURM job back into the queue and waits to be killed; returns if that is not possible.

    A job that ended by itself, even in the time it is given after SIGTERM, would count as completed and never start
    again. SLURM has requeued a job already that it preempts, so only a running one is.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    if is_main():
        try:
            state = _printed_by("squeue", "-h", "-j", job, "-o", "%T")
            if state == "RUNNING":
                _printed_by("scontrol", "requeue", job)
                print(f"Requeued job {job}", flush=True)
            else:
                print(f"SLURM stops job {job} ({state.lower()})", flush=True)
        except (OSError, subprocess.CalledProcessError) as e:
            reason = (getattr(e, "stderr", None) or str(e)).strip()
            print(f"Job {job} cannot be requeued ({reason}); submit it again", flush=True)
            return
    time.sleep(SECONDS_TO_BE_KILLED)


def _printed_by(*command: str) -> str:
    # munged hangs up on a command that a busy node delays by 2 s; only one that ignores SIGPIPE asks it again.
    ran = subprocess.run(command, capture_output=True, text=True, check=True, restore_signals=False)
    return ran.stdout.strip()
