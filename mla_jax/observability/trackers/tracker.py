"""The interface of a tracker."""

from typing import Protocol

CLOSE_SECONDS = 20
"""The longest that the end of training waits for a tracker's server: a job that is being stopped has little time."""


class Tracker(Protocol):
    """Takes scalar metrics by optimizer step."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Records `metrics` at `step`."""
        ...

    def close(self, finished: bool) -> None:
        """Writes what is buffered; `finished` is False if training stops before its end."""
        ...
