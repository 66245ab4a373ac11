"""Attribution of the training loop's wall time, without ever waiting for the device."""

import contextlib
import time
from collections.abc import Iterator

import jax

KINDS = ("compute", "data", "compile", "checkpoint", "other")
"""Kinds of wall time:

compute     everything else: the device works, or could, and the host keeps up
data        the host waited for a batch, and the device had run out of work when it arrived
compile     tracing and compiling the step for a batch shape not met before in this process
checkpoint  blocked in saving, once the steps before are done
other       trackers, validation, and the start of the next stage's data
"""


class StepClock:
    """Seconds by kind since the clock was made. Kinds do not overlap and add up to the wall time."""

    def __init__(self):
        self._start = time.monotonic()
        self._spent: dict[str, float] = dict.fromkeys(KINDS, 0.0)

    @contextlib.contextmanager
    def spend(self, kind: str) -> Iterator[None]:
        """The time inside counts as `kind`; do not nest."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._spent[kind] += time.monotonic() - start

    @contextlib.contextmanager
    def wait_for_data(self, pending: list[dict[str, jax.Array]]) -> Iterator[None]:
        """The time inside counts as `data` if the device has by then finished all dispatched steps.

        Steps are dispatched ahead of the device, so a wait during which it still has work costs nothing. A wait that
        outlasts that work counts whole: an upper bound of the time that the device stood idle.

        Args:
            pending: results of the steps that were dispatched and not yet read, the newest last.
        """
        start = time.monotonic()
        yield
        if not pending or pending[-1]["loss"].is_ready():  # pyright: ignore[reportAttributeAccessIssue]
            self._spent["data"] += time.monotonic() - start

    def seconds(self) -> dict[str, float]:
        """Seconds by kind so far."""
        compute = time.monotonic() - self._start - sum(self._spent.values())
        return {**self._spent, "compute": max(compute, 0.0)}
