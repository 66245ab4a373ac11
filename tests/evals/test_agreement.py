"""Kappa against a published example and scikit-learn, bootstrap intervals against what is known of means."""

import math

import numpy as np
import pytest

from mla_jax.evals.agreement import bootstrap_interval, cohens_kappa


def test_kappa_of_a_published_example():
    """Two readers, 50 proposals: both yes 20, both no 15, only one yes 5 and 10 (Fleiss, Statistical Methods)."""
    pairs = 20 * [("yes", "yes")] + 5 * [("yes", "no")] + 10 * [("no", "yes")] + 15 * [("no", "no")]
    assert cohens_kappa(pairs) == pytest.approx(0.4)


@pytest.mark.parametrize("classes", [2, 6])
def test_kappa_is_scikit_learns(classes):
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(classes)
    for agreeing in (0.0, 0.5, 0.9, 1.0):
        one = rng.integers(classes, size=80)
        other = np.where(rng.random(80) < agreeing, one, rng.integers(classes, size=80))
        expected = metrics.cohen_kappa_score(one, other)
        assert cohens_kappa(list(zip(one.tolist(), other.tolist(), strict=True))) == pytest.approx(expected)


def test_kappa_at_its_ends():
    assert cohens_kappa([(0, 0), (1, 1)]) == 1
    assert cohens_kappa([(0, 1), (1, 0)]) == -1
    assert cohens_kappa([(0, 1), (1, 1)]) == 0, "one who always says the same agrees by chance"
    assert math.isnan(cohens_kappa([])) and math.isnan(cohens_kappa([(1, 1), (1, 1)]))


def mean(values):
    return sum(values) / len(values)


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    values = np.random.default_rng(0).normal(3, 2, size=400).tolist()
    low, high = bootstrap_interval(values, range(400), mean)
    half = 1.96 * np.std(values) / 20
    assert (low, high) == pytest.approx((mean(values) - half, mean(values) + half), abs=0.1 * half)


def test_samples_of_a_cluster_count_once():
    values = np.random.default_rng(0).normal(size=50).tolist()
    once = bootstrap_interval(values, range(50), mean)
    copied = bootstrap_interval([x for x in values for _ in range(8)], [i for i in range(50) for _ in range(8)], mean)
    apart = bootstrap_interval([x for x in values for _ in range(8)], range(400), mean)
    assert copied == pytest.approx(once)
    assert apart[1] - apart[0] < 0.5 * (once[1] - once[0])


def test_intervals_that_cannot_be_known():
    assert all(map(math.isnan, bootstrap_interval([1.0, 0.0], ["same", "same"], mean)))
    assert all(map(math.isnan, bootstrap_interval([], [], mean)))
    assert all(map(math.isnan, bootstrap_interval([(1, 1)] * 3, range(3), cohens_kappa)))
    assert bootstrap_interval([1.0, 1.0], [0, 1], mean) == (1.0, 1.0)
    low, high = bootstrap_interval([(0, 0), (1, 1), (1, 0), (0, 0)], range(4), cohens_kappa)
    assert -1 <= low < high <= 1, "resamples without a kappa are left out"
