"""Statistics of small samples."""

import math

Z_95 = 1.959963984540054
"""97.5 % quantile of the normal distribution: both tails together hold 5 %."""


def wilson_interval(correct: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927), by default at 95 %.

    Unlike the textbook interval it stays honest at the ends: 20 of 20 proves only 83.9 %.

    Args:
        correct: successes.
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
