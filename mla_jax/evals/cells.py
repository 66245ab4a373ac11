"""The scores and measures of the prompts of a cell, their means and intervals, and totals of several cells."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mla_jax.evals.answers import Answer
from mla_jax.evals.stats import clustered_interval, mean_interval
from mla_jax.evals.task import Params

CORRECT = "correct"
"""The score that every prompt of every task has."""
NATS = "nats_per_token"
"""The measure whose exponential is the perplexity."""
_COUNTS = ("n", "correct", "accuracy", "interval", "rates", "means", "scores", "haystacks", "answers", "measures")


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
        require_valid(isinstance(n, int) and 0 <= correct <= n > 0, f"{correct} of {n} correct")
        require_valid(isinstance(params["length"], int) and len(params) == 2, f"a cell of {params}")
        if "scores" not in content:  # of version 1
            return cls.counted(params, n, correct)
        scores = {name: tuple(each) for name, each in content["scores"].items()}
        require_valid(all(len(each) == n and all(0 <= x <= 1 for x in each) for each in scores.values()), "scores")
        haystacks = tuple(content.get("haystacks", ()))
        answers = tuple(Answer.from_json(answer) for answer in content.get("answers", ()))
        require_valid(len(haystacks) in (0, n) and len(answers) in (0, n), "haystacks or answers")
        measures = {name: tuple(map(float, each)) for name, each in content.get("measures", {}).items()}
        require_valid(all(len(each) == n and all(map(math.isfinite, each)) for each in measures.values()), "measures")
        cell = cls(params, scores, dict.fromkeys(scores, haystacks) if haystacks else {}, answers, measures)
        require_valid(cell.correct == correct, f"correct {correct} of scores that add up to {cell.correct}")
        return cell


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


def require_valid(condition: bool, what: str) -> None:
    """Raises ValueError(what) unless the condition holds."""
    if not condition:
        raise ValueError(what)
