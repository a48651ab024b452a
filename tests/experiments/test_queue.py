"""What runs next: a function of the plan and the results, checked on made-up losses."""

import dataclasses
import math
import shlex

import pytest

from experiments.quality import results
from experiments.quality.arms import Arm
from experiments.quality.design import SEEDS, SETTINGS, Setting, Step
from experiments.quality.run import (
    ROOT,
    best_rate,
    claim,
    next_rate,
    next_run,
    runs_to_come,
)
from trix_jax.cli.train import Args
from trix_jax.lm.presets import parse_preset

A, B = Arm("a", ""), Arm("b", "", start=1e-3)
LIKE_A = Arm("like-a", "", rate_of="a")
GROUPS = {"first": (A, B), "second": (LIKE_A,)}


def line(task, loss):
    return {
        "arm": task.arm.name,
        "learning_rate": task.rate,
        "seed": task.seed,
        "val_loss": loss,
    }


def finish(setting, loss_of, done=()):
    """All runs of a plan, in order, and the results."""
    done, order = list(done), []
    while task := next_run(setting, done):
        assert len(order) < 1000
        order.append(task)
        done.append(line(task, loss_of(task)))
    return order, done


def bowl(task):
    """Best at 2e-3."""
    return 1 + math.log2(task.rate / 2e-3) ** 2 + task.seed / 1000


def test_sweep_goes_outwards_until_the_optimum_is_inside():
    losses, loss_at = {}, lambda rate: (math.log2(rate / 1e-3)) ** 2
    while rate := next_rate(losses, 8e-3):
        losses[rate] = loss_at(rate)
    assert sorted(losses) == [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]
    assert min(losses, key=losses.get) == 1e-3


def test_sweep_leaves_the_rates_at_which_everything_diverges():
    assert next_rate({4e-3: math.inf}, 4e-3) == 2e-3
    assert next_rate({4e-3: math.inf, 2e-3: math.inf}, 4e-3) == 1e-3


def test_plan_brackets_rates_breadth_first_and_then_trains_seeds_at_the_best():
    setting = Setting("s", "", GROUPS, (Step("first", 3),))
    order, done = finish(setting, bowl)
    assert [t[0].name for t in order[:4]] == ["a", "b", "a", "b"]
    for name in "ab":
        assert best_rate(done, name) == 2e-3
        assert {1e-3, 2e-3, 4e-3} <= set(results.sweep(done, name, SEEDS[0]))
        assert sorted(results.at_rate(done, name, 2e-3)) == list(SEEDS[:3])
    assert len(order) == 3 + 4 + 2 * 2  # b looks at 5e-4 first


def test_first_look_trains_each_arm_once_at_its_start():
    order, _ = finish(Setting("s", "", GROUPS, (Step("first", 0),)), bowl)
    assert [(t.arm.name, t.rate, t.seed) for t in order] == [
        ("a", 4e-3, SEEDS[0]),
        ("b", 1e-3, SEEDS[0]),
    ]


def test_arm_that_inherits_its_rate_waits_for_it_and_does_not_sweep():
    alone = Setting("s", "", GROUPS, (Step("second", 2),))
    assert next_run(alone, []) is None
    both = Setting("s", "", GROUPS, (Step("first", 1), Step("second", 2)))
    order, _ = finish(both, bowl)
    assert [(t.rate, t.seed) for t in order if t.arm is LIKE_A] == [
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


def test_processes_side_by_side_never_take_the_same_run(tmp_path):
    setting = Setting("s", "", GROUPS, (Step("first", 1), Step("second", 2)))
    path, holds, order = tmp_path / "s.json", [], []
    while found := claim(setting, path, tmp_path):
        order.append(found[0])
        holds.append(found[1])
    assert [(t.arm.name, t.rate) for t in order] == [("a", 4e-3), ("b", 1e-3)]
    results.add(path, line(order[0], bowl(order[0])))  # done, and still held
    task, hold = claim(setting, path, tmp_path)
    assert (task.arm.name, task.rate) == ("a", 2e-3)
    for one in (*holds, hold):
        one.close()
    again, hold = claim(setting, path, tmp_path)  # whoever was at it is gone
    assert again == order[1]
    hold.close()


def test_seeds_wait_until_the_rate_is_bracketed():
    setting = Setting("s", "", GROUPS, (Step("first", 2), Step("second", 2)))
    _, done = finish(setting, bowl)
    open_again = [r for r in done if (r["arm"], r["learning_rate"]) != ("a", 4e-3)]
    open_again = [r for r in open_again if r["arm"] != "like-a"]
    come = list(runs_to_come(setting, open_again))
    assert [(t.arm.name, t.rate) for t in come] == [("a", 4e-3)]


def test_diverged_runs_count_as_done_and_are_never_the_best():
    done = [line(next_run(SETTINGS["shakespeare-char"], []), None)]
    assert results.loss(done[0]) == math.inf
    task = next_run(SETTINGS["shakespeare-char"], done)
    assert (task.arm.name, task.rate) != (done[0]["arm"], done[0]["learning_rate"])


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_setting_is_consistent(setting):
    names = {arm.name for group in setting.groups.values() for arm in group}
    for group in setting.groups.values():
        for arm in group:
            assert setting.arm(arm.name) == arm  # one meaning for one name
            assert arm.rate_of is None or arm.rate_of in names
    assert {step.group for step in setting.plan} <= setting.groups.keys()
    assert all(setting.arm(name) for name, _, _ in setting.also)
    with pytest.raises(ValueError, match="arm must be one of"):
        setting.arm("none of these")


def test_plan_of_every_setting_ends():
    for setting in SETTINGS.values():
        order, done = finish(setting, bowl)
        assert len({results.key(r) for r in done}) == len(order)


def test_results_file_replaces_a_run_and_stays_in_order(tmp_path):
    path = tmp_path / "results" / "s.json"
    assert results.read(path) == []
    lines = [
        {"arm": arm, "learning_rate": 1e-3, "seed": 42, "val_loss": loss}
        for arm, loss in (("b", 1.0), ("a", 2.0), ("b", 3.0))
    ]
    for one in lines:
        results.add(path, one)
    assert results.read(path) == [lines[1], lines[2]]
    assert [p.name for p in path.parent.iterdir()] == ["s.json"]


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_flags_of_every_arm_are_understood_and_no_two_arms_are_the_same(setting):
    seen = {}
    for group in setting.groups.values():
        for arm in group:
            argv = [str(ROOT / setting.preset), *shlex.split(arm.flags)]
            config = parse_preset(Args, argv, "train").config
            config = dataclasses.replace(config, arm="")
            assert seen.setdefault((config, arm.patch), arm.name) == arm.name
    assert len(seen) == len(set(seen.values()))
