"""What opens the report, drawn and said: each arm against the dense FFNs of its seeds."""

import math
from statistics import fmean

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments.quality import (
    beside,
    claim_figure,
    claim_page,
    report,
    standing,
    widths,
)
from experiments.quality.claim import claim
from experiments.quality.claim_figure import Point
from experiments.quality.worth import candidates, worth
from tests.experiments.test_worth import run_of, with_sweeps
from trix_jax.lm.experiment.plots import STYLES
from trix_jax.lm.experiment.tuning import tuned

SHARED = "tiles-64-hash-eighth-shared"


def runs_of(losses, d=64):
    """Runs of arms, each with a loss a seed."""
    setting = claim(d)
    runs = [
        run_of(setting, setting.arm(name), loss, seed)
        for name, found in losses.items()
        for seed, loss in found.items()
    ]
    return with_sweeps(setting, runs)


# The seed that chose is 0.02 easier for dense FFNs than the others, and some arms lack them.
LOSSES = {
    "dense-64": {42: 4.75},
    "dense-128": {42: 4.68, 43: 4.70, 44: 4.71},
    "dense-256": {42: 4.63, 43: 4.65, 44: 4.66},
    "dense-512": {42: 4.60},
    "tiles-64-hash": {42: 4.69},
    SHARED: {42: 4.66, 43: 4.66, 44: 4.67},
    "tiles-64-held-eighth-shared": {42: 4.66, 43: 4.655},
}


@pytest.fixture(scope="module")
def points():
    runs = runs_of(LOSSES)
    return [
        Point(arm.name, place)
        for arm in candidates(64)
        if (place := worth(claim(64), runs, arm, claim_page.VOCABULARY))
    ]


@pytest.mark.slow
def test_the_figure_gives_each_arm_the_curve_that_its_multiplier_is_read_off(points):
    axes = Figure().subplots()
    claim_figure.draw_curves(axes, points)
    lines = {line.get_label(): line.get_xydata().T for line in axes.get_lines()}
    assert list(lines) == ["dense, seeds 43, 44", "dense, seed 43", "dense, seed 42"]
    of = {
        "tiles-64-hash": "dense, seed 42",
        SHARED: "dense, seeds 43, 44",
        "tiles-64-held-eighth-shared": "dense, seed 43",
    }
    assert {point.label for point in points} == set(of)
    for label, place in points:
        xs, ys = lines[of[label]]
        read = np.interp(math.log2(place.equivalent.value), np.log2(xs), ys)
        assert read == pytest.approx(place.loss)
        assert place.loss == pytest.approx(fmean(place.read.own.values()))
    hollow = [p.label for p in points if claim_figure.is_one_seed(p.place.read)]
    assert hollow == ["tiles-64-hash"]
    assert list(lines["dense, seeds 43, 44"][0]) == [128, 256]
    assert axes.get_lines()[0].get_markevery() == [0, 1]


@pytest.mark.slow
def test_a_width_whose_losses_are_of_other_seeds_has_no_dot():
    dense = {"dense-64": {42: 4.75}, "dense-128": LOSSES["dense-128"]}
    runs = runs_of({**dense, SHARED: LOSSES[SHARED]})
    arm = claim(64).arm(SHARED)
    place = worth(claim(64), runs, arm, claim_page.VOCABULARY)
    axes = Figure().subplots()
    claim_figure.draw_curves(axes, [Point(SHARED, place)])
    assert {64, 128} <= set(axes.get_lines()[0].get_xdata())
    assert axes.get_lines()[0].get_markevery() == [1]


def test_no_two_arms_look_alike_and_an_arm_looks_alike_in_all_panels():
    names = [arm.name for arm in candidates(64)]
    styles = claim_figure.styles_of([*names, *names])
    assert len(set(styles.values())) == len(names)
    words = [claim_page.words_of(64, name) for name in names]
    assert len(set(words)) == len(words)
    assert claim_page.words_of(128, SHARED) == claim_page.words_of(64, SHARED)


@pytest.mark.slow
def test_the_axis_has_widths_on_both_sides_of_every_point(points):
    axes = Figure().subplots()
    claim_figure.set_width_axis(axes, points)
    ticks = [int(text.get_text()) for text in axes.get_xticklabels()]
    assert ticks == [64, 128, 256, 512]
    alone = points[0].place
    few = alone._replace(read=alone.read._replace(dense={512: {42: 1.0}}))
    claim_figure.set_width_axis(axes, [Point("tiles", few)])
    low, high = min(axes.get_xticks()), max(axes.get_xticks())
    assert low <= few.width.greater < 512 <= high


def test_pairs_bound_the_multiplier_beside_its_interval():
    assert (
        by_pairs({}) == "-0.0400 ± 0.0000 at 128, +0.0100 ± 0.0000 at 256: low ≥ 0.88"
    )
    undecided = by_pairs({42: 4.66, 43: 4.66, 44: 4.70})
    assert undecided.endswith("at 256: low ≤ 0.88")
    assert by_pairs({42: 4.66}) == "-0.0200 at 128, +0.0300 at 256"


def by_pairs(ours):
    """Of the recommended tiles, whose W is 145, with these losses by seed."""
    runs = runs_of(LOSSES | ({SHARED: ours} if ours else {}))
    place = claim_page.place_of(64, runs, SHARED)
    assert place.width.greater == pytest.approx(145, abs=0.1)
    return beside.by_pairs(64, runs, tuned(runs, SHARED), place)


def rich(run, **more):
    """A run with what the report needs of costs and evaluations."""
    lines = [
        {"step": step, "val_loss": run.val_loss + gap, "routing_stability": kept}
        for step, gap, kept in (
            (500, 0.5, []),
            (1000, 0.2, [0.5, 0.7]),
            (2000, 0, [1.0, 0.9]),
        )
    ]
    known = {"steps": 2000, "val_bits_per_byte": run.val_loss / 2, "evaluations": lines}
    active = 256 * (run.width or 128)
    costs = {"ffn_active": active, "active_width": active / 256}
    costs |= {"params_total": 1000 + active, "ffn_bits": 16 * active}
    return run._replace(**(known | costs | more))


def test_the_table_beside_dense_has_bits_seconds_and_the_ffn_of_equal_parameters():
    losses = {"dense-512": 4.44, "dense-1024": 4.38, SHARED: 4.40}
    runs = [
        rich(run)
        for run in runs_of(
            {n: dict.fromkeys((42, 43, 44), x) for n, x in losses.items()}, 128
        )
    ]
    tiles = 1024 * 256 + 1000
    runs = [
        run._replace(params_total=tiles) if run.arm == SHARED else run for run in runs
    ]
    place = claim_page.place_of(128, runs, SHARED)
    section = "\n".join(beside.section({128: (runs, SHARED, "tiles", place)}))
    own, narrow, wide = [r for r in section.splitlines() if " | 128 | " in r]
    seconds = beside.seconds_a_step(128, SHARED)
    assert own.startswith("| tiles | 128 | 43, 44 | 4.4000 | 2.2000 | 262,144 |  |  |")
    assert own.endswith(f"| {seconds:.3f} | {2000 * seconds:,.0f} |  |")
    assert (
        "| dense 512 | 128 | 43, 44 | 4.4400 | 2.2200 | 131,072 | -0.0400 | ± 0.0000 |"
        in narrow
    )
    assert narrow.endswith(f"| 1,800 steps, {1800 * seconds:,.0f} s |")
    assert wide.startswith("| dense 1024 (equal parameters) | 128 |")
    assert wide.endswith("| not there |")
    assert "Not run" not in section
    narrower = [run for run in runs if run.arm != "dense-1024"]
    narrower += [rich(run) for run in runs_of({"dense-256": {42: 4.5}}, 128)]
    place = claim_page.place_of(128, narrower, SHARED)
    section = "\n".join(beside.section({128: (narrower, SHARED, "tiles", place)}))
    assert "Not run: the dense FFN of equal parameters, 1024 at D = 128." in section


def test_routes_that_are_kept_are_shown_by_step():
    runs = [rich(run) for run in runs_of({"tiles-64-held": {42: 4.6, 43: 4.6}})]
    one = tuned(runs, "tiles-64-held")
    _, table = standing.section([("here", one)])
    assert table.splitlines()[0].endswith("| seeds | 1,000 | 2,000 |")
    assert "| tiles-64-held | here | 0.002* | 2 | 0.600 | 0.950 |" in table
    assert (
        standing.section(
            [("here", tuned(runs_of({"dense-64": {42: 4.6}}), "dense-64"))]
        )
        == []
    )


def test_the_sweep_of_the_recommended_tiles_is_drawn():
    for d in (64, 128):
        assert any(SHARED in shown for shown in report.panels_of(claim(d)))


def test_names_of_arms_of_one_loss_stand_apart():
    axes = Figure(figsize=(8, 5), dpi=150).subplots()
    arms = [
        tuned(runs_of({name: {42: loss}}), name)
        for name, loss in (("tiles-64-held", 2.0), ("tiles-64-hash", 2.001))
    ]
    axes.set_ylim(1.5, 2.5)
    widths.name_arms(axes, arms, [64, 64])
    first, second = (text.xyann[1] for text in axes.texts)
    assert [text.get_color() for text in axes.texts] == [
        colour for colour, _ in STYLES[:2]
    ]
    points = 0.001 * axes.bbox.height * 72 / 150
    assert second + points - first == pytest.approx(widths.NAME_POINTS)


def test_steps_to_a_loss_are_linear_between_evaluations():
    runs = [rich(run) for run in runs_of({"tiles-64-held": {42: 4.6, 43: 4.8}})]
    assert beside.steps_to(runs, 4.8) == pytest.approx(1500)
    assert beside.steps_to(runs, 9.0) == 500
    assert beside.steps_to(runs, 4.0) is None
