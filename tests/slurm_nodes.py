"""What the tests look at in the nodes of the loopback cluster."""

import os
import re
import signal
from pathlib import Path

from slurm_cluster import Slurm, until


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
    until(lambda: not Path(f"/proc/{pid}").exists(), f"the end of {pid_file.stem}", 60)


def long_job(slurm: Slurm, folder: Path) -> str:
    """Starts a job that runs until it is ended and writes the names of its nodes to `folder`. Returns its id."""
    script = "trap 'exit 1' TERM; echo $SLURMD_NODENAME; sleep 900 & wait"
    job = slurm.run("sbatch", "--parsable", "--open-mode=append", f"--output={folder}/out", f"--wrap={script}")
    until(lambda: nodes_of(folder), "the job on a node", 60)
    return job


def nodes_of(folder: Path) -> list[str]:
    """The nodes on which a long job has run so far."""
    out = folder / "out"
    return re.findall(r"^n[01]$", out.read_text(), re.M) if out.exists() else []
