"""Intervals and verdicts over seeds."""

import math

import numpy as np
import pytest

from trix_jax.lm.experiment.stats import interval, paired, spread, verdict

WORDS = {"below": "better", "above": "worse", "alone": "one seed"}


@pytest.mark.parametrize("n", range(2, 31))
def test_interval_is_scipys(n):
    from scipy import stats as scipy_stats

    values = np.random.default_rng(n).normal(2.0, 0.1, n).tolist()
    found = interval(values)
    mean, error = np.mean(values), scipy_stats.sem(values)
    low, high = scipy_stats.t.interval(0.95, n - 1, loc=mean, scale=error)
    assert found.low == pytest.approx(low, rel=1e-12)
    assert found.high == pytest.approx(high, rel=1e-12)
    assert found.n == n


def test_interval_of_one_value_is_infinite_and_of_none_is_refused():
    assert interval([1.5]) == (1.5, math.inf, 1)
    assert interval([1.5]).side == "undecided"
    with pytest.raises(ValueError, match="must not be empty"):
        interval([])


def test_paired_takes_common_seeds_and_cancels_what_they_share():
    base = {1: 1.0, 2: 2.0, 3: 3.0, 9: 0.0}
    found = paired({1: 1.1, 2: 2.1, 3: 3.1, 4: 7.0}, base)
    assert found.n == 3
    assert found.mean == pytest.approx(0.1)
    assert found.half == pytest.approx(0, abs=1e-12)
    assert found.side == "above"
    assert paired({5: 1.0}, base) is None


@pytest.mark.parametrize(
    ("differences", "word"),
    [
        ([-0.5, -0.51, -0.49], "better"),
        ([0.5, 0.51, 0.49], "worse"),
        ([0.0, 0.3, -0.3], "undecided"),
        ([-1.0], "one seed"),
    ],
)
def test_verdict_is_the_side_of_the_interval(differences, word):
    assert verdict(interval(differences), **WORDS) == word


def test_verdict_without_a_difference_is_that_of_one_seed():
    assert verdict(None, **WORDS) == "one seed"


def test_spread_has_an_interval_from_two_values_on():
    assert spread([1.25]) == "1.2500"
    assert spread([1.0, 2.0, 3.0]) == "2.0000 ± 2.4841"
