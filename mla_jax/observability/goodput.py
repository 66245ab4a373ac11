"""Goodput: the share of the time since a run first started that went into steps which were kept.

RUN/goodput.json outlives restarts. Steps after the last checkpoint are computed again after an interruption: their
first computation is lost time. What no process accounts for is `restart`: start-up, restoring, queues, and the time
between the last record of a process that was killed and its end.
"""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path

from mla_jax.errors import InputError
from mla_jax.files import write_json
from mla_jax.observability.step_time import KINDS

FILE = "goodput.json"
_MARKS = 50
"""Checkpoints whose productive time is remembered: more than are kept, so that any of them can be restored."""


class Goodput:
    """The account of one run, continued by each process that trains it.

    Args:
        run_dir: the run folder, which must exist.
        step: finished steps that this process starts from; what was computed beyond them is lost.
        write: whether this process keeps the file (one of all processes does).
        now: seconds since the epoch, for tests.
    """

    def __init__(self, run_dir: Path, step: int, write: bool = True, now: Callable[[], float] = time.time):
        self._path, self._write, self._now = run_dir / FILE, write, now
        self._started = now()
        self._seconds = dict.fromkeys((*KINDS, "lost"), 0.0)
        self._marks: list[list[float]] = []  # [step, productive seconds up to it] of checkpoints, ascending
        if self._path.exists():
            self._continue(step)
        self._before = dict(self._seconds)  # of earlier processes
        self.wall = 0.0
        """Seconds since the run first started, at the last `update`."""
        self._save()

    def _continue(self, step: int) -> None:
        try:
            saved = json.loads(self._path.read_text(encoding="utf-8"))
            started = float(saved["started"])
            seconds = {kind: float(saved["seconds"][kind]) for kind in self._seconds}
            marks = [[int(s), float(productive)] for s, productive in saved["marks"] if s <= step]
        except (OSError, ValueError, KeyError, TypeError) as e:  # no reason not to train
            print(f"{self._path} cannot be read ({e}); goodput is counted from now on")
            return
        kept = marks[-1][1] if marks else 0.0
        lost = seconds["lost"] + seconds["compute"] - kept
        self._started, self._marks = started, marks
        self._seconds = seconds | {"compute": kept, "lost": lost}

    def update(self, spent: dict[str, float]) -> dict[str, float]:
        """Takes the seconds by kind that this process has spent so far; returns shares of the run's wall time.

        They add up to 1: `goodput` (steps that were kept), data, compile, checkpoint, other, lost, restart.
        """
        for kind in KINDS:
            self._seconds[kind] = self._before[kind] + spent[kind]
        self.wall = max(self._now() - self._started, sum(self._seconds.values()), 1e-9)
        shares = {kind: seconds / self.wall for kind, seconds in self._seconds.items()}
        shares["goodput"] = shares.pop("compute")
        shares["restart"] = max(1.0 - sum(shares.values()), 0.0)
        self._save()
        return shares

    def mark(self, step: int, spent: dict[str, float]) -> None:
        """As `update`, where the checkpoint of `step` is saved: what was computed so far is kept from here on."""
        self._seconds |= {kind: self._before[kind] + spent[kind] for kind in KINDS}
        earlier = [mark for mark in self._marks if mark[0] < step]
        self._marks = [*earlier[1 - _MARKS :], [step, self._seconds["compute"]]]
        self._save()

    def _save(self) -> None:
        if not self._write:
            return
        account = {"started": self._started, "seconds": self._seconds, "marks": self._marks}
        with contextlib.suppress(InputError):  # a full disk is for the checkpoints to report
            write_json(self._path, account, indent=None, parents=False)
