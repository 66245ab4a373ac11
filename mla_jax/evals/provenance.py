"""Where a measured number comes from, kept beside it."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import jax


def provenance() -> dict:
    """Where and when a number was measured: date (UTC), command, git revision, hardware, versions."""
    devices = jax.devices()
    hardware = f"{len(devices)} x {devices[0].device_kind}"
    if devices[0].platform == "cpu":
        hardware = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "git_revision": _git_revision(),
        "hardware": hardware,
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def _git_revision() -> str | None:
    """The checked-out commit of this source, `-dirty` if it was changed since; None outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
