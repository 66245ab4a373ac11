"""Agreement of two raters, and an interval for whatever is computed from samples that come in clusters."""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")

_RESAMPLES = 2000


def cohens_kappa(pairs: Sequence[tuple[Hashable, Hashable]]) -> float:
    """Cohen's kappa (Cohen 1960): how much two raters agree beyond what their own frequencies would give by chance.

    Args:
        pairs: what both said of each thing.

    Returns:
        (p_o - p_e) / (1 - p_e), 1 for full agreement, 0 for chance; nan without pairs, or where both always say the
        same one thing.
    """
    n = len(pairs)
    if n == 0:
        return math.nan
    one, other = (Counter(each) for each in zip(*pairs, strict=True))
    observed = sum(x == y for x, y in pairs) / n
    by_chance = sum(one[label] * other[label] for label in one) / n**2
    return math.nan if by_chance == 1 else (observed - by_chance) / (1 - by_chance)


def bootstrap_interval(
    samples: Sequence[T], clusters: Sequence[Hashable], statistic: Callable[[list[T]], float]
) -> tuple[float, float]:
    """95 % percentile interval of a statistic, by drawing whole clusters with replacement (Efron and Tibshirani 1993).

    Args:
        samples: what the statistic is computed from.
        clusters: the cluster of each; those of one may depend on each other.
        statistic: of any samples; resamples in which it is nan are left out.

    Returns:
        (low, high); (nan, nan) with fewer than two clusters. Where the statistic is the same in every resample, as 1
        of 1, the interval has no width: it says nothing about what was not seen.
    """
    groups: dict[Hashable, list[T]] = {}
    for sample, cluster in zip(samples, clusters, strict=True):
        groups.setdefault(cluster, []).append(sample)
    members = list(groups.values())
    if len(members) < 2:
        return math.nan, math.nan
    rng = np.random.default_rng(0)
    draws = rng.integers(len(members), size=(_RESAMPLES, len(members)))
    drawn = np.array([statistic([each for i in draw for each in members[i]]) for draw in draws])
    finite = drawn[np.isfinite(drawn)]
    if len(finite) == 0:
        return math.nan, math.nan
    low, high = np.quantile(finite, (0.025, 0.975))
    return float(low), float(high)
