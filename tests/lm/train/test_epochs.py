"""Evaluations at the ends of epochs, and every number of the original's plan in the files
of a run.
"""

import dataclasses
import math

import numpy as np
import pytest

from trix_jax.files import read_json
from trix_jax.lm.checkpoint import checkpoint
from trix_jax.lm.data import open_store
from trix_jax.lm.train import loop, metrics, milestone
from trix_jax.lm.train.loop import train
from trix_jax.lm.train.run import Run

STEPS, EVERY, BATCH, CONTEXT = 12, 5, 16, 16


@pytest.fixture(scope="module")
def run(tiny_config, one_device, tmp_path_factory):
    folder = tmp_path_factory.mktemp("epochs")
    text = "the tile that matches a token best computes it\n"
    (folder / "text.txt").write_text("".join(f"{i * i % 97} {text}" for i in range(24)))
    data = dataclasses.replace(tiny_config.data, path=str(folder / "text.txt"))
    more = {"steps": STEPS, "eval_every": EVERY, "batch_size": BATCH}
    how = dataclasses.replace(tiny_config.train, eval_epochs=True, **more)
    config = dataclasses.replace(tiny_config, data=data, train=how)
    train(config, folder / "run", devices=one_device, report=lambda _: None)
    return folder / "run"


def of_kind(run, event):
    return [
        line for line in metrics.read(run / "metrics.jsonl") if line["event"] == event
    ]


@pytest.mark.slow
def test_every_epoch_ends_in_an_evaluation_and_a_checkpoint(run):
    windows = len(open_store(run / "data").train) // CONTEXT
    ends = {
        math.ceil(e * windows / BATCH) for e in range(1, 1 + STEPS * BATCH // windows)
    }
    assert len(ends - {5, 10, 12}) >= 1  # where nothing else evaluates
    assert [line["step"] for line in of_kind(run, "eval")] == sorted(ends | {5, 10, 12})
    for line in of_kind(run, "eval"):
        assert line["epochs"] == pytest.approx(line["step"] * BATCH / windows)
        is_first = line["step"] == min(ends | {5})
        assert bool(line["routing_stability"]) is not is_first
    last = checkpoint.steps(run / "checkpoints")[-1]
    assert last == STEPS


@pytest.mark.slow
def test_every_number_of_the_originals_plan_is_in_the_files(run):
    steps, evals = of_kind(run, "step"), of_kind(run, "eval")
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    plan = (
        "loss lr grad_norm tokens_per_second memory_bytes routing_entropy aux_balance "
        "aux_diversity"
    )
    for line in steps:
        assert all(math.isfinite(line[key]) for key in plan.split() if key[:3] != "rou")
        assert 0 < line["routing_entropy"][0] <= math.log(4) + 1e-6
    for line in evals:
        assert line["val_ppl"] == pytest.approx(math.exp(line["val_loss"]))
        assert sum(line["tile_usage"][0]) == pytest.approx(1)
        assert all(0 <= share <= 1 for share in line["routing_stability"])
    summary = read_json(run / "summary.json")
    assert summary["best_val_ppl"] == min(line["val_ppl"] for line in evals)
    assert summary["tokens"] == STEPS * BATCH * CONTEXT
    assert summary["seconds"] > 0
    assert 0 < summary["routing"][0]["entropy"] <= math.log(4) + 1e-6


def test_other_data_is_read_from_its_first_window_on_and_its_epochs_are_its_own(
    tiny_config, run_dir
):
    since, store = 7, open_store(run_dir / "data")
    run = Run(tiny_config, run_dir, store, None, None, [], "pmap", data_since=since)
    found = next(loop._batches(run, since))
    expected = next(loop._batches(run._replace(data_since=0), 0))
    np.testing.assert_array_equal(found, expected)
    windows = len(store.train) // tiny_config.model.context
    epoch = math.ceil(windows / tiny_config.train.batch_size)
    assert milestone.epochs(run, since + epoch - 1) == 0
    assert milestone.epochs(run, since + epoch) == 1
