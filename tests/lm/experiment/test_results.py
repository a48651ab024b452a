"""The record of a run: made, written, read, compared."""

import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from trix_jax.lm.accounting import active_width, costs
from trix_jax.lm.experiment.directory import is_diverged, is_done
from trix_jax.lm.experiment.results import (
    add,
    by_sampler,
    collect,
    from_tree,
    read,
    result_of,
    to_tree,
    twin,
    twin_widths,
)
from trix_jax.lm.experiment.tables import rate_of
from trix_jax.lm.experiment.tuning import at_rate, best_rate, sweep, tuned

ROOT = Path(__file__).parents[3]
NOT_RUNS = ("claim", "doing", "ngram-floors", "original-protocol", "modelled")
COMMITTED = [
    path
    for folder in ("scale", "quality")
    for path in sorted((ROOT / "experiments" / folder / "results").glob("*.json"))
    if path.stem not in NOT_RUNS
]
KEYS = (
    "setting arm tiles_per_token seed learning_rate steps tokens val_loss params_total "
    "ffn_active ffn_bits min_entropy_share dead_tiles seconds command git_commit"
).split()


def made_up(**values):
    return from_tree({"setting": "s", "seed": 42, "learning_rate": 1e-3, **values})


@pytest.mark.parametrize("path", COMMITTED, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_committed_results_read_and_have_the_keys_that_others_rely_on(path):
    trees, results = json.loads(path.read_bytes()), read(path)
    assert len({result.name for result in results}) == len(results) == len(trees) > 0
    for tree, result in zip(trees, results, strict=True):
        assert tree.keys() >= set(KEYS)
        assert "width" in tree or {"num_tiles", "tile_width"} <= tree.keys()
        assert to_tree(result).items() >= tree.items()


@pytest.mark.parametrize("arm", ["lookup", "sparse", "dense"])
def test_result_of_a_run_directory_maps_the_names_of_its_summary(
    arm, models, write_run, tmp_path
):
    spec, model = write_run(tmp_path, "s", arm, 7, 1.5, train_loss=1.25), models[arm]
    result, counted = result_of(spec, tmp_path), costs(model)
    assert (result.val_loss, result.best_val_loss, result.seed) == (1.5, 1.5, 7)
    assert result.train_val_gap == 0.25
    assert (result.params_total, result.ffn_bits) == (counted.total, counted.ffn_bits)
    assert result.active_width == active_width(model)
    assert result.is_dense == (arm == "dense")
    assert result.dead_tiles == (None if arm == "dense" else 3)
    assert [line["val_loss"] for line in result.evaluations] == [2.0, 1.5]
    assert (
        result.command == f"trix-jax train preset.yaml --arm {arm} --data.path data/s"
    )
    tree = to_tree(result)
    assert tree.keys() >= {*KEYS, "size"}
    assert ("width" in tree) == (arm == "dense")
    assert ("num_tiles" in tree, "tile_width" in tree) == (arm != "dense",) * 2
    assert from_tree(json.loads(json.dumps(tree))) == result


def test_run_that_diverged_is_a_result_without_a_loss(write_run, tmp_path):
    spec = write_run(tmp_path, "s", "sparse", 1, 1.5)
    directory = tmp_path / spec.name
    (directory / "summary.json").unlink()
    assert not is_done(spec, tmp_path)
    (directory / "log.txt").write_text("stopped by SIGTERM\n")
    assert not is_diverged(directory)
    said = "trix-jax train: loss (nan) or gradient norm (nan) is not finite at step 7, after 10 skipped in a row (train.max_skipped=10): stopped."
    (directory / "log.txt").write_text(f"step 1\n\n{said}\n\n")
    assert is_diverged(directory)
    result = result_of(spec, tmp_path)
    assert result.val_loss == math.inf
    assert not result.is_finite
    assert to_tree(result)["val_loss"] is None
    assert result.params_total > 0
    patched = result_of(spec._replace(patch=("module", "name")), tmp_path)
    assert patched.params_total is None


def test_collect_takes_what_came_to_its_end_in_the_order_asked(write_run, tmp_path):
    folder, path = tmp_path / "runs", tmp_path / "metrics.json"
    specs = [write_run(folder, "s", "sparse", n, 1.5 + n) for n in (3, 1, 2)]
    (folder / specs[1].name / "REPORT.md").unlink()
    assert [result.seed for result in collect(specs, folder, path)] == [3, 2]
    assert [result.seed for result in read(path)] == [3, 2]


def test_collect_keeps_the_records_of_runs_whose_directories_are_gone(
    write_run, tmp_path
):
    folder, path = tmp_path / "runs", tmp_path / "metrics.json"
    specs = [write_run(folder, "s", "sparse", n, 1.5 + n) for n in (1, 2, 3)]
    before = collect(specs, folder, path)
    shutil.rmtree(folder / specs[1].name)
    (folder / specs[2].name / "REPORT.md").unlink()  # trains anew
    assert collect(specs, folder, path) == before[:2] == read(path)


def test_collect_keeps_what_is_not_asked_for_and_both_samplers(write_run, tmp_path):
    folder, path = tmp_path / "runs", tmp_path / "metrics.json"
    specs = [write_run(folder, "s", "sparse", n, 1.5 + n) for n in (1, 2)]
    first, second = collect(specs, folder, path)
    add(path, old := first._replace(sampler="epochs", val_loss=9.0), folder)
    (folder / specs[0].name / "REPORT.md").unlink()  # its own is made again
    assert collect(specs, folder, path) == [old, second]
    add(path, first, folder)
    shutil.rmtree(folder)
    assert collect(specs[1:], folder, path) == [second]
    assert sorted(read(path)) == sorted([first, second, old])
    assert sorted(collect(specs, folder, path)) == sorted([first, second, old])


def test_results_file_replaces_a_run_and_stays_in_order(tmp_path):
    path = tmp_path / "results" / "s.json"
    assert read(path) == []
    lines = [
        made_up(arm=arm, val_loss=loss)
        for arm, loss in (("b", 1.0), ("a", 2.0), ("b", 3.0))
    ]
    for one in lines:
        add(path, one, tmp_path / "runs")
    assert read(path) == [lines[1], lines[2]]
    assert [p.name for p in path.parent.iterdir()] == ["s.json"]


def test_workers_side_by_side_lose_no_result(tmp_path):
    path = tmp_path / "s.json"

    def add_ten(arm):
        for seed in range(10):
            add(path, made_up(arm=arm, seed=seed, val_loss=1.0), tmp_path)

    with ThreadPoolExecutor(2) as workers:
        list(workers.map(add_ten, "ab"))
    assert len(read(path)) == 20


def test_twin_is_the_dense_run_of_the_same_cost_or_none(models, write_run, tmp_path):
    lookup, *dense = (
        result_of(write_run(tmp_path, "s", arm, 1, 2.0), tmp_path)
        for arm in ("lookup", "dense", "dense-4d")
    )
    other_size = dense[0]._replace(size="m", params_total=lookup.params_total)
    assert twin(lookup, [*dense, other_size], "params_total", 0.02) == dense[0]
    assert twin(lookup, dense, "ffn_active", 0.02) is None
    # Embeddings make models alike, whatever their FFNs are.
    vast = [
        one._replace(params_total=one.params_total + 10**8) for one in (lookup, *dense)
    ]
    assert twin(vast[0], vast[2:], "params_total", 0.02) is None
    assert twin(vast[0], vast[1:], "params_total", 0.02) == vast[1]
    assert twin_widths(lookup, dense[0])["parameters"] == pytest.approx(102, abs=0.5)
    own = twin_widths(dense[1], dense[0])
    assert own == pytest.approx(dict.fromkeys(own, models["dense-4d"].dense_width))


def test_results_of_two_samplers_are_kept_apart(tmp_path):
    old = made_up(arm="a", val_loss=1.0, width=8, params_total=5)
    new = made_up(arm="a", val_loss=2.0, sampler="epochs", width=8, params_total=5)
    assert (old.sampler, new.sampler) == ("offsets", "epochs")
    for one in (old, new, new):
        add(tmp_path / "s.json", one, tmp_path)
    assert read(tmp_path / "s.json") == [old, new]
    assert by_sampler([new, old, new]) == {"epochs": [new, new], "offsets": [old]}
    tile = made_up(arm="t", val_loss=1.5, sampler="epochs", params_total=5)
    assert twin(tile, [old, new], "params_total", 0.0) == new
    assert twin(tile, [old], "params_total", 0.0) is None
    assert tuned([new], "a").losses == {42: 2.0}
    with pytest.raises(ValueError, match="must be of one sampler to be compared"):
        tuned([old, new], "a")


def test_tuned_is_an_arm_at_its_best_finite_rate_and_says_whether_it_is_bracketed():
    losses = {5e-4: 3.0, 1e-3: 1.5, 2e-3: None}
    results = [made_up(arm="a", learning_rate=r, val_loss=v) for r, v in losses.items()]
    results += [made_up(arm="a", seed=43, val_loss=1.6), made_up(arm="b", val_loss=9.0)]
    found = tuned(results, "a")
    assert (found.rate, found.losses) == (1e-3, {42: 1.5, 43: 1.6})
    assert found.is_bracketed
    assert (found.diverged, rate_of(found)) == ((), "0.001")
    lost = tuned([*results, made_up(arm="a", seed=44, val_loss=None)], "a")
    assert (lost.losses, lost.diverged) == (found.losses, (44,))
    assert rate_of(lost) == "0.001 (1 diverged)"
    assert not tuned(results, "b").is_bracketed
    inherited = tuned(results, "b", like="a")
    assert inherited.rate == 1e-3
    assert not inherited.is_bracketed  # its own neighbours have not run
    assert tuned(results, "c") is None
    assert best_rate(sweep(results, "a", 42)) == 1e-3
    assert best_rate({}) is None
    assert best_rate({1e-3: math.inf, 2e-3: math.inf}) == 1e-3
    assert at_rate(results, "a", 2e-3)[42].val_loss == math.inf
