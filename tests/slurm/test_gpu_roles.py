"""The roles of nodes with GPUs, in a throwaway Debian; neither a GPU nor NVIDIA's repository is here."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from slurm_cluster import ANSIBLE
from throwaway_debian import Debian, make_repository, run

pytestmark = pytest.mark.ansible

PINNING = "Package: nvidia-*\nPin: version {}.*\nPin-Priority: 1001\n"


@pytest.fixture(scope="module")
def debian(tmp_path_factory) -> Debian:
    if os.geteuid() or not shutil.which("debootstrap") or not shutil.which("gpg"):
        pytest.skip("needs root, debootstrap and gpg")
    return Debian.make(tmp_path_factory.mktemp("debian") / "root")


@pytest.fixture(scope="module")
def repository(debian) -> dict[str, str]:
    """A repository as NVIDIA's is, of empty packages: the variables that make the roles use it."""
    branches = {b: f"nvidia-driver-pinning-{b}" for b in ("580", "595")}
    pinning = [
        {"Package": name, "Version": b, "Provides": "nvidia-driver-pinning", "Conflicts": "nvidia-driver-pinning"}
        for b, name in branches.items()
    ]
    open_modules = [{"Package": "nvidia-open", "Version": v} for v in ("580.95.05", "580.105.08", "595.45.04")]
    others = ["datacenter-gpu-manager-4-cuda13", "datacenter-gpu-manager-exporter", "nvidia-container-toolkit"]
    files = {name: {"etc/apt/preferences.d/nvidia-driver-pinning": PINNING.format(b)} for b, name in branches.items()}
    files["datacenter-gpu-manager-exporter"] = {"usr/bin/dcgm-exporter": "#!/bin/sh\n"}
    folder = debian.root / "repository"
    make_repository(folder, [*pinning, *open_modules, *({"Package": p, "Version": "1"} for p in others)], files)
    (debian.root / "toolkit").symlink_to("repository")
    return {
        "nvidia_driver_repository": "file:///repository",
        "nvidia_driver_repository_key": "file:///repository/key.gpg",
        "docker_toolkit_repository": "file:///toolkit",
        "docker_toolkit_key": "file:///toolkit/key.asc",
    }


def test_the_driver_stays_on_its_branch_and_changes_it_when_told(debian, repository):
    without = {"common_time_sync": False, "nvidia_driver_headers": False}
    variables = repository | without | {"nvidia_driver_branch": "580"}
    assert debian.play("common", "nvidia_driver", **variables) > 0
    assert debian.version("nvidia-open") == "580.105.08"
    assert debian.play("common", "nvidia_driver", **variables) == 0
    assert "nouveau" in (debian.root / "etc/modprobe.d/blacklist-nouveau.conf").read_text()
    blocked = run("chroot", debian.root, "apt-config", "dump", "Unattended-Upgrade::Package-Blacklist")
    assert '"nvidia-"' in blocked and '"libnvidia-"' in blocked
    for branch, version in (("595", "595.45.04"), ("580", "580.105.08")):
        upgrade = variables | {"nvidia_driver_branch": branch, "nvidia_driver_package_state": "latest"}
        debian.play("nvidia_driver", **upgrade)
        assert debian.version("nvidia-open") == version


def test_dcgm_exporter_counts_xids_as_a_user_of_its_own(debian, repository):
    debian.play("common", "nvidia_driver", common_time_sync=False, nvidia_driver_headers=False, **repository)
    assert debian.play("dcgm_exporter") > 0
    assert debian.play("dcgm_exporter") == 0
    assert "\nDCGM_EXP_XID_ERRORS_COUNT, " in (debian.root / "etc/dcgm-exporter/counters.csv").read_text()
    assert "dcgm-exporter:" in (debian.root / "etc/passwd").read_text()
    unit = debian.root / "etc/systemd/system/dcgm-exporter.service"
    assert "User=dcgm-exporter\n" in unit.read_text() and "--address 127.0.0.1:9400\n" in unit.read_text()


def test_docker_with_the_container_toolkit(debian, repository):
    assert debian.play("docker", groups=("serving", "gpu"), **repository) > 0
    assert debian.play("docker", groups=("serving", "gpu"), **repository) == 0
    configuration = json.loads((debian.root / "etc/docker/daemon.json").read_text())
    assert configuration["runtimes"]["nvidia"]["path"] == "nvidia-container-runtime"
    assert debian.version("docker.io") and debian.version("nvidia-container-toolkit") == "1"
    assert Path(debian.root / "usr/sbin/dockerd").exists()


def test_the_driver_of_the_distribution_really_installs(tmp_path_factory):
    """Debian's is too old for training, and its libraries are those of a driver."""
    debian = Debian.make(tmp_path_factory.mktemp("distribution") / "root")
    variables = {
        "common_time_sync": False,
        "nvidia_driver_source": "distribution",
        "nvidia_driver_headers": False,
        "nvidia_driver_packages": ["nvidia-smi", "libcuda1", "nvidia-persistenced"],
    }
    assert debian.play("common", "nvidia_driver", **variables) > 0
    assert debian.play("common", "nvidia_driver", **variables) == 0
    assert int(debian.version("libcuda1").split(".")[0]) >= 535
    assert list(debian.root.glob("usr/lib/x86_64-linux-gnu/libcuda.so.*"))
    assert "nvidia-smi lists 0 of 1 GPUs (NVIDIA-SMI has failed because " in health(debian)  # there is no module


def health(debian: Debian) -> str:
    """What the health check says inside, where one GPU is expected."""
    folder = debian.root / "health"
    folder.mkdir()
    shutil.copy(ANSIBLE / "roles" / "slurm" / "files" / "node-health", folder)
    configuration = {"slurm_conf": "", "gpus": ["/dev/null"], "kernel_log": "/dev/null", "ignored": [], "disks": []}
    (folder / "health-g1.json").write_text(json.dumps(configuration | {"memory": "/health/memory.json"}))
    inside = ["unshare", "--mount", "chroot", debian.root, "env", "SLURMD_NODENAME=g1", "sh", "-c"]
    look = "mount -t proc proc /proc && python3 /health/node-health --look"
    return subprocess.run([*inside, look], capture_output=True, text=True, timeout=60).stdout
