"""What an arm is worth: widths counted by hand, places on a curve that is known."""

import dataclasses
import json
import math
import shlex

import pytest

from experiments.quality import claim_page, worth
from experiments.quality.claim import LADDER, SETTINGS, claim, held
from experiments.quality.schedule import spec_of
from trix_jax.cli.experiment import parse_run
from trix_jax.lm.experiment import results
from trix_jax.lm.experiment.results import Result
from trix_jax.lm.experiment.tuning import tuned

VOCABULARY = 4096
SEEDS = (42, 43, 44, 45)
EMPTY = dict.fromkeys(Result._fields)


def width_of(arm):
    return int(arm.name.rpartition("-")[2])


def run_of(setting, arm, loss, seed=42, rate=2e-3):
    width = width_of(arm) if arm.name.startswith("dense") else None
    values = {"setting": setting.name, "arm": arm.name, "width": width, "seed": seed}
    values |= {"learning_rate": rate, "val_loss": loss, "sampler": "epochs"}
    return Result(**(EMPTY | values))


def with_sweeps(setting, runs):
    """And one of every arm whose rate they inherit and that has none."""
    own = {run.arm for run in runs}
    likes = {setting.arm(name).rate_of for name in own} - {None} - own
    swept = [run_of(setting, setting.arm(name), 9.0, 42) for name in sorted(likes)]
    return [*runs, *swept]


def test_widths_are_those_counted_by_hand():
    setting = claim(128)
    for number, compute, memory in ((16, 136, 72), (64, 160, 288)):
        model = worth.model_of(setting, held(number), VOCABULARY)
        found = worth.width_of(model)
        # Four tiles of 32 and the scores of all; two bits a weight and signatures.
        assert found.compute == 4 * 32 + number / 2 == compute
        assert found.memory == pytest.approx(number * 32 / 8 + number / 2, rel=0.01)
        assert found.memory == pytest.approx(memory, rel=0.01)
    table = worth.forms(model)["table"]
    assert table.compute == 128
    assert table.memory == pytest.approx(256 + 4096 * 4 * (8 + 16) / 16 / 256, rel=0.01)
    hashed = worth.model_of(setting, setting.groups["hash"][1], VOCABULARY)
    assert set(worth.forms(hashed)) == {"scored"}
    assert worth.width_of(hashed).compute == 128
    dense = worth.model_of(setting, setting.arm("dense-512"), VOCABULARY)
    assert worth.width_of(dense).compute == worth.width_of(dense).memory == 512


def runs_at(d, held_losses):
    """A curve that falls by 0.1 a doubling from 5.0 at D, and held tiles on it."""
    setting = claim(d)
    dense = [
        run_of(setting, arm, 5.0 - 0.1 * math.log2(width_of(arm) / d), seed)
        for arm in setting.groups["dense-curve"]
        for seed in SEEDS
    ]
    ladder = [
        run_of(setting, held(number), loss, seed)
        for number, loss in held_losses.items()
        for seed in SEEDS
    ]
    return [*dense, *ladder]


@pytest.mark.slow
def test_the_claim_is_the_number_of_tiles_whose_least_multiplier_is_greatest():
    # At 64 tiles the loss is that of 8 D, at 32 that of less than 4 D.
    runs = {d: runs_at(d, {64: 4.7, 32: 4.85}) for d in (64, 128)}
    found = worth.claim_tree(runs, VOCABULARY)
    assert found["signature_minus_hash"] is None
    rows = {row["width"]: row for row in found["settings"]}
    assert {row["arm"] for row in rows.values()} == {"tiles-64-held"}
    for d, row in rows.items():
        model = worth.model_of(claim(d), held(64), VOCABULARY)
        expected = 8 * d / worth.width_of(model).greater
        assert row["multiplier"] == pytest.approx(expected)
        assert row["low"] == pytest.approx(expected)
        assert row["seeds"] == 3  # the first one chose
        assert not row["at_least"]
    assert not worth.claim_tree({128: runs[128]}, VOCABULARY)["settings"]


@pytest.mark.slow
def test_of_arms_beyond_the_curve_the_one_of_least_loss_is_chosen():
    for better, name in ((32, "tiles-32-held"), (64, "tiles-64-held")):
        losses = {32: 4.5, 64: 4.5} | {better: 4.4}
        runs = {d: runs_at(d, losses) for d in (64, 128)}
        assert claim_page.chosen(128, runs[128]) == name
        found = worth.best_at_all_widths(runs, VOCABULARY)
        assert {row.arm for row in found.values()} == {name}
        for row in worth.claim_tree(runs, VOCABULARY)["settings"]:
            widest = 16 * row["width"] / found[row["width"]].width.greater
            assert row["multiplier"] == row["low"] == pytest.approx(widest)
            assert row["at_least"]
            assert row["high"] is None


def test_tiles_short_of_the_curve_are_worth_at_most_its_narrowest():
    runs = {d: runs_at(d, {64: 5.2}) for d in (64, 128)}
    found = worth.best_at_all_widths(runs, VOCABULARY)
    for row in worth.claim_tree(runs, VOCABULARY)["settings"]:
        narrowest = row["width"] / found[row["width"]].width.greater
        assert row["multiplier"] == row["high"] == pytest.approx(narrowest)
        assert row["at_most"]
        assert not row["at_least"]


def test_without_the_seed_that_chooses_the_first_that_has_run_does_on_its_own_curve():
    setting, arm = claim(128), claim(128).groups["best"][0]
    tiles = [run_of(setting, arm, 4.7 + (seed - 43), seed) for seed in (43, 44)]
    runs = with_sweeps(setting, [*runs_at(128, {}), *tiles])
    place = worth.worth(setting, runs, arm, VOCABULARY, worth.choosing)
    assert place.read.own == {43: 4.7}
    assert {tuple(losses) for losses in place.read.dense.values()} == {(43,)}
    # It is no match for an arm that the seed which chooses has run.
    ladder = [run_of(setting, held(64), 4.85, seed) for seed in SEEDS]
    assert claim_page.chosen(128, runs) == arm.name
    assert claim_page.chosen(128, [*runs, *ladder]) == "tiles-64-held"


def test_one_seed_chooses_the_arm_and_the_others_conclude():
    runs = {d: runs_at(d, {64: 4.7, 32: 4.85}) for d in (64, 128)}
    other = {64: 4.95, 32: 4.6}  # what the other seeds would have chosen by

    def moved(run):
        number = int(run.arm.split("-")[1]) if run.arm.endswith("held") else None
        if number is None or run.seed == SEEDS[0]:
            return run
        return run._replace(val_loss=other[number])

    found = worth.claim_tree({d: [*map(moved, r)] for d, r in runs.items()}, VOCABULARY)
    for row in found["settings"]:
        assert row["arm"] == "tiles-64-held"
        model = worth.model_of(claim(row["width"]), held(64), VOCABULARY)
        width = row["width"] * 2**0.5 / worth.width_of(model).greater
        assert row["multiplier"] == pytest.approx(width)


def test_seeds_that_one_side_lacks_move_neither_the_arm_nor_the_curve():
    setting, arm = claim(128), held(64)
    runs = runs_at(128, {64: 4.7, 32: 4.85})
    expected = worth.worth(setting, runs, arm, VOCABULARY)
    more = [run_of(setting, arm, 4.0, seed) for seed in (46, 47)]
    assert worth.worth(setting, [*runs, *more], arm, VOCABULARY) == expected
    dense = setting.groups["dense-curve"]
    curve = [run_of(setting, one, 4.0, seed) for one in dense for seed in (48, 49)]
    assert worth.worth(setting, [*runs, *curve], arm, VOCABULARY) == expected
    assert expected is not None
    assert expected.loss == pytest.approx(4.7)
    # The difference to the hash takes every seed that both have.
    hashed = setting.arm("tiles-64-hash")
    both = [run_of(setting, hashed, 4.1, seed) for seed in (42, 46, 47)]
    found = worth.difference(
        *(tuned([*runs, *more, *both], a.name, a.rate_of) for a in (arm, hashed))
    )
    assert (found.mean, found.n) == (pytest.approx(-0.1), 2)


def test_the_hash_is_compared_by_seed_without_the_one_that_chose():
    setting = claim(128)
    ours, hashed = setting.groups["hash"]
    gaps = {42: 9.0, 43: -0.01, 44: -0.02, 45: -0.03}
    runs = [run_of(setting, hashed, 4.6, seed) for seed in gaps]
    runs += [run_of(setting, ours, 4.6 + gap, seed) for seed, gap in gaps.items()]
    found = worth.claim_tree({128: runs}, VOCABULARY)["signature_minus_hash"]
    assert found["mean"] == pytest.approx(-0.02)
    assert found["half_width"] == pytest.approx(0.01 * 4.30265 / 3**0.5, rel=1e-4)
    assert found["seeds"] == 3
    assert worth.signatures_less_hash(runs[:6]) is None
    # The seed that chooses takes the hash of pairs, and signatures that keep scores.
    pairs, scores = (
        setting.arm(f"tiles-64-{name}") for name in ("hash-pairs", "held-scores")
    )
    better = [run_of(setting, pairs, 4.5, 42), run_of(setting, scores, 4.5, 42)]
    assert worth.claim_tree({128: [*runs, *better]}, VOCABULARY) == {
        "settings": [], "signature_minus_hash": found
    }  # fmt: skip
    for seed in (43, 44, 45):
        better += [run_of(setting, pairs, 4.7, seed)]
        better += [run_of(setting, scores, 4.7 + seed / 100, seed)]
    found = worth.signatures_less_hash([*runs, *better])
    assert found["mean"] == pytest.approx(0.44)
    # More tiles a token cost otherwise: they are compared with their own hash alone.
    for how in ("routes", "ungated", "table", "early-table", "layers"):
        assert worth.form_of(f"tiles-64-held-eighth-shared-{how}") == "-eighth-shared"
    twins = [setting.arm(f"tiles-64-{who}-eighth-shared") for who in ("held", "hash")]
    more = [run_of(setting, twins[1], 4.3, seed) for seed in SEEDS]
    more = with_sweeps(setting, more)
    assert worth.signatures_less_hash([*runs, *better, *more]) == found
    more += [run_of(setting, twins[0], 4.31, seed) for seed in SEEDS]
    found = worth.signatures_less_hash([*runs, *better, *more])
    assert found["mean"] == pytest.approx(0.01)
    # Tiles whose later layers see the hidden state are as ternary as all; late ones not.
    assert worth.form_of(setting.arm("tiles-64-held-late-hidden").name) == ""


def test_arms_of_no_form_differ_in_who_chooses_their_tiles_alone():
    setting = claim(64)
    arms = {arm.name: arm for group in setting.groups.values() for arm in group}
    plain = [n for n in arms if n.startswith("tiles-64-") and not worth.form_of(n)]
    assert {"tiles-64-held", "tiles-64-hash", "tiles-64-learned"} <= set(plain)
    flags = shlex.split(" ".join(arms[name].flags for name in plain))
    names = {flag for flag in flags if flag.startswith("--model.")}
    chooses = "routing. router-input hidden-from hash-per-layer".split()
    chooses = tuple(f"--model.{name}" for name in chooses)
    others = {name for name in names if not name.startswith(chooses)}
    assert others == {"--model.num-tiles", "--model.expansion"}
    assert not any(flag.startswith("--train.") for flag in flags)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["wikipedia-64-body", "wikipedia-64"]
)  # as other widths
def test_every_arm_of_the_claim_is_a_model_that_can_be(name):
    setting = SETTINGS[name]
    arms = {arm.name: arm for group in setting.groups.values() for arm in group}
    for arm in arms.values():
        assert arm.rate_of is None or arm.rate_of in arms
        preset, *flags = spec_of(setting, arm, 1e-3, 42).flags
        config = parse_run([preset, *flags])
        assert config.train.learning_rate == 1e-3
        assert config.model.d_model == int(name.split("-")[1])
        if arm.name.startswith("tiles-"):
            model, quarter = config.model, config.model.d_model // 4
            active = model.num_tiles // 8 if "eighth" in arm.name else 4
            if model.routing.sets_per_token > 1:
                active += 1  # twelve tiles: their W is the served memory's, as before
            assert (
                model.tile_width * model.tiles_per_token + model.shared_width
                == active * quarter
            )
            assert model.tile_width == quarter or "fine" in arm.name
        assert worth.width_of(dataclasses.replace(config.model, vocab_size=9)).greater
    assert {f"tiles-{n}-held" for n in LADDER} <= set(arms) or "body" in name


@pytest.mark.parametrize(
    "d", [64, *(pytest.param(d, marks=pytest.mark.slow) for d in (128, 256))]
)
def test_an_eighth_of_the_tiles_computes_what_it_stores(d):
    for arm in claim(d).groups["balanced-hash"]:
        width = worth.width_of(worth.model_of(claim(d), arm, VOCABULARY))
        assert width.memory == pytest.approx(width.compute, rel=0.01)


@pytest.mark.slow
def test_the_page_opens_with_a_figure_and_a_table_of_what_is_there(tmp_path):
    assert claim_page.section(tmp_path) == []
    (tmp_path / "results").mkdir()
    for d in (64, 128):
        runs = [
            run._replace(
                steps=10,
                tokens=100,
                tokens_per_second=20.0,
                params_total=1,
                ffn_active=1,
                ffn_bits=1,
            )
            for run in runs_at(d, {64: 4.7, 32: 4.85})
        ]
        results.write(tmp_path / "results" / f"wikipedia-{d}.json", runs)
    text = "\n".join(claim_page.section(tmp_path))
    rows = [line for line in text.splitlines() if "(`tiles-" in line]
    assert len(rows) == 4
    assert " | 128 | " in rows[0]  # as many seeds: the wider one
    assert (
        len(
            [
                r
                for r in "\n".join(claim_page.ladders(tmp_path)).splitlines()
                if "(`tiles-" in r
            ]
        )
        == 4
    )
    held = "4 of 64 ternary tiles by signatures that are held (`tiles-64-held`)"
    for d, cells in (
        (
            64,
            "4.7000 |  | 96 | 162 | 512 | 3.17 | 5.33 | 3.17 | +0.0000 ± 0.0000 at 512: low ≥ 1.59 |",
        ),
        (
            128,
            "4.7000 |  | 160 | 289 | 1024 | 3.55 | 6.40 | 3.55 | +0.0000 ± 0.0000 at 1024: low ≥ 1.77 |",
        ),
    ):
        assert f"| {held} | {d} | 0.002* | 3 | {cells}" in text
    assert (tmp_path / "results" / "claim.png").stat().st_size > 10_000
    found = json.loads((tmp_path / "results" / "claim.json").read_text())
    assert [row["width"] for row in found["settings"]] == [64, 128]
