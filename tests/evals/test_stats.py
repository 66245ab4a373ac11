"""Wilson's interval against SciPy and published values."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from mla_jax.evals.stats import wilson_interval


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
