"""The cluster that deploy/ansible configures: its accounts, its health check, and a second run of the play."""

import json
import os
import re
import subprocess
import time

import pytest

from slurm_cluster import play, until
from slurm_nodes import long_job, node, nodes_of, state_dir

pytestmark = [pytest.mark.slurm, pytest.mark.ansible]

XID = "[{:.3f}] NVRM: Xid (PCI:0000:3b:00): {}, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.\n"


def health(slurm, name: str, *arguments: str, **config) -> tuple[int, str]:
    """Runs the health check of a node, with parts of its configuration replaced. Returns exit code and output."""
    folder = state_dir(slurm) / "libexec"
    if config:
        whole = json.loads((folder / f"health-{name}.json").read_text()) | config
        name = "changed"
        (folder / "health-changed.json").write_text(json.dumps(whole))
    environment = os.environ | {"SLURMD_NODENAME": name}
    command = [folder / "node-health", *arguments]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    return ran.returncode, ran.stdout.strip() + ran.stderr


def test_the_second_run_changes_nothing(cluster):
    assert play(cluster, "site.yml") == {"head": 0, "n0": 0, "n1": 0}


def test_two_nodes_run_a_step_and_sacct_knows_it(slurm):
    echo = "echo $SLURMD_NODENAME $SLURM_JOB_ID"
    said = slurm.run("srun", "-N2", "-n2", "--mem=100", "--gpus-per-node=1", "bash", "-c", echo)
    (n0, job), (n1, same) = (line.split() for line in sorted(said.splitlines()))
    assert (n0, n1) == ("n0", "n1") and job == same
    query = ["sacct", "-X", "-n", "-P", "-j", job, "-o", "State,NodeList,AllocTRES"]
    until(lambda: slurm.run(*query).startswith("COMPLETED|n[0-1]|"), "the job in the accounts")
    assert "gres/gpu=2" in slurm.run(*query)


def test_an_xid_drains_the_node_and_its_job_moves_and_after_the_repair_the_node_returns(slurm, tmp_path):
    job = long_job(slurm, tmp_path)
    (first,) = nodes_of(tmp_path)
    other = {"n0": "n1", "n1": "n0"}[first]
    log = state_dir(slurm) / f"kernel-{first}.log"
    log.write_text(XID.format(time.monotonic(), 43) + XID.format(time.monotonic(), 79))
    until(lambda: node(slurm, first)[0].startswith("drain"), "the node drained")
    assert node(slurm, first)[1] == "health: XID 79 at PCI:0000:3b:00"
    until(lambda: nodes_of(tmp_path) == [first, other], "the job on the other node")
    assert slurm.show(job)["Restarts"] == "1" and node(slurm, other)[1] == "none"
    log.write_text("")  # the kernel's log forgets; the health check does not
    assert health(slurm, first, "--look") == (1, "XID 79 at PCI:0000:3b:00")
    assert health(slurm, first, "--repaired")[0] == 0
    until(lambda: node(slurm, first) == ("idle", "none"), "the node back")


def test_a_node_that_somebody_drained_stays_drained(slurm):
    slurm.run("scontrol", "update", "NodeName=n1", "State=DRAIN", "Reason=fans")
    assert health(slurm, "n1")[0] == 0
    assert node(slurm, "n1") == ("drained", "fans")
    slurm.run("scontrol", "update", "NodeName=n1", "State=RESUME")


def test_the_health_check_says_what_is_wrong(slurm, tmp_path, monkeypatch):
    log = tmp_path / "kernel.log"
    log.write_text(XID.format(1, 31) + XID.format(2, 48) + XID.format(3, 48) + "[4.2] usb 1-1: Xid\n")
    fresh = {"kernel_log": str(log), "memory": str(tmp_path / "memory.json")}
    assert health(slurm, "n0", "--look", **fresh) == (1, "XID 48 at PCI:0000:3b:00")
    fresh = {"kernel_log": "/dev/null", "memory": str(tmp_path / "memory.json")}
    assert health(slurm, "n0", "--look", **fresh, gpus=["/dev/null", f"{tmp_path}/gpu7"]) == (
        1,
        f"XID 48 at PCI:0000:3b:00; no {tmp_path}/gpu7",
    )
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho GPU 0: H200\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    two = {"gpus": ["/dev/null", "/dev/zero"], "memory": str(tmp_path / "none.json")}
    assert health(slurm, "n0", "--look", **fresh | two) == (1, "nvidia-smi lists 1 of 2 GPUs")
    (tmp_path / "memory.json").write_text(json.dumps({"boot": "an earlier one", "seen": ["x"], "repaired": []}))
    (tmp_path / "nvidia-smi").unlink()
    code, said = health(slurm, "n0", "--look", **fresh, disks=["/proc", "/"], disk_percent=1)
    assert code == 1 and re.fullmatch(r"/ is \d+ % full", said)
    assert health(slurm, "n0", "--look") == (0, "n0 is healthy")


def test_metrics_say_what_state_nodes_are_in(slurm):
    state = state_dir(slurm)
    slurm.run(str(state / "libexec" / "slurm-metrics"), str(state / "metrics"))
    said = (state / "metrics" / "slurm.prom").read_text()
    assert "\nslurm_nodes_idle 2\n" in said and "\nslurm_nodes_drain 0\n" in said and "\nslurm_jobs_running 0\n" in said
