"""What an operator does to the cluster that deploy/ansible configured, and what may happen to it."""

import gzip
import json
import shutil
import signal
import sys

import pytest

from slurm_cluster import play, until
from slurm_nodes import kill, long_job, node, nodes_of, state_dir, steps, wait_until_written

pytestmark = pytest.mark.ansible

UNCHANGED = {"head": 0, "n0": 0, "n1": 0}


@pytest.fixture
def job(slurm, tmp_path) -> str:
    """A job that runs until it is ended."""
    return long_job(slurm, tmp_path)


def test_a_drift_is_repaired(slurm):
    state = state_dir(slurm)
    configuration = (state / "n0" / "slurm.conf").read_text()
    (state / "n0" / "slurm.conf").write_text(configuration.replace("KillWait=10", "KillWait=99"))
    (state / "libexec" / "prolog").write_text("#!/bin/sh\nexit 1\n")
    kill(state / "slurmd-n1.pid", signal.SIGTERM)
    changed = play(slurm, "site.yml")
    assert changed["head"] == 0 and changed["n0"] >= 2 and changed["n1"] >= 1
    assert (state / "n0" / "slurm.conf").read_text() == configuration
    assert slurm.run("srun", "-N2", "-n2", "hostname")
    assert play(slurm, "site.yml", "--check", "--diff") == UNCHANGED


def test_nano_trains_on_two_nodes_and_sacct_has_the_account(slurm, tmp_path):
    run_dir = tmp_path / "nano-two-nodes"
    stage = "train.stages=[{seq_len: 96, batch_size: 8, steps: 5, learning_rate: 0.01}]"
    two = ["+cluster=slurm_local", "hydra.launcher.nodes=2", f"run_dir={run_dir}", "name=nano-two-nodes"]
    slurm.run(sys.executable, "-m", "experiments.sft", *two, stage, "model=nano", timeout=600)
    assert (run_dir / "summary.json").exists()
    query = ["sacct", "-X", "-n", "-P", "--name=nano-two-nodes", "-o", "State,NNodes"]
    until(lambda: slurm.run(*query) == "COMPLETED|2", "the job in the accounts")


def test_a_lost_node_loses_no_job(slurm, tmp_path, job):
    lost = nodes_of(tmp_path)[0]
    other = {"n0": "n1", "n1": "n0"}[lost]
    for step in (state_dir(slurm) / "state" / f"slurmd-{lost}").glob("*_*.*"):  # ends the job's processes with it
        step.unlink(missing_ok=True)
    kill(state_dir(slurm) / f"slurmd-{lost}.pid", signal.SIGKILL)
    until(lambda: node(slurm, lost)[0].startswith("down"), "the node down")
    until(lambda: nodes_of(tmp_path) == [lost, other], "the job on the other node")
    play(slurm, "site.yml")
    until(lambda: node(slurm, lost)[0] in ("idle", "mixed"), "the node back")


def test_jobs_outlive_the_controller(slurm, tmp_path, job):
    wait_until_written(slurm)
    kill(state_dir(slurm) / "slurmctld.pid", signal.SIGKILL)
    assert play(slurm, "site.yml") == UNCHANGED | {"head": 1}
    assert slurm.show(job)["JobState"] == "RUNNING" and slurm.show(job)["Restarts"] == "0"


def test_a_node_leaves_and_comes_back(slurm, tmp_path, job):
    leaving = nodes_of(tmp_path)[0]
    other = {"n0": "n1", "n1": "n0"}[leaving]
    play(slurm, "remove_node.yml", "-e", f"node={leaving}", "-e", "requeue=true")
    assert set(slurm.run("sinfo", "-h", "-N", "-o", "%N").split()) == {other}
    until(lambda: nodes_of(tmp_path) == [leaving, other], "the job on the other node")
    play(slurm, "site.yml")
    until(lambda: node(slurm, leaving)[0] == "idle", "the node back")


def test_an_upgrade_empties_one_node_after_the_other(slurm, tmp_path, job):
    play(slurm, "upgrade.yml", "-e", "batch=1", "-e", "requeue=true")
    assert len(nodes_of(tmp_path)) >= 2
    assert {node(slurm, name)[1] for name in ("n0", "n1")} == {"none"}
    saved = max((state_dir(slurm) / "state" / "saved").glob("accounts-*.sql.gz"))
    assert b"local_job_table" in gzip.decompress(saved.read_bytes())
    assert play(slurm, "site.yml") == UNCHANGED


def test_without_its_state_slurmctld_ends_the_jobs_and_their_accounts(slurm, job):
    """Comes last: of jobs that are counted from 1 again, sacct takes old ones for new."""
    assert steps(slurm, job)
    kill(state_dir(slurm) / "slurmctld.pid", signal.SIGKILL)
    shutil.rmtree(state_dir(slurm) / "state" / "slurmctld")
    options = {"slurm_options": ["SlurmdParameters=config_overrides", "DebugFlags=NO_CONF_HASH", "FirstJobId=1000"]}
    play(slurm, "site.yml", "-e", "slurm_forget_jobs=true", "-e", json.dumps(options))
    until(lambda: not steps(slurm, job), "the end of the job's processes")
    assert slurm.run("squeue", "-h") == ""
    assert slurm.run("sacct", "-X", "-n", "-P", "-j", job, "-o", "State") == "CANCELLED"
    assert slurm.run("sbatch", "--parsable", "--output=/dev/null", "--wrap=true") == "1000"
