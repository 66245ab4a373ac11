"""Wilson's interval against SciPy and published values."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, ttest_1samp

from mla_jax.evals.stats import clustered_interval, mean_interval, wilson_interval


@pytest.mark.parametrize(("correct", "n", "low"), [(20, 20, 0.839), (52, 55, 0.851), (100, 100, 0.963)])
def test_known_lower_bounds(correct, n, low):
    assert round(wilson_interval(correct, n)[0], 3) == low


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_equals_scipy(sample):
    correct, n = sample
    theirs = binomtest(correct, n).proportion_ci(confidence_level=0.95, method="wilson")
    low, high = wilson_interval(correct, n)
    assert low == pytest.approx(theirs.low, abs=1e-12)
    assert high == pytest.approx(theirs.high, abs=1e-12)
    assert 0 <= low <= correct / n <= high <= 1


def test_no_trials_prove_nothing():
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("correct", "n"), [(-1, 5), (6, 5)])
def test_impossible_counts(correct, n):
    with pytest.raises(ValueError, match="correct"):
        wilson_interval(correct, n)


@given(st.lists(st.integers(0, 1), min_size=1, max_size=60))
def test_scores_of_their_own_have_wilsons_interval(scores):
    assert clustered_interval(scores, range(len(scores))) == wilson_interval(sum(scores), len(scores))


@given(st.lists(st.integers(0, 1), min_size=2, max_size=20).filter(lambda x: 0 < sum(x) < len(x)), st.integers(2, 9))
def test_answers_that_a_haystack_decides_count_once(outcomes, questions):
    scores = [outcome for outcome in outcomes for _ in range(questions)]
    clusters = [i for i in range(len(outcomes)) for _ in range(questions)]
    assert clustered_interval(scores, clusters) == pytest.approx(wilson_interval(sum(outcomes), len(outcomes)))
    low, high = clustered_interval(scores, range(len(scores)))
    assert (
        high - low < wilson_interval(sum(outcomes), len(outcomes))[1] - wilson_interval(sum(outcomes), len(outcomes))[0]
    )


def test_perfect_scores_of_few_haystacks_prove_no_more_than_the_haystacks():
    assert clustered_interval(40 * [1], 8 * [0, 1, 2, 3, 4]) == wilson_interval(5, 5)


def test_the_interval_covers_the_truth_where_haystacks_differ():
    """Each haystack has an accuracy of its own; the truth is 0.7. Treating answers as independent covers too rarely."""
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(20), 10)
    covered, naive = 0, 0
    for _ in range(400):
        scores = (rng.random(200) < rng.beta(1.4, 0.6, 20)[clusters]).astype(int).tolist()
        low, high = clustered_interval(scores, clusters.tolist())
        covered += low <= 0.7 <= high
        low, high = wilson_interval(sum(scores), 200)
        naive += low <= 0.7 <= high
    assert covered >= 0.92 * 400 and naive < 0.8 * 400


def test_partly_right_answers():
    assert clustered_interval([0.5, 0.5, 0.5, 0.5], range(4)) == wilson_interval(2, 4)
    low, high = clustered_interval([0.25, 0.75, 1, 0.5], range(4))
    assert 0 <= low < 0.625 < high <= 1


@given(st.lists(st.integers(-100, 100), min_size=2, max_size=30).filter(lambda values: len(set(values)) > 1))
def test_the_interval_of_a_mean_is_students(values):
    low, high = mean_interval(values, range(len(values)))
    theirs = ttest_1samp(values, 0).confidence_interval(0.95)
    assert (low, high) == (pytest.approx(theirs.low, abs=1e-9), pytest.approx(theirs.high, abs=1e-9))


def test_values_of_a_cluster_that_are_the_same_count_once():
    rng = np.random.default_rng(0)
    clusters = rng.normal(size=12)
    each = mean_interval(clusters.tolist(), range(12))
    assert mean_interval(np.repeat(clusters, 5).tolist(), np.repeat(range(12), 5).tolist()) == pytest.approx(each)


def test_one_cluster_has_no_interval():
    with pytest.raises(ValueError, match="1 cluster"):
        mean_interval([1.0, 2.0], [0, 0])
