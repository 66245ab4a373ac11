"""What the tests do with a SLURM: submit a tiny run, look at its job, wait for its end."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ANSIBLE = ROOT / "deploy" / "ansible"
LOCAL_CLUSTER = ROOT / "deploy" / "slurm" / "local_cluster.sh"
SBATCH = ROOT / "deploy" / "slurm" / "train.sbatch"
PORTS = 6
"""A cluster needs so many."""
STEPS = 200
MODEL = [
    *"model.hidden_size=32 model.num_attention_heads=2 model.qk_nope_head_dim=8 model.qk_rope_head_dim=8".split(),
    *"model.v_head_dim=8 model.kv_lora_rank=16 model.intermediate_size=32 optim=adamw".split(),
]
TINY = [
    *MODEL,
    *"train.log_every=5 train.checkpoint_every=20".split(),
    f"train.stages=[{{seq_len: 96, batch_size: 8, steps: {STEPS}, learning_rate: 0.001}}]",  # at 0.01 rounding grows
]

DPO_STEPS = 60
TINY_DPO = [
    *MODEL,
    *"train.log_every=5 train.checkpoint_every=10 data.branch_tokens=128 data.pairs_per_row=2".split(),
    f"train.stages=[{{seq_len: 256, batch_size: 8, steps: {DPO_STEPS}, learning_rate: 0.001}}]",
]


def until(
    condition: Callable[[], object], what: str, seconds: float = 300, explain: Callable[[], object] = lambda: ""
) -> None:
    """Waits until `condition()` is true; fails saying `what` did not happen, and what `explain()` says."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"within {seconds} s: not {what}\n{explain()}"
        time.sleep(0.2)


def free_ports() -> int:
    """The first of so many ports of which none is in use."""
    for first in range(17000, 20000, PORTS):
        with ExitStack() as stack:
            try:
                for port in range(first, first + PORTS):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    raise AssertionError("no free ports")


def ansible_environment() -> dict[str, str]:
    """The environment in which ansible-playbook, installed beside this Python, runs."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {"PATH": path, "ANSIBLE_CONFIG": str(ANSIBLE / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}


def play(slurm: "Slurm", *arguments: str) -> dict[str, int]:
    """Runs a playbook on the cluster; it must succeed. Returns how many tasks changed something on each host."""
    command = [LOCAL_CLUSTER, "play", *arguments]
    ran = subprocess.run(command, env=ansible_environment(), capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    changed = {host: int(n) for host, n in re.findall(r"^(\w+) +: ok=\d+ +changed=(\d+)", ran.stdout, re.M)}
    assert changed, ran.stdout
    return changed


@dataclass
class Slurm:
    """The cluster, and the commands waiting for jobs on it."""

    environment: dict[str, str]
    waiting: list[subprocess.Popen] = field(default_factory=list)

    def run(self, *command: str, timeout: float = 120) -> str:
        """Standard output of a command; fails if it fails."""
        ran = subprocess.run(
            command,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=ROOT,
            restore_signals=False,  # SIGPIPE stays ignored: see mla_jax/distributed/preemption.py
        )
        assert ran.returncode == 0, ran
        return ran.stdout.strip()

    def train(self, run_dir: Path, *overrides: str, flags: Sequence[str] = (), entry: str = "sft") -> subprocess.Popen:
        """Submits the tiny run by the command that a user types; it waits for the job."""
        tiny = {"sft": TINY, "dpo": TINY_DPO}[entry]
        command = [sys.executable, "-m", f"experiments.{entry}", *flags, *tiny, "+cluster=slurm"]
        command.append("hydra.launcher.cpus_per_task=1")
        process = subprocess.Popen(
            [*command, f"run_dir={run_dir}", f"name={run_dir.name}", *overrides],
            env=self.environment,
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.waiting.append(process)
        return process

    def train_detached(self, run_dir: Path, *overrides: str) -> None:
        """Submits the tiny run on two nodes by sbatch."""
        options = f"--job-name={run_dir.name} --nodes=2 --cpus-per-task=1 --output={run_dir}-%j_log.out".split()
        command = [str(SBATCH), *TINY, f"run_dir={run_dir}", *overrides]
        self.run("sbatch", f"--export=ALL,PYTHON={sys.executable}", *options, *command)

    def job(self, name: str) -> str:
        """The id of the one job of that name, once it was submitted."""
        until(lambda: self.run("squeue", "-h", "-n", name, "-o", "%A"), f"{name} in the queue")
        return self.run("squeue", "-h", "-n", name, "-o", "%A")

    def show(self, job: str) -> dict[str, str]:
        """What SLURM knows of a job: JobState, Restarts, ExitCode, ..."""
        words = self.run("scontrol", "-o", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def finish(self, job: str, state: str = "COMPLETED", seconds: float = 300) -> dict[str, str]:
        """Waits until the job has ended; it must end in `state`."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        until(lambda: self.show(job)["JobState"] in ended, f"job {job} at an end", seconds, self.seen)
        shown = self.show(job)
        assert shown["JobState"] == state, f"{shown}\n{log(Path(shown['StdOut']))}"
        return shown

    def seen(self) -> str:
        """What SLURM says of its queue and its nodes, and what its controller logged last."""
        logged = Path(self.environment["SLURM_CONF"]).parent.parent / "slurmctld.log"
        asked = [["squeue", "-o", "%A %P %j %T %R"], ["sinfo", "-N", "-o", "%N %T %E"], ["tail", "-n40", str(logged)]]
        return "\n".join(self.run(*command) for command in asked)

    def clear(self) -> None:
        """Ends every job and every command that waits for one."""
        for process in self.waiting:
            process.kill()
            process.wait()
        self.waiting = []
        for job in self.run("squeue", "-h", "-o", "%A").split():
            for signal in (["--signal=KILL", "--full"], []):  # no time for saving
                # It may end by itself meanwhile, and then there is no such job.
                subprocess.run(["scancel", *signal, job], env=self.environment, capture_output=True, timeout=120)
        until(lambda: not self.run("squeue", "-h"), "an empty queue")


def log(out: Path) -> str:
    """What all processes of a job printed, given the first one's file."""
    return "\n".join(f"{p.name}:\n{p.read_text()}" for p in sorted(out.parent.glob("*_log.*")))


def has_checkpoint(run_dir: Path, step: int) -> bool:
    """Whether a complete checkpoint of `step` or a later one is there."""
    folder = run_dir / "checkpoints"
    return folder.is_dir() and any(p.name.isdigit() and int(p.name) >= step for p in folder.iterdir())
