"""Decisions that all processes of a job must share: the first one decides and broadcasts, or all must agree."""

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from mla_jax.errors import InputError, first_line

VISIBLE_WITHIN_S = 90.0
"""Seconds that a process waits to see a file that the first one sees; NFS keeps what it knew for up to 60."""

_NOTHING, _FAILED = -1, -2

T = TypeVar("T")


def broadcast_decision(decide: Callable[[], int | None]) -> int | None:
    """Returns on every process what `decide` returns on the first; all must call this at the same point.

    Only the first process runs `decide`, so what it reads, writes and prints is read, written and printed once.

    Args:
        decide: returns a number >= 0 or None.

    Raises:
        InputError: `decide` raised an error, which the first process raises itself; the others point to it.
    """
    if jax.process_count() == 1:
        return decide()
    error, answer = None, None
    if jax.process_index() == 0:
        try:
            answer = decide()
        except Exception as e:  # whatever it is, the others must not wait for an answer
            error = e
    code = _FAILED if error else _NOTHING if answer is None else answer
    code = int(multihost_utils.broadcast_one_to_all(np.int32(code)))
    if error:
        raise error
    if code == _FAILED:
        raise InputError("process 0 cannot go on; its message says why")
    return None if code == _NOTHING else code


def all_gather_text(text: str) -> list[str]:
    """The text of every process, by its number; all must call this at the same point."""
    if jax.process_count() == 1:
        return [text]
    encoded = text.encode()
    length = int(multihost_utils.process_allgather(np.int32(len(encoded))).max())
    rows = multihost_utils.process_allgather(np.frombuffer(encoded.ljust(length, b"\0"), np.uint8))
    return [bytes(row).rstrip(b"\0").decode() for row in rows]


def on_all(read: Callable[[], T]) -> T:
    """Returns what `read` returns on this process; all must call this at the same point.

    Args:
        read: looks at something that all processes should find alike, such as a file; calls no other process.

    Raises:
        InputError: `read` raised an error on some process, which raises it itself; the others say which one and why.
    """
    if jax.process_count() == 1:
        return read()
    result, error = None, None
    try:
        result = read()
    except Exception as e:  # as above
        error = e
    failures = all_gather_text(first_line(error) if error else "")
    if error:
        raise error
    for index, failure in enumerate(failures):
        if failure:
            raise InputError(f"process {index} cannot go on: {failure}")
    return result  # pyright: ignore[reportReturnType]


def wait_until_visible(path: Path) -> None:
    """Returns when every process sees `path`, which the first one does: network file systems show some of it late.

    All must call this at the same point.

    Raises:
        InputError: a process does not see it within VISIBLE_WITHIN_S.
    """
    on_all(lambda: _wait_until_visible(path))


def _wait_until_visible(path: Path) -> None:
    end = time.monotonic() + VISIBLE_WITHIN_S
    while not path.exists():
        if time.monotonic() > end:
            raise InputError(
                f"{path} did not appear on {socket.gethostname()} within {VISIBLE_WITHIN_S:g} s, though process 0 sees "
                "it; put the run on a disk that all nodes share, or run the same command again"
            )
        time.sleep(0.5)
