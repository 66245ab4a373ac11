"""Environment of a run or a measurement: source revision, versions, devices, SLURM job."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import jax

PACKAGES = (
    "jax jaxlib flax optax orbax-checkpoint grain numpy hydra-core tokenizers triton jax-triton "
    "jax-cuda13-plugin nvidia-cudnn-cu13 nvidia-nccl-cu13"
).split()
"""Installed packages whose versions are kept."""


def git_revision() -> str | None:
    """The checked-out commit of this source, `-dirty` if it was changed since; None outside a git checkout of it."""
    source = Path(__file__)

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=source.parent, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", source.name)  # an installed copy may lie in a checkout of something else
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def command_line() -> str:
    """The command that started this process."""
    return shlex.join(["python", *sys.orig_argv[1:]])


def environment() -> dict:
    """JSON-able: command, git revision, Python, platform, devices, processes, package versions, SLURM job."""
    return {
        "command": command_line(),
        "git_revision": git_revision(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device_kind": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
