"""What is wrong with an inventory is said in a line, before anything is changed."""

import json
import subprocess
from pathlib import Path

import pytest

from slurm_cluster import ANSIBLE, ansible_environment

pytestmark = pytest.mark.ansible
CI = pytest.mark.slurm  # make test-slurm, which .ci/run calls, runs these too

GOOD = """
all:
  vars: {ansible_connection: local, ansible_host: 127.0.0.1, common_free_mb: 1}
  children:
    controller: {hosts: {ctl1: }}
    accounting: {hosts: {ctl1: }}
    compute: {hosts: {n1: }}
"""
SECRETS = {"vault_slurm_munge_key": "0" * 64, "vault_slurm_database_password": "1" * 64}


def check(tmp_path: Path, inventory: str, **variables: object) -> subprocess.CompletedProcess:
    (tmp_path / "hosts.yml").write_text(inventory)
    extra = [f"--extra-vars={json.dumps(variables)}"]
    environment = ansible_environment() | {"ANSIBLE_CACHE_PLUGIN_CONNECTION": str(tmp_path / "facts")}
    command = ["ansible-playbook", "--inventory", tmp_path / "hosts.yml", ANSIBLE / "site.yml", *extra]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, cwd=tmp_path)


@pytest.mark.parametrize(
    ("inventory", "variables", "message"),
    [
        pytest.param(
            GOOD.replace("controller:", "login:"),
            SECRETS,
            "0 hosts in the group `controller`; SLURM needs exactly one",
            marks=CI,
        ),
        pytest.param(
            GOOD, {}, "vault_slurm_munge_key is not set: put what `openssl rand -hex 64` prints into", marks=CI
        ),
        (GOOD, SECRETS | {"vault_slurm_munge_key": "short"}, "vault_slurm_munge_key has fewer than 32 characters"),
        (GOOD, SECRETS | {"vault_slurm_database_password": "x'; DROP"}, "needs at least 16 letters or digits"),
        (GOOD, SECRETS | {"common_free_mb": 10**9}, "MB left on /var and needs 1000000000: free some"),
        (GOOD, SECRETS | {"common_supported": {"Ubuntu": ["24.04"]}}, "supported are Ubuntu 24.04"),
        (
            GOOD + "    gpu: {hosts: {n1: }}\n",
            SECRETS | {"common_pci_devices": "/nowhere"},
            "n1 is in the group `gpu` and has no",
        ),
        (
            GOOD.replace("{n1: }", "{n1: , n2: {ansible_connection: ssh, ansible_port: 1}}"),
            SECRETS,
            "n2 does not answer and never did, so slurm.conf cannot say what it has",
        ),
    ],
    ids=["no controller", "no secret", "short secret", "password", "full disk", "distribution", "no GPU", "unknown"],
)
def test_a_bad_inventory_is_one_line(tmp_path, inventory, variables, message):
    ran = check(tmp_path, inventory, **variables)
    assert ran.returncode != 0 and "changed=0" in ran.stdout and "changed=1" not in ran.stdout
    lines = [line for line in ran.stdout.splitlines() if message in line]
    assert lines and lines[0].startswith("[ERROR]: "), ran.stdout + ran.stderr


@CI
def test_ansible_lint_production(tmp_path):
    ran = subprocess.run(
        ["ansible-lint"], env=ansible_environment(), capture_output=True, text=True, cwd=ANSIBLE, timeout=900
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
