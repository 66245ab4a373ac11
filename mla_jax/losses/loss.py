"""The interface between an objective and the training loop."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import jax

from mla_jax.model.transformer import Transformer

Arrays = Mapping[str, jax.Array]


def mean(total: float, count: float) -> float:
    """`total` by `count`, and nan of nothing: 0 would read as the best of all losses."""
    return total / count if count else math.nan


VALIDATION = "validation/"
"""Begins the names of metrics that were measured on held-out data."""


def goodness(metric: str, value: float) -> float:
    """A number that is higher for better values of a metric: `loss` is better if lower, and nan is the worst."""
    return -math.inf if math.isnan(value) else -value if metric == "loss" else value


class Loss(Protocol):
    """An objective: what a training step minimises and what is reported of it.

    A step computes `sums` for each micro-batch, minimises the sum named `loss` divided by `normalizer`, and adds up all
    sums. The loop adds them up over a window of steps and reports their `means`. The names `steps`, `grad_norm` and
    `skipped` belong to the loop.
    """

    accuracy_metric: ClassVar[str]
    """The mean, between 0 and 1, at which `train.stages.accuracy` ends a stage."""

    @property
    def branch_tokens(self) -> int:
        """Tokens at the end of each row that are its branch region (see `model.branches`); 0 for ordinary rows."""
        ...

    @property
    def shared(self) -> dict[str, Any]:
        """Arrays (pytrees) that `sums` finds in every micro-batch's rows beside its own, such as another model's."""
        ...

    totals: ClassVar[tuple[str, ...]]
    """Sums that go on from one window of steps to the next, over the whole run."""

    def sums(self, transformer: Transformer, rows: Arrays) -> dict[str, jax.Array]:
        """Sums over one micro-batch, float32 scalars; `loss` is among them and the only one that has gradients.

        Args:
            transformer: the model bound to the parameters that are trained.
            rows: arrays [B / A, T], as the pipeline makes them; A is `train.grad_accumulation`.
        """
        ...

    def normalizer(self, batch: Arrays) -> jax.Array:
        """The positive scalar that divides the sum `loss` of a whole batch, arrays [A, B / A, T]."""
        ...

    def means(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Metrics by name, `loss` first, of sums over several steps; a missing sum is 0, a mean of nothing is nan."""
        ...

    def progress(self, means: Mapping[str, float]) -> str:
        """The part of the progress line that tells of `means`."""
        ...

    def warning(self, before: Mapping[str, float], now: Mapping[str, float]) -> str | None:
        """One line if the means `now` of a window, after `before` in the same stage, show a known failure."""
        ...
