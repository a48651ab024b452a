"""E1 to E4: what is asked, what the runs say, what they take, and the page."""

import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from experiments.scale import modelled, page, run, verdicts
from trix_jax.files import read_json
from trix_jax.lm.accounting import costs
from trix_jax.lm.config import to_tree
from trix_jax.lm.data import DataConfig
from trix_jax.lm.experiment import budget, results
from trix_jax.lm.experiment.results import from_tree


@pytest.fixture(scope="module")
def e1():
    return run.read("e1")


@pytest.fixture(scope="module")
def configs(e1):
    """The resolved configs of E1's arms."""
    return modelled.configs(["e1"])


@pytest.fixture(scope="module")
def every():
    """Those of all experiments: a minute's work."""
    return modelled.configs()


def made(arm, seed, loss, gap=0.0, **more):
    known = {"setting": "e1", "size": "tiny", "arm": arm, "seed": seed}
    known |= {"val_loss": loss, "train_val_gap": gap, "val_ppl": math.exp(loss)}
    sizes = {
        "params_total": 10,
        "ffn_active": 5,
        "ffn_bits": 8000,
        "learning_rate": 1.0,
    }
    return from_tree(known | sizes | more)


# What is asked -----------------------------------------------------------------------


@pytest.mark.slow
def test_arms_of_e1_are_matched_as_their_names_say(configs):
    cost = {arm: costs(config.model) for (_, arm), config in configs.items()}
    for dense, arm, field, within in (
        ("dense", "lookup", "total", 0.001),
        ("dense-active", "lookup", "ffn_active", 0.02),
        ("dense-bits", "lookup", "bits", 0.02),
        ("dense-sparse", "sparse", "total", 0.001),
        ("dense-sparse-active", "sparse", "ffn_active", 0.02),
        ("dense-sparse-bits", "sparse", "bits", 0.02),
    ):
        one, other = (
            cost[a].ffn_bits + cost[a].routing_bits
            if field == "bits"
            else getattr(cost[a], field)
            for a in (dense, arm)
        )
        assert one == pytest.approx(other, rel=within), dense
        assert configs["e1", dense].model.ffn == "dense"
    assert cost["lookup"].total == 2_383_833  # about 2.5 million, as the plan has it
    for control in ("lookup-random", "lookup-float"):
        assert cost[control].total == cost["lookup"].total


@pytest.mark.slow
def test_arms_are_the_layers_that_they_are_called(configs):
    models = {arm: config.model for (_, arm), config in configs.items()}
    lookup, sparse, tiers = (
        models[arm] for arm in ("lookup", "sparse", "hierarchical")
    )
    assert (lookup.ffn, lookup.router_input, lookup.grid_size) == (
        "lookup",
        "hidden",
        16,
    )
    assert models["lookup-best"].ffn == "lookup"
    for model in (sparse, tiers):
        assert (model.num_tiles, model.tiles_per_token) == (16, 4)
        assert model.router_input == "embedding"
    assert (sparse.ffn, tiers.ffn) == ("sparse", "hierarchical")
    for arm in ("lookup", "sparse"):
        assert models[f"{arm}-random"].routing.source == "random"
    assert not models["lookup-float"].ternary_splines
    assert models["sparse-float"].ternary.mode == "none"


@pytest.mark.slow
def test_epochs_are_as_many_as_the_titles_say(every):
    for name, distinct, times in (
        ("e1", 5e6, 10),
        ("e1-one-epoch", 5e6, 1),
        ("e2", 25e6, 8),
        ("e3", 60e6, 1000 / 60),
        ("e4", 50e6, 15),
        ("e4-small", 5e6, 1),
    ):
        config = every[name, "lookup"]
        assert config.data.max_tokens == distinct
        tokens = budget.counted(config)["tokens"]
        assert tokens / distinct == pytest.approx(times, rel=2e-3), name


@pytest.mark.slow
def test_one_epoch_asks_three_seeds_of_the_lookup_and_its_twin_and_one_of_others():
    specs = run.read("e1-one-epoch").specs
    seeds = {}
    for spec in specs:
        seeds.setdefault(spec.arm, []).append(spec.seed)
    assert seeds.pop("lookup") == seeds.pop("dense") == [42, 43, 44]
    assert len(seeds) == 12
    assert set(map(tuple, seeds.values())) == {(42,)}
    assert [spec.arm for spec in specs[:6]] == ["lookup"] * 3 + ["dense"] * 3
    small = [(spec.arm, spec.seed) for spec in run.read("e4-small").specs]
    assert len(small) == 9
    assert {arm for arm, _ in small} == {"lookup", "lookup-best", "dense"}


def test_store_of_e2_is_under_sixty_megabytes():
    said = yaml.safe_load((page.HERE / "e2.yaml").read_text("utf-8"))["set"]
    data = yaml.safe_load((run.ROOT / "configs/small.yaml").read_text("utf-8"))["data"]
    assert data["vocab_size"] <= 2**16  # so that a token is a uint16
    # Two bytes a token of at least two and a half bytes of text, and a tokenizer.
    val = data["val_fraction"] * said["data.max_bytes"] / 2.5
    assert 2 * (said["data.max_tokens"] + val) + 2e6 < 60e6


def test_no_page_and_no_file_calls_the_text_what_it_is_not():
    for name in run.NAMES:
        said = yaml.safe_load((page.HERE / f"{name}.yaml").read_text("utf-8"))
        missing = "The Stack" if name.startswith("e4") else "FineWeb-Edu"
        assert f"not {missing}" in said["title"]
        assert f"not {missing}" in said["label"]
    for name in ("REPORT.md", "ARMS.md"):
        text = (page.HERE / name).read_text("utf-8")
        assert "No run is on FineWeb-Edu or on The Stack" in text


# The queue ---------------------------------------------------------------------------


def test_run_takes_its_data_from_the_store_and_later_flags_win(e1):
    spec = run.placed(e1.specs[0], Path("/x"), "--data.tokenizer char --train.steps 2")
    assert spec.store == "/x"
    assert not [flag for flag in spec.flags if "data" in flag]
    assert spec.flags[-2:] == ("--train.steps", "2")
    assert spec.flags[1:5] == ("--arm", "lookup", "--seed", "42")
    assert run.parted(["--a", "--data.x=1", "2", "--data.y", "3"]) == (
        ["--data.x=1", "--data.y", "3"],
        ["--a", "2"],
    )


def test_folder_of_data_is_an_argument(e1):
    (data,) = e1.data.values()
    found = run.with_flags(run.at(data, Path("/d")), "--data.max-tokens 7")
    assert (found.path, found.max_tokens, found.vocab_size) == ("/d", 7, 8192)
    code = DataConfig(path="data/code/small.txt", val_path="data/code/val")
    found = run.at(code, Path("/d"))
    assert (found.path, found.val_path) == ("/d/small.txt", "/d/val")


def test_list_says_what_is_left(e1, tmp_path, capsys):
    results.write(tmp_path / "e1.json", [made("lookup", 42, 1.0)])
    argv = ["e1", "--data", "none", "--results", str(tmp_path), "--list"]
    assert run.main(argv) == 0
    left = capsys.readouterr().out.splitlines()
    assert left == [spec.name for spec in e1.specs][1:]


TINY = (
    "--data.source text --data.tokenizer byte --data.near-duplicates None "
    "--data.max-tokens None --model.n-layers 1 --model.d-model 16 --model.n-heads 2 "
    "--model.context 16 --model.num-tiles 4 --model.tiles-per-cluster 2 --train.steps 2 "
    "--train.batch-size 2 --train.eval-every 2"
)


@pytest.mark.slow
def test_queue_trains_what_is_not_done_and_goes_on(tmp_path, user_env):
    text = tmp_path / "text.txt"
    text.write_text("What is written twice is read once.\n" * 60, encoding="utf-8")
    done = [made("lookup", seed, 1.0) for seed in (43, 44)]
    done += [made("dense", seed, 1.0) for seed in (42, 43, 44)]
    names = {spec.arm for spec in run.read("e1-one-epoch").specs}
    done += [made(arm, 42, 1.0) for arm in names - {"lookup", "dense", "sparse-random"}]
    results.write(tmp_path / "e1-one-epoch.json", done)
    argv = [sys.executable, "-m", "experiments.scale.run", "e1-one-epoch"]
    argv += ["--data", str(text), "--runs", str(tmp_path / "runs")]
    argv += ["--results", str(tmp_path), "--flags", TINY]
    where = {"cwd": run.ROOT, "env": user_env, "capture_output": True, "text": True}
    done = subprocess.run(argv, **where)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {one.name: one for one in results.read(tmp_path / "e1-one-epoch.json")}
    assert len(found) == 18
    for arm in ("lookup", "sparse-random"):
        one = found[f"tiny/{arm}/seed-42"]
        assert 0 < one.val_loss < 6
        assert one.steps == 2
        assert str(tmp_path) not in one.command
    assert found["tiny/lookup/seed-43"].val_loss == 1.0
    assert str(tmp_path) not in (tmp_path / "e1-one-epoch.json").read_text("utf-8")
    left = subprocess.run([*argv, "--list"], **where).stdout
    assert left == "nothing is left to do\n"


# What runs say -----------------------------------------------------------------------


def seeds(arm, *losses, gap=0.0):
    return [made(arm, 42 + n, loss, gap + n / 100) for n, loss in enumerate(losses)]


def test_verdict_follows_the_interval_and_one_seed_decides_nothing():
    lookup = seeds("lookup", 2.0, 2.1, 2.2)
    dense = seeds("dense", 1.9, 1.99, 2.11)
    pair = ("lookup", "dense")
    found = verdicts.difference([*lookup, *dense], *pair)
    assert (found.mean, found.n) == (pytest.approx(0.1), 3)
    # s = 0.01: t(2) = 4.3027, half = 4.3027 * 0.01 / sqrt(3)
    assert found.half == pytest.approx(0.02484, abs=1e-5)
    assert verdicts.of_pair([*lookup, *dense], pair, ("val_loss",)) == "not supported"
    assert verdicts.of_pair([*lookup, *dense], pair[::-1], ("val_loss",)) == "supported"
    lost = made("lookup", 45, math.nan)
    assert verdicts.of_pair([*lookup, *dense, lost], pair, ("val_loss",)) == "undecided"
    alone = [lookup[0], dense[0]]
    assert verdicts.of_pair(alone, pair, ("val_loss",)) == "undecided"
    assert verdicts.of_pair(lookup, pair, ("val_loss",)) == "undecided"
    assert verdicts.difference(lookup, *pair) is None


def test_regularization_needs_the_lower_gap_and_the_lower_loss():
    float_ = seeds("lookup-float", 2.0, 2.1, 2.2, gap=0.5)
    better = seeds("lookup", 1.9, 2.0, 2.1, gap=0.1)
    overfit = seeds("lookup", 1.9, 2.0, 2.1, gap=0.9)
    claim = verdicts.REASONS[-1]
    of = {"e1": [*float_, *better], "e2": []}
    assert verdicts.of_claim(of, claim) == "supported"
    assert verdicts.of_claim({"e1": [*float_, *overfit]}, claim) == "not supported"
    both = of | {"e2": [*float_, *overfit]}
    assert verdicts.of_claim(both, claim) == "undecided"
    assert verdicts.of_claim({}, claim) == "undecided"


# What they take ----------------------------------------------------------------------


@pytest.mark.slow
def test_time_is_modelled_from_what_e1_measured(configs, tmp_path):
    arms = {key: configs[key] for key in (("e1", "lookup"), ("e1", "dense"))}
    epoch = dataclasses.replace(configs["e1", "dense"].train, steps=1221, batch_size=16)
    model = dataclasses.replace(configs["e1", "dense"].model, dtype="float32")
    changed = {"train": epoch, "model": model}
    small = dataclasses.replace(configs["e1", "dense"], **changed)
    arms["e1-one-epoch", "dense"] = small
    asked = dict.fromkeys(arms, 3)
    least = budget.step_seconds(arms["e1", "lookup"], "h100")
    speed = 256 * 256 / (5 * least)  # a step five times as long as the least
    fast = made("lookup", 42, 1.0, tokens_per_second=speed)
    results.write(tmp_path / "e1.json", [fast])
    slow = [made("dense", 42 + n, 1.0, seconds=n, tokens=1000 * n) for n in (1, 2, 9)]
    slow[0] = slow[0]._replace(seconds=10.0)  # what others on the core cost it
    results.write(tmp_path / "e1-one-epoch.json", slow)
    known = {"rows": [{"experiment": "e1", "arm": "dense", "peak_bytes": 77}]}
    found = modelled.model(arms, asked, tmp_path, known, lambda *_: None)
    assert found["slack"] == pytest.approx(5)
    assert (found["slack_from"], found["wait_seconds"]) == ("e1", None)
    macs = 3 * budget.macs_per_token(model)
    assert found["core_macs_per_second_of"] == {"dense": 1000 * macs}
    lookup, other, one = found["rows"]
    assert one["core_hours"] == round(1221 * 16 * 256 / 1000 / 3600, 2)
    assert (one["core_hours_from"], other["core_hours_from"]) == ("measured", "dense")
    assert lookup["core_hours_from"] is None  # no lookup has run: the median of all
    assert (one["h100_minutes"], one["runs"]) == (None, 3)
    seconds = budget.step_seconds(arms["e1", "dense"], "h100")
    # After each of ten epochs, at two times 500 steps of 763, a ninth of an epoch at a third.
    steps = 763 + 12 * (5e6 / 9) / 3 / 65536
    minutes = round((30 + 5 * seconds * steps) / 60, 2)
    assert other["h100_minutes"] == [minutes, minutes]
    assert other["peak_bytes"] == 77
    nothing = modelled.model(arms, asked, tmp_path / "none", {}, lambda *_: 1)
    assert nothing["slack_from"] == modelled.SHARED
    assert {row["core_hours"] for row in nothing["rows"]} == {None}
    again = modelled.model(arms, asked, tmp_path / "none", found, lambda *_: None)
    assert again["core_macs_per_second"] == 1000 * macs
    assert [row["core_hours"] for row in again["rows"]] == [
        row["core_hours"] for row in found["rows"]
    ]


@pytest.mark.slow
def test_speed_of_a_core_is_that_of_a_run_under_way(configs, tmp_path):
    config = configs["e1", "lookup"]
    (tmp_path / "config.yaml").write_text(json.dumps(to_tree(config)))
    speeds = (10, 900, 1000, 1100)
    lines = [
        {"event": "step", "step": n, "tokens_per_second": s}
        for n, s in enumerate(speeds)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    found = modelled.core_macs_under_way(tmp_path)
    macs = budget.macs_per_token(config.model)
    assert found["core_macs_per_second"] == 3 * 950 * macs
    assert found["core_from"] == "4 of 763 steps of a run of e1-one-epoch"


@pytest.mark.slow
def test_macs_of_a_token_are_counted(configs):
    model = configs["e1", "dense"].model
    attention = 3 * (4 * 128**2 + 2 * 256 * 128)
    ffn, head = 3 * 2 * 128 * 73, 128 * 8192
    assert budget.macs_per_token(model) == attention + ffn + head


@pytest.mark.slow
def test_committed_model_covers_every_arm(every):
    rows = read_json(modelled.PATH)["rows"]
    assert {(row["experiment"], row["arm"]) for row in rows} == set(every)
    asked = modelled.runs_of()
    for row in rows:
        key = row["experiment"], row["arm"]
        assert row["params"] == costs(every[key].model).total
        assert row["runs"] == asked[key]


# The page ----------------------------------------------------------------------------


def test_committed_page_is_what_the_committed_files_give(tmp_path):
    (tmp_path / "results").mkdir()
    for path in run.RESULTS.glob("*.json"):
        shutil.copy(path, tmp_path / "results")
    found = page.write(tmp_path).read_text("utf-8")
    committed = (page.HERE / "REPORT.md").read_text("utf-8")
    assert found == committed, "run `python -m experiments.scale.page`"
    arms = (tmp_path / "ARMS.md").read_text("utf-8")
    assert arms == (page.HERE / "ARMS.md").read_text("utf-8")
    assert len(committed.split()) <= 1200
    assert len(re.findall(r"!\[", committed)) == 1
    assert (page.HERE / page.FIGURE).is_file()


def write_all(folder, own):
    """Results of every experiment, of the arms that it asks, and of one that is gone."""
    for name in run.NAMES:
        arms = {"gone", *(spec.arm for spec in run.read(name).specs)}
        results.write(folder / f"{name}.json", [one for one in own if one.arm in arms])


@pytest.mark.slow
def test_page_of_runs_says_what_they_decide(e1, tmp_path):
    (tmp_path / "results").mkdir()
    shutil.copy(modelled.PATH, tmp_path / "results")
    others = {spec.arm for spec in e1.specs} - {"lookup", "dense"}
    own = [one for arm in sorted(others) for one in seeds(arm, 2.0, 2.1, 2.2)]
    own += [*seeds("lookup", 2.3, 2.4, 2.5), *seeds("dense", 2.01, 2.1, 2.2)]
    write_all(tmp_path / "results", own)  # as much as there can be
    text = page.write(tmp_path).read_text("utf-8")
    said = "not supported on TinyShakespeare, tuned; not supported on E1 to E4.**"
    assert f"**A lower loss than a dense FFN of equal parameters: {said}" in text
    assert "E1 to E4: 132 runs are finished." in text
    assert "+0.2967 ± 0.0143" in text  # s = 0.0057735
    assert "| lookup less lookup-random | `e1` +0.3000 ± 0.0000; `e1-one-" in text
    assert text.count("**not supported**") == 3
    assert len(text.split()) <= 1200
    arms = (tmp_path / "ARMS.md").read_text("utf-8")
    assert "| `e1`: lookup less lookup-random | +0.3000 ± 0.0000 |" in arms
    # The dense FFN has as many parameters as lookup.
    assert "`e1`: lookup-best less" not in arms
    assert "| sparse-float | 3 | 2.1000 ± 0.2484 |" in arms
    own += [made("lookup", 46, math.nan), made("gone", 42, math.nan)]
    write_all(tmp_path / "results", own)
    text = page.write(tmp_path).read_text("utf-8")
    assert "tuned; undecided on E1 to E4.**" in text
    assert f"132 runs are finished, {2 * len(run.NAMES)} diverged." in text
    assert " 2.4000 ± 0.2484 (1 diverged) |" in text
    arms = (tmp_path / "ARMS.md").read_text("utf-8")
    assert "| lookup | 3 (1 diverged) | 2.4000 ± 0.2484 |" in arms
    assert "| gone | 0 (1 diverged) | - |" in arms
