"""What may happen to a cluster: what it does by itself, and that what docs/cluster.md says to do mends it."""

import shutil
import signal
from pathlib import Path

import pytest

from slurm_cluster import play, until
from slurm_nodes import kill, long_job, node, nodes_of, refusal, restart, state_dir, steps, wait_until_written

pytestmark = pytest.mark.ansible

OTHER = {"n0": "n1", "n1": "n0"}
GPUS = "".join(f"GPU {i}: NVIDIA H200\n" for i in range(4))
MISMATCH = "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 580.105\n"


@pytest.fixture
def job(slurm, tmp_path) -> str:
    """A job that runs until it is ended."""
    return long_job(slurm, tmp_path)


def save(slurm) -> None:
    """Saves the jobs' state as it is now."""
    wait_until_written(slurm)
    slurm.run(str(state_dir(slurm) / "libexec" / "slurm-save"))


def jobs(slurm) -> dict[str, str]:
    """The state of each job in the queue."""
    return dict(line.split() for line in slurm.run("squeue", "-h", "-o", "%A %T").splitlines())


def test_a_lost_state_is_put_back_and_jobs_run_on(slurm, tmp_path, job):
    save(slurm)
    (tmp_path / "later").mkdir()
    later = long_job(slurm, tmp_path / "later")
    known = {number: state for number, state in jobs(slurm).items() if number != later}
    kill(state_dir(slurm) / "slurmctld.pid", signal.SIGKILL)
    shutil.rmtree(state_dir(slurm) / "state" / "slurmctld")
    assert "has lost the jobs' state" in refusal(slurm, "site.yml")
    play(slurm, "restore.yml")
    assert known[job] == "RUNNING" and jobs(slurm) == known
    # The next job gets the later one's number.
    until(lambda: not steps(slurm, later), "the end of the later job's processes")
    assert steps(slurm, job) and slurm.show(job)["Restarts"] == "0"


def test_a_state_that_cannot_be_read_is_put_back(slurm, job):
    save(slurm)
    kill(state_dir(slurm) / "slurmctld.pid", signal.SIGKILL)
    written = state_dir(slurm) / "state" / "slurmctld" / "job_state"
    written.write_bytes(written.read_bytes()[:300])
    refusal(slurm, "site.yml")
    assert "Incomplete job state save file" in (state_dir(slurm) / "slurmctld.log").read_text(errors="replace")
    play(slurm, "restore.yml")
    assert jobs(slurm)[job] == "RUNNING" and slurm.show(job)["Restarts"] == "0"


def test_a_wrong_clock_takes_a_node_away_until_it_is_set(slurm, tmp_path, job):
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
    if not library:
        pytest.skip("needs libfaketime")
    wrong = nodes_of(tmp_path)[0]
    clock = state_dir(slurm) / f"clock-{wrong}"
    clock.write_text("+0\n")
    fake = {"LD_PRELOAD": str(library), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1"}
    for daemon in ("munge", "slurmd"):
        restart(slurm, f"{daemon}-{wrong}", **fake, FAKETIME_DONT_FAKE_MONOTONIC="1")
    until(lambda: node(slurm, wrong) == ("mixed", "none"), "the node up")
    clock.write_text("+600\n")
    until(lambda: node(slurm, wrong)[0].startswith("down"), "the node down")
    until(lambda: nodes_of(tmp_path) == [wrong, OTHER[wrong]], "the job on the other node")
    assert f"does not understand {wrong} (munge: Rewound credential (" in refusal(slurm, "site.yml")
    assert "Expired credential" in (state_dir(slurm) / f"slurmd-{wrong}.log").read_text(errors="replace")
    clock.write_text("+0\n")
    until(lambda: node(slurm, wrong)[0] == "idle", "the node back")
    for daemon in ("munge", "slurmd"):
        restart(slurm, f"{daemon}-{wrong}", LD_PRELOAD="")


def test_a_wrong_key_of_munge_takes_a_node_away_until_the_play_mends_it(slurm, tmp_path, job):
    wrong = nodes_of(tmp_path)[0]
    log = state_dir(slurm) / f"slurmd-{wrong}.log"
    before = log.read_text(errors="replace").count("Invalid credential")
    (state_dir(slurm) / f"munge-{wrong}" / "munge.key").write_text("1" * 64)
    restart(slurm, f"munge-{wrong}")
    until(lambda: node(slurm, wrong)[0].startswith("down"), "the node down")
    assert log.read_text(errors="replace").count("Invalid credential") > before
    until(lambda: nodes_of(tmp_path) == [wrong, OTHER[wrong]], "the job on the other node")
    assert play(slurm, "site.yml")[wrong] == 2
    until(lambda: node(slurm, wrong)[0] == "idle", "the node back")


def test_a_driver_that_does_not_match_drains_the_node(slurm, tmp_path, job):
    """A stand-in for nvidia-smi, which only this node's slurmd sees, prints what NVIDIA's does."""
    old = nodes_of(tmp_path)[0]
    stand_in = state_dir(slurm) / "stand-in"
    stand_in.mkdir(exist_ok=True)
    said = state_dir(slurm) / "nvidia-smi.out"
    said.write_text(GPUS)
    (stand_in / "nvidia-smi").write_text(f"#!/bin/sh\nexec cat {said}\n")
    (stand_in / "nvidia-smi").chmod(0o755)
    restart(slurm, f"slurmd-{old}", f"mount -t overlay -o lowerdir={stand_in}:/usr/bin overlay /usr/bin")
    until(lambda: node(slurm, old) == ("mixed", "none"), "the node up")
    said.write_text(MISMATCH)
    until(lambda: node(slurm, old)[0].startswith("drain"), "the node drained")
    why = MISMATCH.partition("\n")[0]
    assert node(slurm, old)[1] == f"health: nvidia-smi lists 0 of 4 GPUs ({why})"
    until(lambda: nodes_of(tmp_path) == [old, OTHER[old]], "the job on the other node")
    said.write_text(GPUS)
    until(lambda: node(slurm, old) == ("idle", "none"), "the node back")


def test_a_full_disk_drains_the_node_and_its_jobs_go_on(slurm, tmp_path, job):
    full = nodes_of(tmp_path)[0]
    disk = tmp_path / "disk"
    disk.mkdir()
    slurmd = restart(slurm, f"slurmd-{full}", f"mount -t tmpfs -o size=1m tmpfs {disk}")
    file = slurmd / "root" / disk.relative_to("/") / "file"
    looked_at = state_dir(slurm) / "libexec" / f"health-{full}.json"
    configuration = looked_at.read_text()
    try:
        looked_at.write_text(configuration.replace('"/var"', f'"{disk}"'))
        file.write_bytes(bytes(2**20))
        until(lambda: node(slurm, full)[1] == f"health: {disk} is 100 % full", "the node drained")
        assert slurm.show(job)["JobState"] == "RUNNING"
        file.unlink()
        until(lambda: node(slurm, full) == ("mixed", "none"), "the node back")
        assert nodes_of(tmp_path) == [full]
    finally:
        looked_at.write_text(configuration)


def test_accounts_are_put_back_and_catch_up(slurm):
    states = ["sacct", "-X", "-n", "-P", "--name=saved,unaccounted", "-o", "JobName,State"]
    slurm.run("srun", "--job-name=saved", "true")
    until(lambda: slurm.run(*states) == "saved|COMPLETED", "the job in the accounts")
    slurm.run(str(state_dir(slurm) / "libexec" / "slurm-save"))
    kill(state_dir(slurm) / "slurmdbd.pid", signal.SIGKILL)
    mariadb = f"mariadb --no-defaults --socket={state_dir(slurm)}/mariadb/socket"
    slurm.run(*mariadb.split(), "-e", "DROP DATABASE slurm_acct_db; CREATE DATABASE slurm_acct_db")
    saved = max((state_dir(slurm) / "state" / "saved").glob("accounts-*.sql.gz"))
    slurm.run("sh", "-c", f"zcat {saved} | {mariadb} slurm_acct_db")
    kill(state_dir(slurm) / "mariadb.pid", signal.SIGKILL)
    slurm.run("srun", "--job-name=unaccounted", "true")
    play(slurm, "site.yml")
    both = ["saved|COMPLETED", "unaccounted|COMPLETED"]
    until(lambda: slurm.run(*states).splitlines() == both, "both jobs in the accounts")
