"""The settings of the lookup layer and of routing by clusters, and what clusters save."""

import dataclasses

import pytest

from experiments.quality import worth
from experiments.quality.lookups import BEST, NUMBERS, SETTINGS, clustered, flat, lookup
from experiments.quality.run import ROOT
from experiments.quality.schedule import runs_to_come, spec_of
from experiments.speed import hierarchy
from trix_jax.cli.experiment import parse_run
from trix_jax.files import read_json
from trix_jax.lm.accounting import costs


def model_of(setting, arm):
    preset, *flags = spec_of(setting, arm, 1e-3, 42).flags
    return dataclasses.replace(parse_run([preset, *flags]).model, vocab_size=4096)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_every_arm_is_a_model_that_can_be(name):
    setting = SETTINGS[name]
    arms = {arm.name: arm for group in setting.groups.values() for arm in group}
    for arm in arms.values():
        assert arm.rate_of is None or arm.rate_of in arms
        model = model_of(setting, arm)
        assert model.d_model == int(name.split("-")[1])
        assert worth.width_of(model).greater > 0
    first = next(iter(runs_to_come(setting, [])))
    assert first.arm == next(iter(arms))


def test_the_best_lookup_is_as_wide_as_its_scores_and_neurons():
    width = worth.width_of(model_of(lookup(128), BEST))
    # 16 clusters, two of 16 tiles, 16 neurons; a spline is one product more.
    assert width.compute == pytest.approx((16 + 32) / 2 + 16 + 16 / 256)
    assert width.greater == width.compute


@pytest.mark.parametrize(
    "number",
    [NUMBERS[0], *(pytest.param(n, marks=pytest.mark.slow) for n in NUMBERS[1:])],
)
def test_clusters_save_scores_in_training_and_serving_and_nothing_else(number):
    setting = SETTINGS["hierarchical-64"]
    one, other = (
        costs(model_of(setting, arm)) for arm in (flat(number), clustered(number, 2))
    )
    size = hierarchy.cluster_size(number)
    saved = 4 * 64 * (number - (number // size + 2 * size))
    assert one.ffn_active - other.ffn_active == saved
    assert one.ffn_active_training - other.ffn_active_training == saved


@pytest.mark.slow
def test_speed_of_clusters_is_measured_for_every_use():
    rows = hierarchy.compare(16, hierarchy.Shape(8, 4, 32), rounds=3)
    assert len(rows) == 4 * len(hierarchy.USES)
    assert all(0 < row["low"] <= row["high"] for row in rows)


def test_page_has_every_measured_number_of_tiles_and_clusters():
    measured = read_json(hierarchy.PATH)["rows"]
    rows = {(r["num_tiles"], r["use"], r["kind"]): r for r in measured}
    page = (ROOT / "docs" / "layers.md").read_text("utf-8")
    for number in {one["num_tiles"] for one in measured}:
        for top, word in ((2, "two"), (4, "four")):
            uses = ("training", "all"), ("training", "open"), ("serving", "open")
            found = [rows[number, use, f"{top} clusters, {over}"] for use, over in uses]
            cells = (
                "{of_flat:.2f} ({low:.2f} to {high:.2f})".format(**r) for r in found
            )
            assert f"| {number} | {word} | {' | '.join(cells)} |" in page
