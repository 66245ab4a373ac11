"""Barriers of background work that end at once on every process when that work has failed on one."""

import itertools
import sys
import time
from collections import Counter

import jax
from jax._src import distributed  # the key-value store of the coordination service has no public name

from mla_jax.errors import InputError, first_line

POLL_S = 2.0
"""Seconds between looks for a failure while waiting."""

_instances = itertools.count()


class FailFastBarrier:
    """Barriers of all processes, as Orbax's `AsyncOptions.barrier_sync_fn` takes them, and the first failure of any.

    Orbax's own barriers let the others wait for a process whose write failed until their time is over, and never say
    why. All processes make these objects in the same order, and use each alike. Threads may wait.
    """

    def __init__(self):
        self._prefix = f"mla_jax/barrier/{next(_instances)}"
        self._calls: Counter[str] = Counter()
        self._client = distributed.global_state.client

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Returns when all processes have called with this key as often as this one.

        Called while an exception is handled, as Orbax does at the end of a save that failed, tells the others of it.

        Raises:
            InputError: another process has failed: its number and why.
            TimeoutError: `timeout_ms` are over.
        """
        if self._client is None:
            return
        if (error := sys.exception()) is not None:
            self.fail(error)
            return
        client, end = self._client, time.monotonic() + timeout_ms / 1000
        self._calls[key] += 1
        name = f"{self._prefix}/{key}/{self._calls[key]}"
        if client.key_value_increment(f"{name}/arrived", 1) == jax.process_count():
            client.key_value_set(f"{name}/open", "")
        while True:
            if failure := self.failure():
                raise InputError(failure)
            try:
                client.blocking_key_value_get(f"{name}/open", int(POLL_S * 1000))
                return
            except jax.errors.JaxRuntimeError as e:
                if "DEADLINE_EXCEEDED" not in str(e):
                    raise
            if time.monotonic() > end:
                raise TimeoutError(f"some processes did not come to {key} within {timeout_ms / 1000:g} s")

    def post(self, key: str, text: str) -> None:
        """Leaves a text for the first process to `collect`, once the others have passed a barrier after it."""
        if self._client is not None:
            self._client.key_value_set(f"{self._prefix}/posts/{key}/{jax.process_index()}", text)

    def collect(self, key: str) -> list[str]:
        """The texts that processes posted, in their order; they are gone afterwards. Empty for the only process."""
        if self._client is None:
            return []
        names = [f"{self._prefix}/posts/{key}/{process}" for process in range(jax.process_count())]
        texts = [text for name in names if (text := self._get(name)) is not None]
        self._client.key_value_delete(f"{self._prefix}/posts/{key}/")
        return texts

    def fail(self, error: BaseException) -> None:
        """Ends the waits of all processes, now and later; the first of several failures counts."""
        if self._client is None or self.failure():
            return
        try:
            self._client.key_value_set(f"{self._prefix}/failure", f"process {jax.process_index()}: {first_line(error)}")
        except jax.errors.JaxRuntimeError as e:
            if "ALREADY_EXISTS" not in str(e):  # another was faster
                raise

    def failure(self) -> str | None:
        """The number and the error of the first process that failed; None if none has, or this is the only process."""
        return self._get(f"{self._prefix}/failure")

    def _get(self, name: str) -> str | None:
        if self._client is None:
            return None
        try:
            return self._client.key_value_try_get(name)
        except jax.errors.JaxRuntimeError:  # no such key
            return None
