"""Decisions that all processes of a job must share: the first one decides and broadcasts."""

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from mla_jax.errors import InputError

_NOTHING, _FAILED = -1, -2


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
