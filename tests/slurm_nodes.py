"""What the tests look at in the nodes of the loopback cluster."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from slurm_cluster import Slurm, play, until


def state_dir(slurm: Slurm) -> Path:
    """The folder of all that the cluster keeps."""
    return Path(slurm.environment["SLURM_CONF"]).parent.parent


def node(slurm: Slurm, name: str) -> tuple[str, str]:
    """A node's state, and why it is drained."""
    state, reason = slurm.run("sinfo", "-h", "-N", "-p", "main", "-n", name, "-o", "%T|%E").split("|")
    return state, reason


def kill(pid_file: Path, number: signal.Signals) -> None:
    """Ends a daemon and waits for its end."""
    pid = int(pid_file.read_text())
    os.kill(pid, number)
    until(lambda: not Path(f"/proc/{pid}").exists(), f"the end of {pid_file.stem}")


def restart(slurm: Slurm, daemon: str, first: str = "true", **variables: str) -> Path:
    """Starts a daemon again as it runs, with `variables` set, in a mount namespace of its own, after `first` in it.

    Returns its folder in /proc.
    """
    pid_file = state_dir(slurm) / f"{daemon}.pid"
    process = Path("/proc", pid_file.read_text().strip())
    arguments = (process / "cmdline").read_text().split("\0")[:-1]
    pairs = (process / "environ").read_text().split("\0")[:-1]
    user, group = process.stat().st_uid, process.stat().st_gid
    namespace = os.open(process / "ns" / "mnt", os.O_RDONLY)
    kill(pid_file, signal.SIGTERM)
    run_again = f'{first} && exec setpriv --reuid={user} --regid={group} --clear-groups "$@"'
    enter = ["nsenter", f"--mount=/proc/self/fd/{namespace}", "unshare", "--mount", "bash", "-c", run_again, daemon]
    detach = f'"$@" </dev/null >>{pid_file.with_suffix(".out")} 2>&1 & echo $! >{pid_file}'
    environment = dict(pair.split("=", 1) for pair in pairs) | variables
    command = ["setsid", "bash", "-c", detach, daemon, *enter, *arguments]
    subprocess.run(command, env=environment, pass_fds=[namespace], check=True)
    os.close(namespace)
    process = Path("/proc", pid_file.read_text().strip())
    until(lambda: (process / "cmdline").read_text().split("\0")[:-1] == arguments, f"{daemon} at work")
    return process


def refusal(slurm: Slurm, *arguments: str) -> str:
    """The error of a playbook, which must fail, in its one line."""
    with pytest.raises(AssertionError) as failure:
        play(slurm, *arguments)
    (line,) = re.findall(r"^\[ERROR\]: (.*)", str(failure.value), re.M)
    return line


def wait_until_written(slurm: Slurm) -> None:
    """Waits until slurmctld has written the jobs' state as it is now, which it does when a job is submitted."""
    written = state_dir(slurm) / "state" / "slurmctld" / "job_state"
    name = f"submitted-{time.time_ns()}"
    slurm.run("sbatch", "--hold", f"--job-name={name}", "--output=/dev/null", "--wrap=true")
    until(lambda: written.exists() and name.encode() in written.read_bytes(), "the jobs written")


def long_job(slurm: Slurm, folder: Path) -> str:
    """Starts a job that runs until it is ended and writes the names of its nodes to `folder`. Returns its id."""
    script = "trap 'exit 1' TERM; echo $SLURMD_NODENAME; sleep 900 & wait"
    job = slurm.run("sbatch", "--parsable", "--open-mode=append", f"--output={folder}/out", f"--wrap={script}")
    until(lambda: nodes_of(folder), "the job on a node")
    return job


def steps(slurm: Slurm, job: str) -> list[Path]:
    """The sockets of a job's processes on the nodes."""
    return list((state_dir(slurm) / "state").glob(f"slurmd-n?/n?_{job}.*"))


def nodes_of(folder: Path) -> list[str]:
    """The nodes on which a long job has run so far."""
    out = folder / "out"
    return re.findall(r"^n[01]$", out.read_text(), re.M) if out.exists() else []
