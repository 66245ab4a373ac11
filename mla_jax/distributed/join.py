"""Jobs of several processes, one per GPU: joining them, comparing their configs, and which one writes and prints.

How many there are comes from the environment: SLURM's inside `srun`, else JAX_COORDINATOR_ADDRESS (host:port of the
first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID. The only process joins no other, and it
writes and prints.
"""

import contextlib
import dataclasses
import errno
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from mla_jax.config import flatten
from mla_jax.distributed.decisions import all_gather_text
from mla_jax.errors import InputError, UsageError

JOIN_TIMEOUT_S = 300
"""Seconds that a process waits for the others to join; MLA_JOIN_TIMEOUT_S in the environment overrides it."""
SHUTDOWN_TIMEOUT_S = 20
"""Seconds that a process that ends waits for the others; one that failed must not keep its job alive for long."""


@dataclass(frozen=True)
class Process:
    """One process of a job."""

    coordinator: str
    """host:port of the first process."""
    count: int
    index: int
    device: int | None = None
    """The GPU of its node that it owns; None for all of them."""


def from_environment(environ: Mapping[str, str]) -> Process | None:
    """The process that the environment describes, None if it is the only one.

    Raises:
        UsageError: variables are missing or no numbers.
    """
    if "SLURM_STEP_NODELIST" in environ:  # only srun sets it; a shell of salloc has just the job's variables
        tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
        if (count := _number(environ, tasks)) == 1:
            return None
        port = environ.get("JAX_COORDINATOR_PORT") or 61440 + _number(environ, "SLURM_JOB_ID") % 4096
        coordinator = environ.get("JAX_COORDINATOR_ADDRESS") or f"{first_node(environ['SLURM_STEP_NODELIST'])}:{port}"
        index, device = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_LOCALID")
        if re.fullmatch(r"1(\(x\d+\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
            device = None  # the only one of its node has all of the node's GPUs
        return _checked(Process(coordinator, count, index, device))
    if "JAX_COORDINATOR_ADDRESS" in environ:
        count, index = _number(environ, "JAX_NUM_PROCESSES"), _number(environ, "JAX_PROCESS_ID")
        return _checked(Process(environ["JAX_COORDINATOR_ADDRESS"], count, index)) if count > 1 else None
    return None


def _number(environ: Mapping[str, str], name: str) -> int:
    if not environ.get(name, "").isdigit():
        raise UsageError(f"the environment needs {name} as a number beside the others, got {environ.get(name)!r}")
    return int(environ[name])


def _checked(process: Process) -> Process:
    if not re.fullmatch(r".+:\d+", process.coordinator) or int(process.coordinator.rsplit(":", 1)[1]) > 65535:
        raise UsageError(f"JAX_COORDINATOR_ADDRESS must be host:port, got {process.coordinator!r}")
    if process.index >= process.count:
        raise UsageError(f"process {process.index} of {process.count}: numbers go from 0 to {process.count - 1}")
    return process


def first_node(nodes: str) -> str:
    """The first name in a SLURM node list: `gpu[07-09,12],login` -> `gpu07`."""
    prefix, numbers, suffix = re.match(r"([^\[,]*)(?:\[(\d*)[^\]]*\])?([^\[,]*)", nodes).groups("")  # type: ignore
    return prefix + numbers + suffix


def join_job(environ: Mapping[str, str] = os.environ) -> None:
    """Joins the other processes of the job. Must run before anything uses a device.

    If some never come, the process ends with one line and exit code 1.

    Raises:
        UsageError: the environment contradicts itself.
        InputError: the first process's node cannot be found or reached, or its port is taken.
    """
    process = from_environment(environ)
    if process is None or jax.distributed.is_initialized():
        return
    timeout = int(environ.get("MLA_JOIN_TIMEOUT_S", JOIN_TIMEOUT_S))
    host, port = process.coordinator.rsplit(":", 1)
    _check_name(host)
    if process.index == 0:
        _check_port(int(port))
    else:
        _wait_for(host, int(port), timeout)
    with _end_after(timeout, process):
        jax.distributed.initialize(
            process.coordinator,
            process.count,
            process.index,
            process.device,
            cluster_detection_method="deactivate",
            initialization_timeout=timeout + 60,
            shutdown_timeout_seconds=SHUTDOWN_TIMEOUT_S,
        )


@contextlib.contextmanager
def _end_after(timeout: float, process: Process) -> Iterator[None]:
    """Ends this process in one line if the block takes too long; JAX would abort it with a stack trace."""

    def end() -> None:
        print(
            f"error: process {process.index} of {process.count} waited {timeout:g} s at {process.coordinator} for the "
            "others in vain; see their logs, or allow more time by MLA_JOIN_TIMEOUT_S",
            file=sys.stderr,
            flush=True,
        )
        os._exit(InputError.exit_code)

    timer = threading.Timer(timeout, end)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _check_name(host: str) -> None:
    try:  # JAX would retry a name that does not resolve until its timeout
        socket.getaddrinfo(host, None)
    except OSError as e:
        raise InputError(
            f"the first process's node {host!r} has no address here ({e.strerror}); add it to /etc/hosts or the name "
            "service of every node, or set JAX_COORDINATOR_ADDRESS=host:port to an address that all nodes reach"
        ) from e


def _check_port(port: int) -> None:
    try:
        with socket.socket(socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
    except OSError as e:
        if e.errno == errno.EADDRINUSE:
            raise InputError(
                f"port {port}, the coordinator's, is taken on {socket.gethostname()}; end what listens there "
                "or set JAX_COORDINATOR_PORT to a free one"
            ) from e
        raise InputError(f"port {port} cannot be used on {socket.gethostname()} ({e.strerror})") from e


def _wait_for(host: str, port: int, timeout: float) -> None:
    end = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as e:
            if time.monotonic() >= end:
                raise InputError(
                    f"the first process did not answer at {host}:{port} within {timeout:g} s ({e.strerror or e}); see "
                    "its log, and that no firewall is between the nodes"
                ) from e
            time.sleep(0.2)


def is_main() -> bool:
    """True on the process that prints, tracks metrics and writes files: the first one."""
    return jax.process_index() == 0


def print_on_main(message: str) -> None:
    """Prints on the main process."""
    if is_main():
        print(message, flush=True)


def check_same_config(config: Any) -> None:
    """Raises UsageError on every process if the dataclass `config` is not the same on all."""
    text = json.dumps(flatten(dataclasses.asdict(config)), sort_keys=True, default=str)
    first, *others = map(json.loads, all_gather_text(text))
    for index, other in enumerate(others, 1):
        differ = [
            f"{key} is {first.get(key)} on process 0 and {other.get(key)} on process {index}"
            for key in sorted(first.keys() | other.keys())
            if first.get(key) != other.get(key)
        ]
        if differ:
            raise UsageError(f"the processes disagree on the config: {'; '.join(differ)}; give all the same command")
