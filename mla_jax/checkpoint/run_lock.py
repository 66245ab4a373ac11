"""The lock of a run folder: one job trains a run at a time.

RUN/train.lock     the lease of the process that trains, refreshed every HEARTBEAT_S seconds
RUN/trainer.json   host, process id and start of that process, for people

A lock of the kernel (flock, fcntl) ends with its process, but on Lustre, BeeGFS or NFS it may hold on one node only,
depending on how they are mounted. A file that only one process can create (O_EXCL) excludes on all of them, so the lock
is one, of the package filelock. What a dead process left is taken over: at once on the host where that process is
known to be gone (by process id and start time), elsewhere after LEASE_S seconds without a refresh. These are counted by
the clock of the process that waits, so clocks need not agree; a requeued SLURM job needs nothing else.
"""

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from filelock import SoftFileLease, Timeout

from mla_jax.checkpoint.manager import CHECKPOINTS
from mla_jax.checkpoint.run_folder import check_path
from mla_jax.distributed.decisions import broadcast_decision
from mla_jax.distributed.join import is_main
from mla_jax.errors import InputError
from mla_jax.files import write_json

LOCK = "train.lock"
TRAINER = "trainer.json"
LEASE_S = 60.0
HEARTBEAT_S = 3.0


class RunLock:
    """The right to train a run; made by `lock_run`."""

    def __init__(self, run_dir: Path):
        self._run_dir = run_dir
        self._lease = SoftFileLease(run_dir / LOCK, lease_duration=LEASE_S, heartbeat_interval=HEARTBEAT_S)
        self._trainer: dict = {}

    def check(self) -> None:
        """Raises InputError on every process if another job took the run over, this one having stood still."""
        broadcast_decision(self._check)

    def _acquire(self) -> None:
        check_path(self._run_dir)
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            self._lease.acquire(
                timeout=LEASE_S + 10 * HEARTBEAT_S, poll_interval=0.2, cancel_check=self._make_heartbeat_check()
            )
        except Timeout as e:
            raise InputError(
                f"{self._run_dir} is being trained by {self._holder()}; stop that, wait for its end, or choose another "
                "name="
            ) from e
        except OSError as e:
            raise InputError(f"{self._run_dir} cannot be written to ({e.strerror or e})") from e
        since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        self._trainer = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
        if job := os.environ.get("SLURM_JOB_ID"):
            self._trainer["slurm_job"] = job
        write_json(self._run_dir / TRAINER, self._trainer)

    def _make_heartbeat_check(self) -> Callable[[], bool]:
        """A function that returns True once the lock was refreshed between two of its calls."""
        before, start, told = None, time.monotonic(), False

        def refreshed() -> bool:
            nonlocal before, told
            try:  # opened, because NFS asks the server then
                with (self._run_dir / LOCK).open("rb") as file:
                    found = os.fstat(file.fileno())
            except OSError:
                return False
            if before is not None and before[0] == found.st_ino and before[1] != found.st_mtime_ns:
                return True
            before = found.st_ino, found.st_mtime_ns
            if not told and time.monotonic() - start > 2 * HEARTBEAT_S:
                told = True
                print(
                    f"Waiting {LEASE_S:g} s for a sign of life of {self._holder()}, which holds {self._run_dir}",
                    file=sys.stderr,
                    flush=True,
                )
            return False

        return refreshed

    def _holder(self) -> str:
        try:
            trainer = json.loads((self._run_dir / TRAINER).read_bytes())
            job = f" (SLURM job {trainer['slurm_job']})" if "slurm_job" in trainer else ""
            return f"process {trainer['pid']} on {trainer['host']} since {trainer['since']}{job}"
        except (OSError, ValueError, KeyError, TypeError):  # not written yet
            owner = self._lease.owner
            return f"process {owner.pid} on {owner.hostname}" if owner else "another process"

    def _check(self) -> None:
        lost = self._lease.compromise
        if lost is not None and lost.reason == "refresh-failed":
            raise InputError(
                f"{self._run_dir / LOCK} could not be refreshed for {LEASE_S:g} s ({lost.error}), so another job may "
                "train this run; run the same command to go on from the last checkpoint"
            )
        if lost is not None:
            raise InputError(
                f"{self._run_dir} is being trained by {self._holder()}, which took it over when this process had shown "
                f"no sign of life for {LEASE_S:g} s; this one ends, and its last checkpoint is kept"
            )

    def _release(self) -> None:
        trainer = self._run_dir / TRAINER
        with contextlib.suppress(OSError, ValueError):
            if json.loads(trainer.read_bytes()) == self._trainer:
                trainer.unlink()
        with contextlib.suppress(OSError):
            self._lease.release()


@contextlib.contextmanager
def lock_run(run_dir: Path) -> Iterator[RunLock]:
    """Holds RUN, which is created, while the block runs; the first process of a job does it for all.

    A folder that the block leaves without anything in it is removed.

    Raises:
        InputError: another process trains this run, which names that process, the folder cannot be written
            to, or no checkpoint can be kept at its path.
    """
    lock = RunLock(run_dir)
    broadcast_decision(lock._acquire)
    try:
        yield lock
    finally:
        if is_main():
            lock._release()
            for folder in (run_dir / CHECKPOINTS, run_dir):
                with contextlib.suppress(OSError):
                    folder.rmdir()
