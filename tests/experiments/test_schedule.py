"""What runs next: a function of the design and the results, on made-up losses."""

import dataclasses
import math
from pathlib import Path

import pytest

from experiments.quality import run
from experiments.quality.arms import Arm
from experiments.quality.design import SEEDS, SETTINGS, Setting, Step
from experiments.quality.run import RESULTS, placed
from experiments.quality.schedule import next_rate, runs_to_come, spec_of
from trix_jax.cli.experiment import parse_run
from trix_jax.lm.experiment import results
from trix_jax.lm.experiment.spec import command
from trix_jax.lm.experiment.tuning import at_rate, best_rate, sweep

A, B = Arm("a", ""), Arm("b", "", start=1e-3)
LIKE_A = Arm("like-a", "", rate_of="a")
GROUPS = {"first": (A, B), "second": (LIKE_A,)}


def test_a_shrunken_copy_needs_results_of_its_own(tmp_path, capsys):
    argv = ["wikipedia-64", "--data", "x", "--flags", "--train.steps 5"]
    with pytest.raises(SystemExit):
        run.main(argv)
    assert "give them --results of their own" in capsys.readouterr().err


def next_run(setting, done):
    return next(runs_to_come(setting, done), None)


def result(spec, loss):
    known = spec._asdict() | {"learning_rate": spec.rate, "val_loss": loss}
    return results.from_tree(known)


def finish(setting, loss_of, done=()):
    """All runs of a setting, in order, and the results."""
    done, order = list(done), []
    while spec := next_run(setting, done):
        assert len(order) < 1000
        order.append(spec)
        done.append(result(spec, loss_of(spec)))
    return order, done


def bowl(spec):
    """Best at 2e-3."""
    return 1 + math.log2(spec.rate / 2e-3) ** 2 + spec.seed / 1000


def test_sweep_goes_outwards_until_the_optimum_is_inside():
    losses, loss_at = {}, lambda rate: (math.log2(rate / 1e-3)) ** 2
    while rate := next_rate(losses, 8e-3):
        losses[rate] = loss_at(rate)
    assert sorted(losses) == [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]
    assert min(losses, key=losses.get) == 1e-3
    assert next_rate({2e-3: 1.0}, 4e-3) == 4e-3  # where a sweep begins now


def test_sweep_leaves_the_rates_at_which_everything_diverges():
    assert next_rate({4e-3: math.inf}, 4e-3) == 2e-3
    assert next_rate({4e-3: math.inf, 2e-3: math.inf}, 4e-3) == 1e-3


def test_schedule_brackets_rates_breadth_first_and_then_trains_seeds_at_the_best():
    setting = Setting("s", "", GROUPS, (Step("first", 3),))
    order, done = finish(setting, bowl)
    assert [s.arm for s in order[:4]] == ["a", "b", "a", "b"]
    for name in "ab":
        assert best_rate(sweep(done, name, SEEDS[0])) == 2e-3
        assert {1e-3, 2e-3, 4e-3} <= set(sweep(done, name, SEEDS[0]))
        assert sorted(at_rate(done, name, 2e-3)) == list(SEEDS[:3])
    assert len(order) == 3 + 4 + 2 * 2  # b looks at 5e-4 first


def test_first_look_trains_each_arm_once_at_its_start():
    order, _ = finish(Setting("s", "", GROUPS, (Step("first", 0),)), bowl)
    assert [(s.arm, s.rate, s.seed) for s in order] == [
        ("a", 4e-3, SEEDS[0]),
        ("b", 1e-3, SEEDS[0]),
    ]


def test_arm_that_inherits_its_rate_waits_for_it_and_does_not_sweep():
    alone = Setting("s", "", GROUPS, (Step("second", 2),))
    assert next_run(alone, []) is None
    both = Setting("s", "", GROUPS, (Step("first", 1), Step("second", 2)))
    order, _ = finish(both, bowl)
    assert [(s.rate, s.seed) for s in order if s.arm == "like-a"] == [
        (2e-3, SEEDS[0]),
        (2e-3, SEEDS[1]),
    ]


def test_queue_that_was_cut_off_goes_on_where_it_was():
    setting = Setting(
        "s", "", GROUPS, (Step("first", 2), Step("second", 2)), (("a", 8e-3, 1),)
    )
    order, done = finish(setting, bowl)
    for cut in range(len(order)):
        rest, _ = finish(setting, bowl, done[:cut])
        assert rest == order[cut:]


def test_seeds_wait_until_the_rate_is_bracketed():
    setting = Setting("s", "", GROUPS, (Step("first", 2), Step("second", 2)))
    _, done = finish(setting, bowl)
    open_again = [r for r in done if (r.arm, r.learning_rate) != ("a", 4e-3)]
    open_again = [r for r in open_again if r.arm != "like-a"]
    come = list(runs_to_come(setting, open_again))
    assert [(s.arm, s.rate) for s in come] == [("a", 4e-3)]


def test_diverged_runs_count_as_done_and_are_never_the_best():
    setting = SETTINGS["shakespeare-char"]
    first = next_run(setting, [])
    done = [result(first, None)]
    assert done[0].val_loss == math.inf
    assert next_run(setting, done).name != first.name


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_setting_is_consistent(setting):
    names = {arm.name for group in setting.groups.values() for arm in group}
    for group in setting.groups.values():
        for arm in group:
            assert setting.arm(arm.name) == arm  # one meaning for one name
            assert arm.rate_of is None or arm.rate_of in names
    assert {step.group for step in setting.order} <= setting.groups.keys()
    assert all(setting.arm(name) for name, _, _ in setting.also)
    with pytest.raises(ValueError, match="arm must be one of"):
        setting.arm("none of these")


@pytest.mark.slow
def test_schedule_of_every_setting_ends():
    for setting in SETTINGS.values():
        order, done = finish(setting, bowl)
        assert len({r.name for r in done}) == len(order)


def shape_of(model):
    if model.ffn == "dense":
        return model.dense_width, None, None, None
    tile_width = None if model.ffn == "lookup" else model.tile_width
    return None, model.num_tiles, tile_width, model.tiles_per_token


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_flags_of_every_arm_mean_what_its_results_were_made_with_and_no_other_arm(
    setting,
):
    seen, made_with = {}, {}
    for r in results.read(RESULTS / f"{setting.name}.json"):
        shape = r.width, r.num_tiles, r.tile_width, r.tiles_per_token
        made_with.setdefault(r.arm, set()).add(shape)
    for group in setting.groups.values():
        for arm in group:
            preset, *flags = placed(spec_of(setting, arm, 1e-3, 42), Path(), "").flags
            config = parse_run([preset, *flags])
            config = dataclasses.replace(config, arm="")
            assert seen.setdefault((config, arm.patch), arm.name) == arm.name
            shapes = made_with.get(arm.name, set())
            assert shapes <= {shape_of(config.model)}, arm.name
    assert len(seen) == len(set(seen.values()))


def test_run_of_a_patched_arm_is_made_by_the_patch_program(tmp_path):
    setting = SETTINGS["shakespeare-char"]
    spec = spec_of(setting, setting.arm("lookup-16-flat"), 2e-3, 42)
    spec = placed(spec, tmp_path / "store", "--train.steps 3")
    assert spec.patch == ("experiments.quality.patched", "flat")
    words = command(spec, tmp_path)
    assert words[:2] == ["flat", "train"]
    assert words[-6:] == [
        "--train.steps", "3", "--data.path", str(tmp_path / "store"),
        "--workdir", str(tmp_path / "shakespeare-char/lookup-16-flat-lr0.002-seed42"),
    ]  # fmt: skip
