"""Starts the local SLURM of two nodes for the tests in this folder."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm_cluster import LOCAL_CLUSTER, ROOT, Slurm, ansible_environment, free_ports

CANNOT = 77


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Slurm]:
    """The cluster, for the whole session, of which nothing was there before. Skips where a local SLURM cannot run."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs pip install '.[slurm]'")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: there are sockets in it
    folder.chmod(0o755)  # MariaDB and munge run as users of their own
    os.environ |= {"SLURM_LOCAL": str(folder), "SLURM_LOCAL_PORT": str(free_ports())}
    started = subprocess.run(
        [LOCAL_CLUSTER, "start"], env=ansible_environment(), capture_output=True, text=True, timeout=900
    )
    if started.returncode == CANNOT:
        pytest.skip(started.stderr.strip())
    assert started.returncode == 0, started.stderr
    environment = {k: v for k, v in os.environ.items() if k != "NPROC"}
    environment["XLA_FLAGS"] += " --xla_force_host_platform_device_count=1"
    environment["SLURM_CONF"] = started.stdout.strip().splitlines()[-1].removeprefix("export SLURM_CONF=")
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])
    environment["JAX_PLATFORMS"] = "cpu"
    environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path_factory.mktemp("compiled"))
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    slurm = Slurm(environment)
    yield slurm
    slurm.clear()
    subprocess.run([LOCAL_CLUSTER, "stop"], capture_output=True, timeout=300)
    shutil.rmtree(folder)


@pytest.fixture
def slurm(cluster) -> Iterator[Slurm]:
    """The cluster; no job and no waiting command outlives the test."""
    yield cluster
    cluster.clear()
