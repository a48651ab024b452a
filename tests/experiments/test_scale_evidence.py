"""What the page of E1 to E4 takes from elsewhere, and what it and its neighbours count."""

import math

import pytest
import yaml

from experiments.quality import run as quality
from experiments.scale import elsewhere, modelled, needs, page, run
from experiments.scale.verdicts import HYPOTHESIS, REASONS
from trix_jax.files import read_json
from trix_jax.lm.experiment import budget, results
from trix_jax.lm.experiment.results import Result, from_tree
from trix_jax.lm.experiment.stats import paired
from trix_jax.lm.experiment.tuning import tuned

README = (run.HERE.parent / "README.md").read_text("utf-8")
REPORT = (page.HERE / "REPORT.md").read_text("utf-8")


def losses(setting: str, arm: str, rate: float) -> dict[int, float]:
    trees = read_json(elsewhere.RESULTS / f"{setting}.json")
    own = [t for t in trees if (t["arm"], t["learning_rate"]) == (arm, rate)]
    return {tree["seed"]: tree["val_loss"] for tree in own}


@pytest.mark.parametrize(
    ("arm", "other", "rates", "mean", "half", "share", "verdict"),
    [
        ("lookup-16", "dense-64", (2e-3, 2e-3), 0.277, 0.040, 0.87, "not supported"),
        ("lookup-16", "dense-32", (2e-3, 1e-3), 0.212, 0.027, 0.44, "not supported"),
        (elsewhere.PLANE, "dense-32", (2e-3, 1e-3), 0.079, 0.032, 1.25, "undecided"),
    ],
)
def test_hypothesis_on_tinyshakespeare(arm, other, rates, mean, half, share, verdict):
    every = elsewhere.of_claim(HYPOTHESIS)
    (found,) = (one for one in every if (one.arm, one.other) == (arm, other))
    sides = (
        losses(elsewhere.SHAKESPEARE, a, r)
        for a, r in zip((arm, other), rates, strict=True)
    )
    assert found.found["val_loss"] == paired(*sides)
    assert found.found["val_loss"].n == 3
    numbers = (*found.found["val_loss"][:2], found.share)
    assert [round(n, d) for n, d in zip(numbers, (3, 3, 2), strict=True)] == [
        mean,
        half,
        share,
    ]
    assert found.verdict == verdict


def test_reasons_are_answered_by_the_sparse_tiles():
    words = [elsewhere.verdict_of(claim) for claim in REASONS]
    assert words == ["undecided", "supported", "undecided"]
    random, compute, floats = (elsewhere.of_claim(claim) for claim in REASONS)
    means = [
        [round(one.found["val_loss"].mean, 3) for one in every]
        for every in (random, compute, floats)
    ]
    assert means == [[-0.008, -0.008], [-0.066, -0.075, -0.073], [0.010, 0.042]]
    assert all(1 - elsewhere.NEAR < one.share < 1 for one in compute)


def test_dense_ffn_of_another_size_decides_only_against_its_advantage():
    assert elsewhere.fair("not supported", 1.2) == "undecided"
    assert elsewhere.fair("supported", 1.2) == "supported"
    assert elsewhere.fair("supported", 0.8) == "undecided"
    assert elsewhere.fair("not supported", 0.8) == "not supported"
    assert elsewhere.fair("supported", 0.95) == "supported"


def test_diverged_seed_at_the_best_rate_decides_nothing():
    runs = [of(arm, seed) for arm in ("lookup-16", "dense-64") for seed in (42, 43)]
    found = elsewhere.evidence(HYPOTHESIS, runs, "x", "lookup-16", "dense-64")
    assert found.verdict == "not supported"
    runs += [of("lookup-16", 44, math.inf)]
    found = elsewhere.evidence(HYPOTHESIS, runs, "x", "lookup-16", "dense-64")
    assert found.verdict == "undecided"
    with pytest.raises(ValueError, match="must have a run"):
        elsewhere.best(runs, "dense-32")


def of(arm: str, seed: int, loss: float | None = None) -> Result:
    dense = arm.startswith("dense")
    loss = loss or seed / 100 + (0 if dense else 1) + seed % 2 / 1000 * dense
    sizes = {"params_total": 110, "ffn_active": 64, "ffn_bits": 8}
    sizes |= {"width": 64} if dense else {"params_total": 120, "active_width": 64.0}
    return from_tree(
        {"arm": arm, "seed": seed, "learning_rate": 1.0, "val_loss": loss} | sizes
    )


def test_report_says_what_has_not_run_and_what_is_ahead_of_the_best_lookup():
    for name, number in elsewhere.lookups_run().items():
        said = f"{number} runs" if number else "not run"
        assert f"`{name}`: {said}" in REPORT
    four = losses(elsewhere.SHAKESPEARE, elsewhere.FOUR, 2e-3)
    plane = losses(elsewhere.SHAKESPEARE, elsewhere.PLANE, 2e-3)
    ((seed, ahead),) = four.items()
    assert f"their one seed: {ahead:.3f} beside {plane[seed]:.3f}" in REPORT
    assert ahead < plane[seed]


def test_epoch_on_a_cpu_has_a_sixteenth_of_the_tokens_a_step():
    asked = yaml.safe_load((run.ROOT / "configs/tiny.yaml").read_text("utf-8"))
    own = yaml.safe_load((run.HERE / f"{modelled.ON_CORE}.yaml").read_text("utf-8"))
    batches = own["set"]["train.batch_size"], asked["train"]["batch_size"]
    assert 16 * batches[0] == batches[1]
    assert batches[0] * asked["model"]["context"] == 4096
    assert "4,096 tokens a step, a sixteenth of the original's" in REPORT


def test_core_hours_of_the_epoch_are_those_that_were_measured():
    rows = read_json(modelled.PATH)["rows"]
    own = {row["arm"]: row for row in rows if row["experiment"] == modelled.ON_CORE}
    runs = results.read(run.RESULTS / f"{modelled.ON_CORE}.json")
    for arm in {one.arm for one in runs}:
        least = min(one.seconds for one in runs if one.arm == arm)
        assert own[arm]["core_hours"] == round(least / 3600, 2)
        assert own[arm]["core_hours_from"] == "measured"
    (e1,) = (r for r in rows if (r["experiment"], r["arm"]) == ("e1", "lookup"))
    ratio = e1["tokens"] / own["lookup"]["tokens"]
    least = min(one.seconds for one in runs if one.arm == "lookup")
    assert e1["core_hours"] == pytest.approx(ratio * least / 3600, rel=5e-3)
    assert needs.core_cell(own["lookup"]) == f"**{own['lookup']['core_hours']:.2f}**"
    assert needs.core_cell(e1) == f"{e1['core_hours']:.1f}"


def test_minutes_are_of_the_runs_that_shared_a_gpu_and_tell_the_lookup_from_its_twin():
    known = read_json(modelled.PATH)
    assert known["slack_from"] == modelled.SHARED
    assert "seven at a time on an H100" in REPORT
    assert modelled.SHARING == 7
    runs = results.read(elsewhere.RESULTS / f"{modelled.SHARED}.json")
    assert known["start_seconds"] < min(one.seconds for one in runs)
    own = {
        r["arm"]: r["h100_minutes"] for r in known["rows"] if r["experiment"] == "e1"
    }
    assert all(low > known["start_seconds"] / 60 for low, _ in own.values())
    assert own["dense"][0] < own["lookup"][0] < own["sparse"][0]


@pytest.mark.slow
def test_runs_that_shared_a_gpu_filled_it_or_waited(monkeypatch):
    config = budget.filled(run.read("e1").configs["tiny", "dense"])
    monkeypatch.setattr(modelled, "config_of", lambda _: config)
    least, calls = modelled.least_seconds(config), modelled.calls(config)
    one = of("dense", 42)._replace(seconds=30 + 7 * 4 * least)
    slack, wait = modelled.of_shared([one, of("dense", 43)])
    assert slack == pytest.approx(4)
    assert wait == pytest.approx((28 - 1) * least / calls)
    batches = 5e6 / 9 / (64 * 256)
    assert calls == pytest.approx(763 + 12 * batches / 3)
    ends = modelled.h100_minutes(config, slack, wait)
    assert ends == [round((30 + n * least) / 60, 2) for n in (4, 28)]


def test_overview_counts_what_has_run():
    found = {name: elsewhere.read(name) for name in quality.settings()}
    done = {name: runs for name, runs in found.items() if runs}
    three = [name for name, runs in done.items() if seeds_of_tiles(runs) >= 3]
    none = len(found) - len(done)
    said = f"{len(three)} of {len(done)} settings at three seeds, {none} more not run"
    assert said in README
    for name in found:
        assert f"`{name}`" in README
    epoch = results.read(run.RESULTS / f"{modelled.ON_CORE}.json")
    asked = modelled_runs(read_json(modelled.PATH)["rows"])
    assert f"{len(epoch)} of {asked} runs of one epoch of E1" in README


def seeds_of_tiles(runs: list[Result]) -> int:
    """The most seeds that an arm of tiles has at its best rate."""
    runs = max(results.by_sampler(runs).values(), key=len)
    arms = {one.arm for one in runs if not one.is_dense}
    found = (tuned(runs, arm) for arm in arms)
    return max((len(one.runs) for one in found if one), default=0)


def modelled_runs(rows: list[dict]) -> int:
    return sum(row["runs"] for row in rows if row["experiment"] == modelled.ON_CORE)


def test_file_of_all_four_says_what_its_plan_says():
    head = (run.HERE / "all.yaml").read_text("utf-8").partition("\nname:")[0]
    is_over = "**over** its 6 hours" in (run.HERE / "PLAN.md").read_text("utf-8")
    assert ("more than the plan's seven hours" in head) == is_over
