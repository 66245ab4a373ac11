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
import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mla_jax.errors import InputError
from mla_jax.evals import passkey
from mla_jax.evals.answers import Answer, Failure
from mla_jax.evals.stats import clustered_interval, mean_interval
from mla_jax.evals.task import Params

VERSION = 3
CORRECT = "correct"
"""The score that every prompt of every task has."""
_WITHOUT_VERSION = {"task": passkey.NAME, "title": passkey.TITLE, "description": passkey.DESCRIPTION}
_COUNTS = ("n", "correct", "accuracy", "interval", "rates", "means", "scores", "haystacks", "answers", "measures")
NATS = "nats_per_token"
"""The measure whose exponential is the perplexity."""


@dataclass(frozen=True)
class Rate:
    """The mean of a score between 0 and 1."""

    n: int
    rate: float
    interval: tuple[float, float]
    """95 %, see `clustered_interval`."""

    def to_json(self) -> dict[str, Any]:
        """The fields, rounded."""
        return {"n": self.n, "rate": round(self.rate, 6), "interval": [round(end, 6) for end in self.interval]}


@dataclass(frozen=True)
class Mean:
    """The mean of a measure that may have any value."""

    n: int
    mean: float
    interval: tuple[float, float]
    """95 %, see `mean_interval`."""

    def to_json(self) -> dict[str, Any]:
        """The fields, rounded."""
        return {"n": self.n, "mean": round(self.mean, 6), "interval": [round(end, 6) for end in self.interval]}


@dataclass(frozen=True)
class Cell:
    """The scores of the answers to the prompts of a cell."""

    params: Params
    """`length` and one more; None stands for all values of that one."""
    scores: dict[str, tuple[float, ...]]
    """Scores between 0 and 1 by name, in the order of the prompts; `correct` has one for each prompt."""
    haystacks: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """The haystack of each score, by name; without a name, each prompt has a haystack of its own."""
    answers: tuple[Answer, ...] = ()
    """The answer to each prompt; none where nothing is generated, in results of before they were kept, in totals."""
    measures: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """What is no score between 0 and 1, by name: a value for each prompt."""

    @classmethod
    def counted(cls, params: Params, n: int, correct: int) -> "Cell":
        """A cell of which only the number of correct answers is known, not which."""
        return cls(params, {CORRECT: (1,) * correct + (0,) * (n - correct)})

    @property
    def length(self) -> int:
        """Tokens of the prompts."""
        return self.params["length"]

    @property
    def n(self) -> int:
        """Number of prompts."""
        return len(self.scores[CORRECT])

    @property
    def correct(self) -> float:
        """Correct answers; the sum of their scores where an answer may be partly right."""
        total = math.fsum(self.scores[CORRECT])
        return int(total) if total == int(total) else round(total, 6)

    @property
    def accuracy(self) -> float:
        """Share of correct answers."""
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy."""
        return self.rate(CORRECT).interval

    @property
    def rates(self) -> dict[str, Rate]:
        """Means of all scores but `correct`."""
        return {name: self.rate(name) for name in self.scores if name != CORRECT}

    @property
    def all_rates(self) -> dict[str, Rate]:
        """Means of all scores, `correct` first."""
        return {CORRECT: self.rate(CORRECT), **self.rates}

    def rate(self, name: str) -> Rate:
        """The mean of a score."""
        scores = self.scores[name]
        clusters = self.haystacks.get(name, range(len(scores)))
        return Rate(len(scores), math.fsum(scores) / len(scores), clustered_interval(scores, clusters))

    @property
    def means(self) -> dict[str, Mean]:
        """Means of all measures."""
        clusters = self.haystacks.get(CORRECT, range(self.n))
        return {
            name: Mean(self.n, math.fsum(values) / self.n, mean_interval(values, clusters))
            for name, values in self.measures.items()
        }

    def summary(self) -> dict[str, Any]:
        """Params and counts, with accuracy, interval and rates spelled out."""
        low, high = self.interval
        rates = {name: rate.to_json() for name, rate in self.rates.items()}
        means = {name: mean.to_json() for name, mean in self.means.items()}
        return {
            **self.params,
            "n": self.n,
            "correct": self.correct,
            "accuracy": round(self.accuracy, 6),
            "interval": [round(low, 6), round(high, 6)],
            **({"rates": rates} if rates else {}),
            **({"means": means} if means else {}),
        }

    def to_json(self) -> dict[str, Any]:
        """The summary, and what it was made of."""
        haystacks = {"haystacks": list(self.haystacks[CORRECT])} if self.haystacks else {}
        answers = {"answers": [answer.to_json() for answer in self.answers]} if self.answers else {}
        scores = {name: list(each) for name, each in self.scores.items()}
        measures = {"measures": {name: list(each) for name, each in self.measures.items()}} if self.measures else {}
        return {**self.summary(), "scores": scores, **haystacks, **answers, **measures}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Cell":
        """The cell of `to_json`. Raises KeyError, TypeError or ValueError for anything else."""
        n, correct = content["n"], content["correct"]
        params = {key: value for key, value in content.items() if key not in _COUNTS}
        _require(isinstance(n, int) and 0 <= correct <= n > 0, f"{correct} of {n} correct")
        _require(isinstance(params["length"], int) and len(params) == 2, f"a cell of {params}")
        if "scores" not in content:  # of version 1
            return cls.counted(params, n, correct)
        scores = {name: tuple(each) for name, each in content["scores"].items()}
        _require(all(len(each) == n and all(0 <= x <= 1 for x in each) for each in scores.values()), "scores")
        haystacks = tuple(content.get("haystacks", ()))
        answers = tuple(Answer.from_json(answer) for answer in content.get("answers", ()))
        _require(len(haystacks) in (0, n) and len(answers) in (0, n), "haystacks or answers")
        measures = {name: tuple(map(float, each)) for name, each in content.get("measures", {}).items()}
        _require(all(len(each) == n and all(map(math.isfinite, each)) for each in measures.values()), "measures")
        cell = cls(params, scores, dict.fromkeys(scores, haystacks) if haystacks else {}, answers, measures)
        _require(cell.correct == correct, f"correct {correct} of scores that add up to {cell.correct}")
        return cell


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
        _require(version in (None, 1, 2, VERSION), f"version {version}, where {VERSION} is known")
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
    rows = {length: [cell for cell in cells if cell.length == length] for length in sorted({c.length for c in cells})}
    return [dataclasses.replace(cell := totalled(row), params=cell.params | {"length": n}) for n, row in rows.items()]


def totalled(cells: Sequence[Cell]) -> Cell:
    """One cell with all scores of some; None stands for its params.

    Prompts of different lengths have different haystacks.
    """
    scores: dict[str, tuple[float, ...]] = {}
    haystacks: dict[str, tuple] = {}
    measures: dict[str, tuple[float, ...]] = {}
    for number, cell in enumerate(cells):
        for name, each in cell.measures.items():
            measures[name] = measures.get(name, ()) + each
        for name, each in cell.scores.items():
            own = [(number, i) for i in range(len(each))]
            shared = [(cell.length, haystack) for haystack in cell.haystacks.get(name, ())]
            scores[name] = scores.get(name, ()) + each
            haystacks[name] = haystacks.get(name, ()) + tuple(shared or own)
    shared = haystacks if any(cell.haystacks for cell in cells) else {}
    return Cell(dict.fromkeys(cells[0].params), scores, shared, measures=measures)


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
    _require(len({frozenset(cell) for cell in cells}) == 1, "no cells, or cells of different parameters")
    _require(len(cells[0]) == 2, f"a cell of {cells[0]}")
    (name,) = cells[0].keys() - {"length"}
    lengths, values = {cell["length"] for cell in cells}, sorted({cell[name] for cell in cells})
    places = {(cell["length"], cell[name]) for cell in cells}
    _require(len(places) == len(cells) == len(lengths) * len(values), "cells that are not a whole grid")


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)
