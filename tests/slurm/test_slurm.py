"""Training on a real SLURM: submitting, sweeping, and losing nothing when a job is interrupted."""

import os
import re
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from mla_jax.checkpoint.run_folder import load_run
from slurm_cluster import DPO_STEPS, STEPS, has_checkpoint, log, until

pytestmark = pytest.mark.slurm

TWO = "hydra.launcher.nodes=2"


def params_of(run_dir: Path, steps: int = STEPS) -> dict:
    run = load_run(run_dir)
    assert run.step == steps
    return jax.device_get(run.params)


def assert_equal(a: dict, b: dict) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def whole_run(cluster, tmp_path_factory) -> Path:
    """The run of two processes without an interruption."""
    slurm = cluster
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    command = slurm.train(run_dir, TWO)
    job = slurm.job(run_dir.name)
    shown = slurm.finish(job)
    assert shown["NumNodes"] == "2" and shown["NumTasks"] == "2" and shown["TresPerNode"] == "gres:gpu:1", shown
    printed = log(Path(shown["StdOut"]))
    assert printed.count("Finished at step") == 1, "only the first process prints"
    assert command.wait(300) == 0  # the command that submitted it returns with it
    return run_dir


@pytest.fixture(scope="module")
def whole(whole_run) -> dict:
    """Its parameters."""
    return params_of(whole_run)


def interrupted(slurm, run_dir: Path, *overrides: str) -> str:
    """The id of a job of two processes that has saved its first checkpoint."""
    slurm.train(run_dir, TWO, *overrides)
    return once_saved(slurm, run_dir)


def once_saved(slurm, run_dir: Path) -> str:
    job = slurm.job(run_dir.name)
    until(lambda: has_checkpoint(run_dir, 20), "a first checkpoint")
    return job


def pause(job: str) -> None:
    """Stops the two processes of a job, so that it does not end before SLURM sends them SIGCONT and SIGTERM."""
    for rank in range(2):
        os.kill(process_of(job, rank), signal.SIGSTOP)


def assert_it_resumed(slurm, job: str, run_dir: Path) -> None:
    """The job started twice, and the second time where the first had stopped, not at an older checkpoint."""
    shown = slurm.finish(job)
    assert shown["Restarts"] == "1"
    printed = log(Path(shown["StdOut"]))
    stopped = re.search(r"All processes stop at step (\d+)", printed)
    resumed = re.search(rf"Resuming {re.escape(str(run_dir))} at step (\d+)", printed)
    assert stopped and resumed and stopped[1] == resumed[1], printed


def test_a_requeued_job_goes_on_where_it_stopped(slurm, whole, tmp_path):
    run_dir = tmp_path / "requeued"
    slurm.train_detached(run_dir, "data.workers=1")  # SLURM sends SIGTERM to workers too
    job = once_saved(slurm, run_dir)
    pause(job)
    slurm.run("scontrol", "requeue", job)
    assert_it_resumed(slurm, job, run_dir)
    assert_equal(params_of(run_dir), whole)


def test_a_preempted_job_goes_on_where_it_stopped(slurm, whole, tmp_path):
    run_dir = tmp_path / "preempted"
    slurm.train_detached(run_dir)
    job = once_saved(slurm, run_dir)
    preempt(slurm, job, tmp_path)
    assert_it_resumed(slurm, job, run_dir)
    assert_equal(params_of(run_dir), whole)


def preempt(slurm, job: str, tmp_path: Path) -> None:
    """Takes both nodes from a job for a moment."""
    pause(job)
    urgent = ["sbatch", "--parsable", "-p", "urgent", "-N2", "--exclusive", f"--output={tmp_path}/urgent"]
    slurm.finish(slurm.run(*urgent, "--wrap=sleep 1"))


def test_preference_optimisation_goes_on_where_it_was_preempted(slurm, whole_run, tmp_path):
    """Once while the reference reads its batches, once while it trains; two processes share one file."""
    start = f"init_from={whole_run}"
    slurm.train(tmp_path / "dpo-whole", TWO, start, entry="dpo")
    slurm.finish(slurm.job("dpo-whole"))
    (reference,) = (tmp_path / "dpo-whole" / "reference").iterdir()
    run_dir = tmp_path / "dpo"
    slurm.train(run_dir, TWO, start, entry="dpo")
    job = slurm.job("dpo")
    until(lambda: any(run_dir.glob("reference/*.bin")), "the reference at work")
    preempt(slurm, job, tmp_path)
    until(lambda: has_checkpoint(run_dir, 10), "a first checkpoint")
    preempt(slurm, job, tmp_path)
    shown = slurm.finish(job)
    printed = log(Path(shown["StdOut"]))
    assert shown["Restarts"] == "2" and printed.count("All processes stop at ") == 2, printed
    assert f"Resuming {run_dir}" in printed
    assert_equal(params_of(run_dir, DPO_STEPS), params_of(tmp_path / "dpo-whole", DPO_STEPS))
    assert (run_dir / "reference" / reference.name).read_bytes() == reference.read_bytes()


def test_a_job_at_its_time_limit_requeues_itself_and_goes_on(slurm, whole, tmp_path):
    run_dir = tmp_path / "limited"
    job = interrupted(slurm, run_dir)
    pause(job)
    hours, minutes, _ = map(int, slurm.show(job)["RunTime"].split(":"))
    # One to two minutes are left, so SIGTERM, which comes 120 s before the end, comes when SLURM looks: every 30 s.
    slurm.run("scontrol", "update", f"JobId={job}", f"TimeLimit={60 * hours + minutes + 2}")
    until(lambda: slurm.show(job)["Restarts"] == "1", "the job requeued by itself")
    until(lambda: slurm.show(job)["JobState"] != "COMPLETING", "the job ready to start again")
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    assert_it_resumed(slurm, job, run_dir)
    assert f"Requeued job {job}" in log(Path(slurm.show(job)["StdOut"]))
    assert_equal(params_of(run_dir), whole)


def test_a_killed_process_ends_the_job_and_one_process_goes_on_from_the_last_checkpoint(slurm, whole, tmp_path):
    run_dir = tmp_path / "killed"
    job = interrupted(slurm, run_dir)
    os.kill(process_of(job, rank=1), signal.SIGKILL)
    shown = slurm.finish(job, "FAILED", seconds=60)
    printed = log(Path(shown["StdOut"]))
    assert "task 1: Killed" in printed and "Submit the same command again to go on" in printed, printed
    slurm.train(run_dir)
    job = slurm.job(run_dir.name)
    shown = slurm.finish(job)
    assert shown["NumTasks"] == "1"
    assert re.search(r"Resuming .* at step \d*[24680]0\n", log(Path(shown["StdOut"])))  # no step between checkpoints
    # One process adds up in another order than two.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), params_of(run_dir), whole)


def is_training(arguments: bytes) -> bool:
    return b"srun" not in arguments and (b"submitit.core._submit" in arguments or b"experiments." in arguments)


def process_of(job: str, rank: int) -> int:
    """The process id of a process of the job."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                variables = (entry / "environ").read_bytes().split(b"\0")
                arguments = (entry / "cmdline").read_bytes()
            except OSError:  # it ended meanwhile
                continue
            wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode(), b"SLURM_NTASKS=2"}
            if wanted <= set(variables) and is_training(arguments):
                return int(entry.name)
    raise AssertionError(f"job {job} has no process {rank}")


def test_a_sweep_runs_one_job_for_each_of_four_runs(slurm, tmp_path):
    stages = "train.stages=[{seq_len: 96, batch_size: 8, steps: 10, learning_rate: 0.01}]"
    command = slurm.train(tmp_path / "sweep", "seed=0,1", "optim.b2=0.9,0.98", stages, flags=["-m"])
    assert command.wait(900) == 0, command.stderr.read()
    runs = sorted(p.parent.name for p in (tmp_path / "sweep").glob("*/config.yaml"))
    assert runs == [f"seed={s},optim.b2={b}" for s in (0, 1) for b in ("0.9", "0.98")]
    leaves = [jax.tree.leaves(jax.device_get(load_run(tmp_path / "sweep" / run).params))[0] for run in runs]
    assert all((leaves[0] != other).any() for other in leaves[1:])
