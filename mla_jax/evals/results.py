"""The results of an evaluation and their files, which the model card, the sweep report and the export read.

RUN/eval may hold other JSON files; a file with `task` or `cells` is one of results. RUN/eval/TASK.json holds:

    version           VERSION; files without it were written when passkey retrieval was the only task, and are read too
    task              its name
    title             of the task, for reports
    description       the question and the criterion
    model             name, step, parameters, cache_bytes_per_token (16 bits unless configured), trained_lengths,
                      fingerprint of the config and the checkpoint, tokenizer (its fingerprint)
    provenance        date, command, version, git_revision, hardware, python, jax
    seconds           duration of the evaluation, compilation included
    config            the task as configured
    by_length, cells  params (length in tokens, depth and the like; null: all), n, correct, accuracy,
                      interval [low, high] (95 %, see `clustered_interval`), rates (n, rate and interval of the task's
                      other scores, by name), means (n, mean and interval of what is no score between 0 and 1, by name)
    cells also        scores: each prompt's, by name, in the order of samples; haystacks: the number of each prompt's,
                      where prompts share them; answers: question, expected, near and generated (texts) of each, if
                      something was generated; measures: what means are made of, by name. Version 1 had none of the
                      four, version 2 only the first two
    failures          a few wrong answers of each cell: params, seed, index, expected, generated
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mla_jax.errors import InputError
from mla_jax.evals import passkey
from mla_jax.evals.answers import Failure
from mla_jax.evals.cells import Cell, require_valid, totalled, totals_by_length
from mla_jax.evals.task import Params

VERSION = 3
_WITHOUT_VERSION = {"task": passkey.NAME, "title": passkey.TITLE, "description": passkey.DESCRIPTION}


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
    def total(self) -> Cell:
        """One cell for everything; None stands for each of its params."""
        return totalled(self.cells)

    @property
    def counts(self) -> tuple[float, int]:
        """(correct answers, prompts) of all cells."""
        return self.total.correct, self.total.n

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
            "by_length": [cell.summary() for cell in self.by_length],
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
        require_valid(version in (None, 1, 2, VERSION), f"version {version}, where {VERSION} is known")
        content = content | (_WITHOUT_VERSION if version is None else {})
        model, provenance = content["model"], content.get("provenance", {})
        require_valid(isinstance(model["step"], int), f"model.step {model['step']!r}")
        require_valid(all(isinstance(n, int) for n in model.get("trained_lengths", [])), "model.trained_lengths")
        require_valid(isinstance(provenance, dict), "provenance")
        require_valid(all(isinstance(content[key], str) for key in _WITHOUT_VERSION), "task, title or description")
        return cls(
            **{key: content[key] for key in _WITHOUT_VERSION},
            model=model,
            provenance=provenance,
            seconds=content.get("seconds", 0.0),
            config=content.get("config", {}),
            cells=tuple(Cell.from_json(cell) for cell in content["cells"]),
            failures=tuple(Failure.from_json(failure) for failure in content.get("failures", ())),
        )


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
    """All results in RUN/eval; none if the run was not evaluated. Raises InputError as `read_results`."""
    return results_in(run_dir / "eval")


def results_in(folder: Path) -> list[Results]:
    """All results in a folder, by name of the task.

    JSON files with neither `task` nor `cells` are no results and are left out.

    Raises:
        InputError: as `read_results`.
    """
    return [read_results(path) for path in sorted(folder.glob("*.json")) if _is_results(path)]


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
    require_valid(len({frozenset(cell) for cell in cells}) == 1, "no cells, or cells of different parameters")
    require_valid(len(cells[0]) == 2, f"a cell of {cells[0]}")
    (name,) = cells[0].keys() - {"length"}
    lengths, values = {cell["length"] for cell in cells}, sorted({cell[name] for cell in cells})
    places = {(cell["length"], cell[name]) for cell in cells}
    require_valid(len(places) == len(cells) == len(lengths) * len(values), "cells that are not a whole grid")
