"""What the pages say of sets is what the committed files hold."""

import json
import statistics

import pytest

from experiments.quality.run import RESULTS
from experiments.speed import steps
from trix_jax.lm.experiment import results

SPEED = (steps.PATH.parents[1] / "README.md").read_text("utf-8")
PAGE = (steps.ROOT / "docs" / "results.md").read_text("utf-8")
T = 4.3027  # of 95 % and three seeds
ARM = "tiles-96-hash-eighth-shared"


def less_own_tiles(width, arm):
    """By seed, at the rate that was swept without sets."""
    losses = {}
    for run in results.read(RESULTS / f"wikipedia-{width}.json"):
        if run.arm in (f"{ARM}-layers", f"{ARM}-{arm}"):
            if run.learning_rate == 4e-3:
                losses[run.arm, run.seed] = run.val_loss
    seeds = [seed for name, seed in losses if name.endswith(arm)]
    return {
        s: losses[f"{ARM}-{arm}", s] - losses[f"{ARM}-layers", s] for s in sorted(seeds)
    }


@pytest.mark.parametrize(
    ("width", "arm", "row"),
    [
        (64, "sets-64x1", "| 64 | 64 |"),
        (128, "sets-64x1", "| 128 | 64 |"),
        (128, "sets-256x1", "| 128 | 256 |"),
        (128, "sets-64x2", "| 128 | 64, twice (six tiles each) |"),
        (128, "sets-32x3", "| 128 | 32, three times (four tiles each) |"),
    ],
)
def test_losses_of_sets_are_those_of_the_committed_runs(width, arm, row):
    (line,) = (x for x in PAGE.splitlines() if x.startswith(row))
    by_seed = less_own_tiles(width, arm)
    if len(by_seed) == 1:
        assert f"| {by_seed[42]:+.3f} | 42 |" in line
        return
    found = [by_seed[seed] for seed in (43, 44, 45)]
    half = T * statistics.stdev(found) / 3**0.5
    assert f"{statistics.mean(found):+.3f} ± {half:.3f}" in line
    assert "| 43 to 45 |" in line


@pytest.mark.parametrize(
    ("setting", "row", "dense"),
    [
        ("wikipedia-64", "| 64, 2,048 |", "dense-192"),
        ("wikipedia-128", "| 128, 2,048 |", "dense-384"),
        ("wikipedia-128-of-8192", "| 128, 8,192 |", "dense-384"),
    ],
)
def test_steps_in_sets_are_those_that_were_timed(setting, row, dense):
    arms = json.loads(steps.PATH.read_text("utf-8"))["settings"][setting]["arms"]
    own, few, equal = (arms[a] for a in (f"{ARM}-layers", f"{ARM}-sets-64x1", dense))
    many = arms.get(f"{ARM}-sets-256x1")
    middle = f"{1e3 * many['seconds']:.0f}" if many else ""
    (line,) = (x for x in SPEED.splitlines() if x.startswith(row))
    own_ms, few_ms, equal_ms = (f"{1e3 * a['seconds']:.0f}" for a in (own, few, equal))
    cells = (own_ms, few_ms, middle, equal_ms)
    assert line.startswith(f"{row} {' | '.join(cells)} |".replace("|  |", "| |"))
    assert f"| {as_fast(few)} | {equal['seconds'] / few['seconds']:.2f} |" in line
    if many:
        share = equal["seconds"] / many["seconds"]
        assert f"256 sets at 8,192 tokens: {as_fast(many)} and {share:.2f}." in SPEED


def as_fast(arm):
    """How many times as fast as own tiles, of which the file has the inverse."""
    low, middle, high = (1 / arm["first_is"][k] for k in ("high", "ratio", "low"))
    return f"**{middle:.2f}** ({low:.2f} to {high:.2f})"
