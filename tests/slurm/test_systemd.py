"""A bare Debian 13 with systemd, booted in a container, becomes a cluster of one machine by the play."""

import json
import os
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from slurm_cluster import ANSIBLE, ansible_environment, free_ports, until
from throwaway_debian import connection, run

pytestmark = pytest.mark.ansible

PACKAGES = "systemd,systemd-sysv,dbus,python3,python3-apt,ca-certificates"
UNITS = [
    *"munge mariadb slurmdbd slurmctld slurmd prometheus-node-exporter".split(),
    *"slurm-save.timer slurm-metrics.timer".split(),
]
GROUPS = ("controller", "accounting", "compute", "login")
PORTS = [
    *"slurm_controller_port slurm_accounting_port slurm_node_port slurm_database_port".split(),
    "node_exporter_port",
]


class Machine:
    """A container whose first process is systemd; its network is that of this machine."""

    def __init__(self, root: Path):
        self.root = root
        self.ports = {name: port for port, name in enumerate(PORTS, free_ports())}

    def boot(self) -> None:
        """Starts it and waits until it has booted."""
        options = "--boot --machine=one --register=no --keep-unit".split()
        same = f"--bind={self.root}"  # paths of its files are the same inside
        command = ["systemd-nspawn", *options, f"--directory={self.root}", same]
        environment = os.environ | {"SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"}  # Debian 13 knows no other
        with (self.root.parent / "console").open("w") as console:
            self.container = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=console, stderr=console
            )
        until(self.is_up, "the machine up", 300, (self.root.parent / "console").read_text)

    def enter(self) -> str:
        """The command that leads inside."""
        (init,) = Path(f"/proc/{self.container.pid}/task/{self.container.pid}/children").read_text().split()
        return f"nsenter --target={init} --all"

    def run(self, *command: str) -> str:
        """Standard output of a command inside; fails if it fails."""
        return run(*self.enter().split(), *command)

    def is_up(self) -> bool:
        """Whether it has booted."""
        with suppress(AssertionError, OSError, ValueError):
            return self.run("sh", "-c", "systemctl is-system-running || true").strip() in ("running", "degraded")
        return False

    def play(self, *arguments: str) -> int:
        """Runs a playbook, which must succeed. Returns how many tasks changed something."""
        variables = {
            **self.ports,
            "common_time_sync": False,  # the clock is this machine's
            "slurm_cgroups": False,  # and so are the cgroups
            "vault_slurm_munge_key": "0" * 64,
            "vault_slurm_database_password": "1" * 64,
        }
        groups = {group: {"hosts": {"one": {}}} for group in GROUPS}
        inventory = {"all": {"hosts": {"one": connection(self.root, self.enter())}, "children": groups}}
        folder = self.root.parent
        (folder / "inventory.json").write_text(json.dumps(inventory))
        environment = ansible_environment() | {
            "ANSIBLE_BECOME_ALLOW_SAME_USER": "1",
            "ANSIBLE_CACHE_PLUGIN_CONNECTION": str(folder / "facts"),
        }
        command = ["ansible-playbook", "-i", folder / "inventory.json", f"--extra-vars={json.dumps(variables)}"]
        said = run(*command, *arguments, cwd=ANSIBLE, env=environment)
        return int(re.findall(r"^one +: ok=\d+ +changed=(\d+)", said, re.M)[0])


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> Iterator[Machine]:
    if os.geteuid() or not shutil.which("debootstrap") or not shutil.which("systemd-nspawn"):
        pytest.skip("needs root, debootstrap and systemd-nspawn: make debootstrap")
    root = tmp_path_factory.mktemp("systemd") / "root"
    run("debootstrap", "--variant=minbase", f"--include={PACKAGES}", "trixie", root)
    (root / "etc" / "hostname").write_text("one\n")
    machine = Machine(root)
    try:
        machine.boot()
        yield machine
    finally:
        machine.container.terminate()  # it shuts down
        machine.container.wait(120)
    shutil.rmtree(root)


def test_a_bare_machine_becomes_a_cluster_and_is_one_again_after_booting(machine):
    assert machine.play("site.yml") > 0
    assert machine.play("site.yml", "--check", "--diff") == 0
    assert machine.run("srun", "hostname") == "one\n"
    machine.run("systemctl", "stop", "slurmd", "slurm-save.timer")
    assert machine.play("site.yml") == 2
    machine.run("systemctl", "reboot")
    machine.container.wait(120)
    machine.boot()
    states = machine.run("sh", "-c", f"systemctl is-active {' '.join(UNITS)} || true").split()
    assert dict(zip(UNITS, states, strict=True)) == dict.fromkeys(UNITS, "active")
    until(lambda: machine.run("sinfo", "--noheader", "--format=%T") == "idle\n", "the node idle")
    assert machine.run("srun", "hostname") == "one\n"
    sacct = "sacct --allocations --noheader --parsable2 --starttime=today --format=JobName,State".split()
    done = ["hostname|COMPLETED"] * 2
    until(lambda: machine.run(*sacct).splitlines() == done, "both jobs in the accounts")
    assert machine.play("site.yml") == 0

    def metrics() -> str:
        address = f"http://127.0.0.1:{machine.ports['node_exporter_port']}/metrics"
        return urllib.request.urlopen(address, timeout=10).read().decode()

    until(lambda: "\nslurm_nodes_idle 1\n" in metrics(), "the state of the node among the metrics")
