"""Processes that wait for each other: what they print, and a port for them."""

import socket
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager


def printed_by(processes: Sequence[subprocess.Popen], timeout: float) -> list[tuple[str, str]]:
    """Output and errors of each until its end; kills all that run after `timeout` seconds.

    All are read at once: one that writes more than a pipe holds waits for its reader, and the others for it.
    """
    try:
        with ThreadPoolExecutor(len(processes)) as threads:
            return list(threads.map(lambda process: process.communicate(timeout=timeout), processes))
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextmanager
def held_port() -> Iterator[int]:
    """A port of this machine that nobody else is given in the block, where one that sets SO_REUSEADDR can listen."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("", 0))
        yield held.getsockname()[1]
