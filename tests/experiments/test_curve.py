"""Equivalent widths and intervals, on curves whose answer is known."""

import math

import numpy as np
import pytest

from experiments.quality import curve

WIDTHS = (32, 64, 128, 256)


def line(width):
    return 3 - 0.1 * math.log2(width)


def test_equivalent_width_of_a_line_in_log_width_is_exact():
    losses = [line(w) for w in WIDTHS]
    for width in (32, 40, 64, 100, 181.02, 256):
        assert curve.equivalent(WIDTHS, losses, line(width)) == pytest.approx(width)
        assert curve.loss_at(WIDTHS, losses, width) == pytest.approx(line(width))


def test_equivalent_width_off_the_curve_is_never_extrapolated():
    losses = [line(w) for w in WIDTHS]
    assert curve.equivalent(WIDTHS, losses, line(31)) == curve.BELOW
    assert curve.equivalent(WIDTHS, losses, line(257)) == curve.ABOVE
    assert curve.loss_at(WIDTHS, losses, 31) is None
    assert curve.loss_at(WIDTHS, losses, 260) is None
    assert curve.loss_at(WIDTHS, losses, 256.5) == pytest.approx(line(256))


def test_equivalent_width_on_a_flat_part_is_the_narrowest():
    assert curve.equivalent(WIDTHS, [2.0, 1.9, 1.9, 1.8], 1.9) == 64


def test_monotone_curve_pools_what_rises_and_keeps_the_mean():
    np.testing.assert_allclose(
        curve.monotone([2.0, 1.8, 1.9, 1.7]), [2, 1.85, 1.85, 1.7]
    )
    np.testing.assert_allclose(curve.monotone([1.0, 2.0, 3.0]), [2, 2, 2])


@pytest.mark.parametrize(
    ("widths", "seeds"),
    [(WIDTHS, 3), pytest.param((64, 128), 2, marks=pytest.mark.slow)],
)
def test_interval_of_an_equivalent_width_covers_the_truth_as_often_as_it_says(
    widths, seeds
):
    rng, hits, trials = np.random.default_rng(1), 0, 150
    for _ in range(trials):
        dense = {w: line(w) + 0.005 * rng.standard_normal(seeds) for w in widths}
        arm = line(100) + 0.005 * rng.standard_normal(seeds)
        found = curve.equivalent_interval(dense, arm, draws=300)
        hits += found.low <= 100 <= found.high
    assert 0.9 <= hits / trials <= 0.99


def test_interval_that_leaves_the_curve_says_so():
    dense = {w: [line(w) - 0.02, line(w), line(w) + 0.02] for w in WIDTHS}
    found = curve.equivalent_interval(dense, [line(33), line(33) + 0.01])
    assert found.low == curve.BELOW
    assert 32 < found.high < 64


def test_distance_to_the_curve_at_a_width_has_its_interval():
    dense = {w: [line(w) - 0.01, line(w), line(w) + 0.01] for w in WIDTHS}
    arm = [line(100) + 0.03 + e for e in (-0.01, 0, 0.01)]
    found = curve.behind(dense, arm, 100)
    assert found.value == pytest.approx(0.03)
    assert found.low < 0.03 < found.high
    assert found.high - found.low == pytest.approx(4 * 0.01 / 3**0.5 * 1.35, rel=0.25)
    assert curve.behind(dense, arm, 300) is None


def test_setting_carries_comparisons_only_where_doublings_are_resolved():
    dense = {w: [line(w) - 0.01, line(w), line(w) + 0.01] for w in WIDTHS}
    steps = curve.doublings(dense, [line(100), line(200)])
    assert [step.is_needed for step in steps] == [False, True, True]
    assert steps[0].gain == pytest.approx(0.1)
    assert steps[0].error == pytest.approx(0.01 * (2 / 3) ** 0.5)
    assert curve.carries(steps)
    noisy = {w: [line(w) - 0.1, line(w), line(w) + 0.1] for w in WIDTHS}
    assert not curve.carries(curve.doublings(noisy, [line(100)]))
    assert not curve.carries(curve.doublings(dense, [9.0]))


def test_resolution_looks_between_the_outermost_arms_too():
    dense = {
        32: [2.0, 2.001],
        64: [1.9, 1.901],
        128: [1.8995, 1.9005],
        256: [1.7, 1.701],
    }
    steps = curve.doublings(dense, [1.95, 1.75])
    assert not curve.carries(steps)  # 64 to 128 is worth nothing


def test_pooled_deviation_is_that_inside_the_groups():
    assert curve.pooled_deviation([[0, 2], [10, 12], [5]]) == pytest.approx(2**0.5)
    assert math.isnan(curve.pooled_deviation([[1], [2]]))


def test_neighbours_are_the_widths_that_a_place_is_read_off():
    found = [
        curve.neighbours(WIDTHS, w) for w in (curve.BELOW, 32, 100, 256, curve.ABOVE)
    ]
    assert [list(w) for w in found] == [[32], [32], [64, 128], [256], [256]]


def test_bootstrap_means_spread_like_the_standard_error_times_student_over_normal():
    groups = [[0.0, 1.0, 2.0], [10.0, 11.0, 12.0], [5.0]]
    drawn = curve.bootstrap_means(groups, draws=4000)
    np.testing.assert_allclose(drawn.mean(axis=0), [1, 11, 5], atol=0.06)
    wider = 2.7764 / 1.96  # four degrees of freedom
    deviation = drawn.std(axis=0) / wider
    np.testing.assert_allclose(deviation, [3**-0.5, 3**-0.5, 1], rtol=0.06)
