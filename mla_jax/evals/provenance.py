"""The provenance of a measurement, kept beside it."""

import os
import platform
from datetime import UTC, datetime

import jax

import mla_jax
from mla_jax.observability.environment import command_line, git_revision


def provenance() -> dict:
    """Date (UTC), command, package version, git revision, hardware and other versions of this process, JSON-able."""
    devices = jax.devices()
    hardware = f"{len(devices)} x {devices[0].device_kind}"
    if devices[0].platform == "cpu":
        hardware = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "version": mla_jax.__version__,
        "git_revision": git_revision(),
        "hardware": hardware,
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
