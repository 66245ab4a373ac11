"""The choice of the checkpoint that is read: one that is as it was saved; corrupt ones are passed over or renamed."""

import contextlib
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import jax

from mla_jax.checkpoint.manifest import MANIFEST, find_corruption
from mla_jax.checkpoint.ranking import WORST, Rank
from mla_jax.distributed.decisions import all_gather_text, broadcast_decision, wait_until_visible
from mla_jax.errors import InputError


def complete_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in `folder`, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def choose_intact(folder: Path, which: str, best_metric: str) -> int:
    """Returns a step as `Checkpoints.choose` does, decided by the first process."""
    step = broadcast_decision(lambda: _choose(folder, which, best_metric))
    assert step is not None
    _wait_until_visible(folder, step)
    return step


def quarantine_corrupt(folder: Path) -> None:
    """Renames corrupt checkpoints that are newer than the newest intact one, with a warning.

    All processes divide the files of a checkpoint, to compare them with the manifest.

    Raises:
        InputError: there are checkpoints, and all are corrupt; nothing is renamed then.
    """
    steps: list[int] = json.loads(all_gather_text(json.dumps(complete_steps(folder)))[0])[::-1]
    corrupt = {}
    for step in steps:
        reason = _find_corruption_together(folder, step)
        if reason is None:
            break
        corrupt[step] = reason
    if steps:
        broadcast_decision(lambda: _set_aside(folder, steps, corrupt))


@contextlib.contextmanager
def folder_errors(folder: Path) -> Iterator[None]:
    """Raises InputError for an OSError of the body, which writes to `folder`."""
    try:
        yield
    except OSError as e:
        raise InputError(f"{folder} cannot be written to ({e.strerror or e})") from e


def _wait_until_visible(folder: Path, step: int) -> None:
    wait_until_visible(folder / str(step) / MANIFEST)


def _find_corruption_together(folder: Path, step: int) -> str | None:
    if broadcast_decision(lambda: int((folder / str(step) / MANIFEST).exists())):
        _wait_until_visible(folder, step)
    share = jax.process_index(), jax.process_count()
    reasons = all_gather_text(find_corruption(folder / str(step), share=share) or "")
    return next(filter(None, reasons), None)


def _set_aside(folder: Path, steps: list[int], corrupt: dict[int, str]) -> None:
    if len(corrupt) == len(steps):
        raise _none_usable(folder, corrupt)
    newest = steps[len(corrupt)]
    for step in steps[len(corrupt) + 1 :]:  # only what Orbax reads of them at its start
        if reason := find_corruption(folder / str(step), ("metrics",)):
            corrupt[step] = reason
    for step, reason in corrupt.items():
        name = _quarantine(folder, step).name
        _warn(f"checkpoint {folder / str(step)} is corrupt ({reason}), now {name}; using step {newest}")


def _quarantine(folder: Path, step: int) -> Path:
    """Renames the folder of `step` to one that no later save or reader takes for a checkpoint."""
    names = (f"{step}.corrupt" + (f".{i}" if i else "") for i in itertools.count())
    free = next(folder / name for name in names if not (folder / name).exists())
    with folder_errors(folder):
        return (folder / str(step)).rename(free)


def _choose(folder: Path, which: str, best_metric: str) -> int:
    steps = complete_steps(folder)
    if not steps:
        raise InputError(f"{folder} has no complete checkpoint yet")
    if which == "best":
        steps.sort(key=lambda step: _rank(folder, step, best_metric))
    elif which != "latest":
        if which not in map(str, steps):
            raise InputError(f"{folder} has no checkpoint {which}, but {', '.join(map(str, steps))}")
        steps = [int(which)]
    corrupt = {}
    for step in steps[::-1]:
        reason = find_corruption(folder / str(step), ("params", "position", "metrics"))
        if reason is None:
            for bad, why in corrupt.items():
                _warn(f"checkpoint {folder / str(bad)} is corrupt ({why}); using step {step}")
            return step
        corrupt[step] = reason
    raise _none_usable(folder, corrupt)


def _rank(folder: Path, step: int, best_metric: str) -> tuple[float, bool, float]:
    """Higher is better; a checkpoint whose metrics cannot be read, were not saved or are nan comes last."""
    try:
        return Rank(best_metric)(json.loads((folder / str(step) / "metrics" / "metrics").read_bytes()))
    except (OSError, ValueError, KeyError, TypeError):
        return WORST


def _none_usable(folder: Path, corrupt: dict[int, str]) -> InputError:
    names = "; ".join(f"step {step}: {reason}" for step, reason in sorted(corrupt.items()))
    return InputError(
        f"corrupt checkpoints in {folder} and none to use instead ({names}); put a copy of one back, "
        "ask for another step, or train anew with another name="
    )


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)
