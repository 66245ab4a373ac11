"""The order of checkpoints, by which the best ones are kept and read."""

import math
from typing import Any

from mla_jax.losses.loss import VALIDATION, goodness

WORST = (-1.0, False, 0.0)


class Rank:
    """Orders metrics: a later stage of the curriculum, which is harder, before a better value; higher is better.

    Within a stage, what was measured on held-out data goes before what was not. The mean of a window in which nothing
    was learned is nan, and comes last.
    """

    def __init__(self, metric: str):
        self._metric = metric

    def __call__(self, metrics: dict[str, float]) -> Any:
        """The key that orders a checkpoint with these metrics."""
        held_out = metrics.get(VALIDATION + self._metric)
        value = metrics[self._metric] if held_out is None else held_out
        return WORST if math.isnan(value) else (metrics["stage"], held_out is not None, goodness(self._metric, value))
