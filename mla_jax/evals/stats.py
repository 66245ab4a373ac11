"""Statistics of small samples."""

import math
from collections.abc import Hashable, Sequence

from scipy.special import stdtrit

Z_95 = 1.959963984540054
"""97.5 % quantile of the normal distribution: both tails together hold 5 %."""


def wilson_interval(correct: float, n: float, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927), by default at 95 %.

    Unlike the textbook interval it stays honest at the ends: 20 of 20 proves only 83.9 %.

    Args:
        correct: successes; a sum of scores between 0 and 1 will do.
        n: trials; with none the interval is (0, 1).
        z: quantile of the normal distribution.

    Returns:
        (low, high), both in [0, 1].
    """
    if not 0 <= correct <= n:
        raise ValueError(f"correct must be in [0, n], got {correct} of {n}")
    if n == 0:
        return 0.0, 1.0
    p = correct / n
    center = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # Rounding must not push the ends past what was seen.
    return max(0.0, min(p, (center - spread) / scale)), min(1.0, max(p, (center + spread) / scale))


def clustered_interval(scores: Sequence[float], clusters: Sequence[Hashable]) -> tuple[float, float]:
    """95 % interval of the mean of scores between 0 and 1, of which those of a cluster may depend on each other.

    Wilson's interval for the number of independent trials that would have the same variance (Dean and Pagano, Journal
    of Survey Statistics and Methodology 3, 2015): at least the number of clusters, at most that of scores. Where all
    scores are 0, or all are 1, nothing tells how much they depend on each other, and it is the number of clusters.

    Args:
        scores: at least one.
        clusters: the cluster of each, for instance the haystack that was asked about.

    Returns:
        (low, high), both in [0, 1].
    """
    n, mean = len(scores), math.fsum(scores) / len(scores)
    sums: dict[Hashable, list[float]] = {}
    for score, cluster in zip(scores, clusters, strict=True):
        sums.setdefault(cluster, []).append(score - mean)
    m = len(sums)
    if m == n and all(score in (0, 1) for score in scores):
        return wilson_interval(math.fsum(scores), n)
    variance = math.fsum(math.fsum(deviations) ** 2 for deviations in sums.values()) * m / max(m - 1, 1) / n**2
    trials = m if variance == 0 else min(max(mean * (1 - mean) / variance, m), n)
    return wilson_interval(min(max(mean, 0.0), 1.0) * trials, trials)


def mean_interval(values: Sequence[float], clusters: Sequence[Hashable]) -> tuple[float, float]:
    """95 % interval of the mean of any values, of which those of a cluster may depend on each other.

    Student's, with the variance of what clusters contribute to the mean and one degree of freedom less than there are
    clusters.

    Args:
        values: of two clusters at least.
        clusters: the cluster of each.

    Returns:
        (low, high).
    """
    n, mean = len(values), math.fsum(values) / len(values)
    sums: dict[Hashable, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value - mean
    m = len(sums)
    if m < 2:
        raise ValueError(f"{m} cluster tells nothing about how far a mean varies")
    half = float(stdtrit(m - 1, 0.975)) * math.sqrt(math.fsum(x * x for x in sums.values()) * m / (m - 1)) / n
    return mean - half, mean + half
