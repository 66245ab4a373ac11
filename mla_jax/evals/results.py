"""The results of an evaluation and their files, which the model card, the sweep report and the export read.

RUN/eval may hold other JSON files; a file with `task` or `cells` is one of results. RUN/eval/TASK.json holds:

    version           VERSION; files without it were written when passkey retrieval was the only task, and are read too
    task              its name
    title             of the task, for reports
    description       the question and the criterion
    model             name, step, parameters, cache_bytes_per_token (16 bits unless configured), trained_lengths,
                      fingerprint of the config and the checkpoint
    provenance        date, command, version, git_revision, hardware, python, jax
    seconds           duration of the evaluation, compilation included
    config            the task as configured
    by_length, cells  params (length in tokens, depth and the like; null: all), n, correct, accuracy,
                      interval [low, high] (Wilson 95 %)
    failures          a few wrong answers of each cell: params, seed, index, expected, generated
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mla_jax.errors import InputError
from mla_jax.evals import passkey
from mla_jax.evals.stats import wilson_interval
from mla_jax.evals.task import Params

VERSION = 1
_WITHOUT_VERSION = {"task": passkey.NAME, "title": passkey.TITLE, "description": passkey.DESCRIPTION}
_COUNTS = ("n", "correct", "accuracy", "interval")


@dataclass(frozen=True)
class Cell:
    """The count of correct answers to the `n` prompts of a cell."""

    params: Params
    """`length` and one more; None stands for all values of that one."""
    n: int
    correct: int

    @property
    def length(self) -> int:
        """Tokens of the prompts."""
        return self.params["length"]

    @property
    def accuracy(self) -> float:
        """Share of correct answers."""
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson 95 % interval of the accuracy."""
        return wilson_interval(self.correct, self.n)

    def to_json(self) -> dict[str, Any]:
        """Params and counts, with accuracy and interval spelled out."""
        low, high = self.interval
        return {
            **self.params,
            "n": self.n,
            "correct": self.correct,
            "accuracy": round(self.accuracy, 6),
            "interval": [round(low, 6), round(high, 6)],
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Cell":
        """The cell of `to_json`. Raises KeyError, TypeError or ValueError for anything else."""
        n, correct = content["n"], content["correct"]
        params = {key: value for key, value in content.items() if key not in _COUNTS}
        _require(isinstance(n, int) and isinstance(correct, int) and 0 <= correct <= n > 0, f"{correct} of {n} correct")
        _require(isinstance(params["length"], int) and len(params) == 2, f"a cell of {params}")
        return cls(params, n, correct)


@dataclass(frozen=True)
class Failure:
    """A wrong answer."""

    params: Params
    """Parameters of its cell."""
    seed: int
    index: int
    """Seed and index of the random generator from which the task makes the prompt again."""
    expected: str
    generated: str

    def to_json(self) -> dict[str, Any]:
        """The fields, those of params among them."""
        fields = dataclasses.asdict(self)
        return {**fields.pop("params"), **fields}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Failure":
        """The failure of `to_json`. Raises KeyError or TypeError for anything else."""
        own = {key: content[key] for key in ("seed", "index", "expected", "generated")}
        return cls({key: value for key, value in content.items() if key not in own}, **own)


@dataclass(frozen=True)
class Results:
    """The outcome of a task on a model, as it is kept in RUN/eval/TASK.json."""

    task: str
    title: str
    description: str
    model: dict[str, Any]
    provenance: dict[str, Any]
    seconds: float
    config: dict[str, Any]
    cells: tuple[Cell, ...]
    failures: tuple[Failure, ...]

    @property
    def by_length(self) -> list[Cell]:
        """One cell for each length."""
        return totals_by_length(self.cells)

    @property
    def counts(self) -> tuple[int, int]:
        """(correct answers, prompts) of all cells."""
        return sum(cell.correct for cell in self.cells), sum(cell.n for cell in self.cells)

    def to_json(self) -> dict[str, Any]:
        """Contents of the file, see the head of this module."""
        return {
            "version": VERSION,
            "task": self.task,
            "title": self.title,
            "description": self.description,
            "model": self.model,
            "provenance": self.provenance,
            "seconds": self.seconds,
            "config": self.config,
            "by_length": [cell.to_json() for cell in self.by_length],
            "cells": [cell.to_json() for cell in self.cells],
            "failures": [failure.to_json() for failure in self.failures],
        }

    @classmethod
    def from_json(cls, content: Any) -> "Results":
        """The results of `to_json`, also those of files without a version, and with only some cells of their grid.

        Raises:
            AttributeError, KeyError, TypeError, ValueError: the content is not what an evaluation writes.
        """
        version = content.get("version")
        _require(version in (None, VERSION), f"version {version}, where {VERSION} is known")
        content = content | (_WITHOUT_VERSION if version is None else {})
        model, provenance = content["model"], content.get("provenance", {})
        _require(isinstance(model["step"], int), f"model.step {model['step']!r}")
        _require(all(isinstance(n, int) for n in model.get("trained_lengths", [])), "model.trained_lengths")
        _require(isinstance(provenance, dict), "provenance")
        _require(all(isinstance(content[key], str) for key in _WITHOUT_VERSION), "task, title or description")
        return cls(
            **{key: content[key] for key in _WITHOUT_VERSION},
            model=model,
            provenance=provenance,
            seconds=content.get("seconds", 0.0),
            config=content.get("config", {}),
            cells=tuple(Cell.from_json(cell) for cell in content["cells"]),
            failures=tuple(Failure.from_json(failure) for failure in content.get("failures", ())),
        )


def totals_by_length(cells: Sequence[Cell]) -> list[Cell]:
    """One cell for each length, shortest first, that counts all cells of it; its other param is None."""
    totals = []
    for length in sorted({cell.length for cell in cells}):
        row = [cell for cell in cells if cell.length == length]
        params = dict.fromkeys(row[0].params) | {"length": length}
        totals.append(Cell(params, sum(cell.n for cell in row), sum(cell.correct for cell in row)))
    return totals


def read_results(path: Path, *, finished: bool = True) -> Results:
    """The results in a file.

    Args:
        path: the file.
        finished: require the whole grid of cells, which an evaluation that was interrupted does not have yet.

    Raises:
        InputError: it cannot be read, or is not what an evaluation writes.
    """
    with _read_errors(path):
        results = Results.from_json(json.loads(path.read_bytes()))
        if finished:
            require_grid([cell.params for cell in results.cells])
    return results


def results_of_run(run_dir: Path) -> list[Results]:
    """All results in RUN/eval, by name of the task; none if the run was not evaluated.

    JSON files with neither `task` nor `cells` are no results and are left out.

    Raises:
        InputError: as `read_results`.
    """
    return [read_results(path) for path in sorted((run_dir / "eval").glob("*.json")) if _is_results(path)]


def _is_results(path: Path) -> bool:
    with _read_errors(path):
        content = json.loads(path.read_bytes())
    return isinstance(content, dict) and not content.keys().isdisjoint(("task", "cells"))


@contextlib.contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as e:
        raise InputError(f"{path} cannot be read ({e!r}); evaluate the run again or remove the file") from e


def require_grid(cells: Sequence[Params]) -> None:
    """Raises KeyError, TypeError or ValueError unless there is one cell for each length and value of one parameter."""
    _require(len({frozenset(cell) for cell in cells}) == 1, "no cells, or cells of different parameters")
    _require(len(cells[0]) == 2, f"a cell of {cells[0]}")
    (name,) = cells[0].keys() - {"length"}
    lengths, values = {cell["length"] for cell in cells}, sorted({cell[name] for cell in cells})
    places = {(cell["length"], cell[name]) for cell in cells}
    _require(len(places) == len(cells) == len(lengths) * len(values), "cells that are not a whole grid")


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)
