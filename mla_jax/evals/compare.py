"""Two results of one task side by side: what changed, and how sure that is.

The interval of a difference comes from those of its two rates (Newcombe 1998, Statistics in Medicine 17: method 10 of
the paper on independent and on paired proportions), so it stays honest where a rate is 0 or 1. Where both were asked
the same prompts, their scores go up and down together, which makes it narrower.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mla_jax.errors import InputError
from mla_jax.evals.cells import CORRECT, Cell, Mean, Rate, totalled
from mla_jax.evals.results import Results
from mla_jax.evals.stats import mean_interval
from mla_jax.lengths import format_length


@dataclass(frozen=True)
class Difference:
    """A score or a measure of two results, on the prompts of one length or of all."""

    score: str
    length: int | None
    """Tokens; None for all lengths."""
    before: Rate | Mean
    after: Rate | Mean
    difference: float
    """after - before."""
    interval: tuple[float, float]
    """95 %."""

    def to_json(self) -> dict[str, Any]:
        """The fields, rounded."""
        return {
            "score": self.score,
            "length": self.length,
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "difference": round(self.difference, 6),
            "interval": [round(end, 6) for end in self.interval],
        }


def are_paired(before: Results, after: Results) -> bool:
    """Whether both were asked the same prompts: task, lengths, seed and tokenizer are the same, and all is known."""
    same = before.task == after.task and _asked(before) == _asked(after)
    return same and before.model.get("tokenizer") == after.model.get("tokenizer") is not None


def _asked(results: Results) -> tuple:
    """The settings that the prompts depend on, and the cells."""
    answering = ("batch_size", "cache_dtype", "max_new_tokens")
    config = {key: value for key, value in results.config.items() if key not in answering}
    return config, [(cell.params, cell.n) for cell in results.cells]


def compare(before: Results, after: Results) -> list[Difference]:
    """Scores and measures of both, at each length that both have and then, if these are several, at all together.

    Raises:
        InputError: they are of different tasks, or have no length in common.
    """
    if before.task != after.task:
        raise InputError(f"results of {before.task} and of {after.task} cannot be compared")
    paired = are_paired(before, after)
    lengths = sorted({cell.length for cell in before.cells} & {cell.length for cell in after.cells})
    if not lengths:
        raise InputError(f"the two results of {before.task} have no length of prompts in common")
    differences = []
    for length in [*lengths, *([None] if len(lengths) > 1 else [])]:
        wanted = lengths if length is None else [length]
        one, other = (_total(results, wanted) for results in (before, after))
        for score in (CORRECT, *(name for name in one.rates if name in other.rates)):
            differences.append(_difference(score, length, one, other, paired))
        for measure in (name for name in one.means if name in other.means):
            differences.append(_difference_of_means(measure, length, one, other, paired))
    return differences


def _total(results: Results, lengths: Sequence[int]) -> Cell:
    return totalled([cell for cell in results.cells if cell.length in lengths])


def _difference(score: str, length: int | None, before: Cell, after: Cell, paired: bool) -> Difference:
    one, other = before.rate(score), after.rate(score)
    correlation = _correlation(before, after, score) if paired else 0.0
    return Difference(score, length, one, other, other.rate - one.rate, difference_interval(one, other, correlation))


def _difference_of_means(measure: str, length: int | None, before: Cell, after: Cell, paired: bool) -> Difference:
    one, other = before.means[measure], after.means[measure]
    difference = other.mean - one.mean
    if paired:
        pairs = zip(before.measures[measure], after.measures[measure], strict=True)
        interval = mean_interval([y - x for x, y in pairs], before.haystacks.get(CORRECT, range(before.n)))
    else:
        half = math.hypot(one.interval[1] - one.mean, other.interval[1] - other.mean)
        interval = difference - half, difference + half
    return Difference(measure, length, one, other, difference, interval)


def _correlation(before: Cell, after: Cell, score: str) -> float:
    """Pearson's correlation of the scores, summed over each haystack; 0 where one of them never changes."""
    clusters = before.haystacks.get(score, range(len(before.scores[score])))
    sums: dict[Any, list[float]] = {}
    for cluster, *pair in zip(clusters, before.scores[score], after.scores[score], strict=True):
        total = sums.setdefault(cluster, [0.0, 0.0])
        total[0] += pair[0]
        total[1] += pair[1]
    x, y = np.array(list(sums.values())).T
    return float(np.corrcoef(x, y)[0, 1]) if x.std() > 0 and y.std() > 0 else 0.0


def difference_interval(before: Rate, after: Rate, correlation: float = 0.0) -> tuple[float, float]:
    """95 % interval of `after - before`, of scores with this correlation (0: different prompts)."""

    def spread(down: float, up: float) -> float:
        return math.sqrt(max(down**2 - 2 * correlation * down * up + up**2, 0.0))

    difference = after.rate - before.rate
    low = spread(after.rate - after.interval[0], before.interval[1] - before.rate)
    high = spread(after.interval[1] - after.rate, before.rate - before.interval[0])
    return max(difference - low, -1.0), min(difference + high, 1.0)


def format_comparison(differences: Sequence[Difference]) -> str:
    """A text table, a line for each length and score; rates and intervals in %, differences in percentage points.

    Measures are as they are.
    """
    rows = [["tokens", "score", "before", "after", "difference"]]
    for each in differences:
        scale, form = (100, "+.1f") if isinstance(each.before, Rate) else (1, "+.4g")
        change, low, high = (format(scale * value, form) for value in (each.difference, *each.interval))
        rows.append([
            "all" if each.length is None else format_length(each.length), each.score.replace("_", " "),
            _format_value(each.before), _format_value(each.after), f"{change} [{low} to {high}]",
        ])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _format_value(value: Rate | Mean) -> str:
    low, high = value.interval
    if isinstance(value, Mean):
        return f"{value.mean:.4g} of {value.n} [{low:.4g}-{high:.4g}]"
    return f"{100 * value.rate:.1f}% of {value.n} [{100 * low:.0f}-{100 * high:.0f}]"
