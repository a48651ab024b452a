"""Losses and gradients that are not finite: skipped, counted, told, and never the best."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trix_jax.lm.checkpoint import checkpoint
from trix_jax.lm.data import open_store, read_window, train_batches
from trix_jax.lm.train import loop, metrics, milestone, parallel
from trix_jax.lm.train.optimizer import make_optimizer
from trix_jax.lm.train.step import init_state, make_train_step
from trix_jax.nn.transformer import TransformerLM

pytestmark = pytest.mark.slow

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
EVERY = 3  # about one batch in so many is bad


class Touchy(TransformerLM):
    """A model that gives NaN for the batches whose ids add up to a multiple of EVERY."""

    def __call__(self, tokens, *args, **kwargs):
        logits, *rest = super().__call__(tokens, *args, **kwargs)
        return jnp.where(tokens.sum() % EVERY == 0, jnp.nan, logits), *rest


def quiet(_):
    pass


def with_train(config, **values):
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, **values)
    )


def lines_of(run, event):
    return [x for x in metrics.read(run / "metrics.jsonl") if x["event"] == event]


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def touchy(tiny_config, one_device, tmp_path_factory):
    """A finished run of a touchy model, its config and what trains it again."""
    config = with_train(tiny_config, learning_rate=0.011, max_skipped=4)

    def again(directory, **changes):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "TransformerLM", Touchy)
            wanted = with_train(config, **changes)
            return loop.train(wanted, directory, devices=one_device, report=quiet)

    run = tmp_path_factory.mktemp("touchy") / "run"
    again(run)
    return run, config, again


def batches_of(run, config):
    store = open_store(run / "data")
    numbers = {
        "batch_size": config.train.batch_size,
        "context": config.model.context,
        "seed": config.seed,
    }
    batches = train_batches(store.train, **numbers)
    return store, [next(batches) for _ in range(config.train.steps)]


def test_bad_steps_are_skipped_and_their_windows_logged(touchy):
    run, config, _ = touchy
    store, batches = batches_of(run, config)
    is_bad = [batch[:, :-1].sum() % EVERY == 0 for batch in batches]
    assert 0 < sum(is_bad) < len(is_bad)
    skipped = lines_of(run, "skipped")
    assert [line["step"] for line in skipped] == [
        i + 1 for i, bad in enumerate(is_bad) if bad
    ]
    good = [line["step"] for line in lines_of(run, "step")]
    assert good == [i + 1 for i, bad in enumerate(is_bad) if not bad]
    for line in skipped:
        length = config.model.context + 1
        rows = [read_window(store.train, at, length) for at in line["windows"]]
        np.testing.assert_array_equal(np.stack(rows), batches[line["step"] - 1])
        assert line["loss"] is None
    summary = json.loads((run / "summary.json").read_text())
    assert summary["skipped_steps"] == len(skipped)
    assert np.isfinite(summary["final_val_loss"])


def test_learning_rate_that_is_logged_is_the_one_of_the_updates_done(touchy, run_dir):
    run, config, _ = touchy
    other = [line["lr"] for line in lines_of(run_dir, "step")]
    scale = config.train.learning_rate / 1e-2
    found = [line["lr"] for line in lines_of(run, "step")]
    np.testing.assert_allclose(
        found, scale * np.asarray(other[: len(found)]), rtol=1e-5
    )


def documented():
    """Keys of docs/metrics.md: by event, and under "summary" those of summary.json."""
    keys = {}
    of = None
    for line in DOCS.read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("`summary.json`"):
            of = "summary"
        elif line.startswith("| `") or line.startswith("| | `"):
            named = cells[:1] if of == "summary" else cells[1:2]
            of = of if of == "summary" else cells[0].strip("`") or of
            keys.setdefault(of, set()).update(re.findall(r"`(\w+)`", named[0]))
        elif line.startswith("## "):
            break
    return keys


def test_metrics_and_summary_have_the_documented_keys(touchy):
    run, _, _ = touchy
    wanted = documented()
    for event in ("step", "eval", "skipped"):
        for line in lines_of(run, event):
            sometimes = {"val_loss_unquantized"} if event == "eval" else set()
            assert line.keys() | sometimes == wanted[event] | {"event"}
    summary = json.loads((run / "summary.json").read_text())
    assert summary.keys() | {"init_from", "data_since"} == wanted["summary"]
    text = DOCS.read_text("utf-8")
    assert [name for name in summary["params"] if f"`{name}`" not in text] == []


def test_run_with_skipped_steps_resumes_bit_for_bit(touchy, tmp_path):
    run, _, again = touchy
    half = tmp_path / "half"
    shutil.copytree(run, half)
    shutil.rmtree(half / "checkpoints" / "00000010")
    again(half)
    trees = [checkpoint.restore_arrays(r / "checkpoints", 10) for r in (run, half)]
    assert_same(*trees)
    keep = ("step", "windows", "in_a_row")
    told = [[[x[k] for k in keep] for x in lines_of(r, "skipped")] for r in (run, half)]
    assert told[0] == told[1]


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
def test_skipped_step_leaves_all_but_its_number_bit_for_bit(tiny_config, devices):
    model = dataclasses.replace(tiny_config.model, vocab_size=40)
    config = dataclasses.replace(tiny_config.train, accumulate=2)
    lm, optimizer = Touchy(model), make_optimizer(config)
    devices = jax.devices()[:devices]

    def make(axis):
        return make_train_step(lm, optimizer, config, axis)

    step = parallel.compile_step(make, devices)
    good = np.ones((2, 4, 17), np.int32)
    good[:, :, 0] = 2
    rows = good.shape[1] // len(devices)
    sum_of_a_device = good[0, :rows, :-1].sum()
    assert sum_of_a_device % EVERY
    bad = good.copy()
    bad[1, -1, 1] += -sum_of_a_device % EVERY  # one micro-batch of one device
    state = parallel.place(init_state(lm, optimizer, 0), devices)
    state, values = step(state, good)
    assert values.finite
    before = parallel.fetch(state, devices)
    state, values = step(state, bad)
    after = parallel.fetch(state, devices)
    assert not values.finite
    assert after.step == before.step + 1
    assert_same(after._replace(step=0), before._replace(step=0))
    state, values = step(state, good)
    assert values.finite
    moved = parallel.fetch(state, devices)
    changed = jax.tree.map(lambda a, b: (a != b).any(), moved.params, after.params)
    assert all(jax.tree.leaves(changed))


@pytest.mark.slow
def test_more_bad_steps_in_a_row_than_allowed_stop_the_run(
    tiny_config, one_device, tmp_path
):
    config = with_train(
        tiny_config, learning_rate=1e30, clip=0.0, max_skipped=3, checkpoint_every=1
    )
    with pytest.raises(ArithmeticError, match="not finite at step 5, after 3 skipped"):
        loop.train(config, tmp_path / "run", devices=one_device, report=quiet)
    assert [x["in_a_row"] for x in lines_of(tmp_path / "run", "skipped")] == [
        1,
        2,
        3,
        4,
    ]
    kept = tmp_path / "run" / "checkpoints"
    assert checkpoint.steps(kept) == [3, 4]
    trees = [checkpoint.restore_arrays(kept, step) for step in (3, 4)]
    assert_same(*({**tree, "step": 0} for tree in trees))
    with pytest.raises(ArithmeticError, match="not finite at step 5, after 3 skipped"):
        loop.train(config, tmp_path / "run", devices=one_device, report=quiet)


def test_validation_loss_that_is_not_finite_stops_and_is_not_saved(
    tiny_config, one_device, tmp_path, monkeypatch
):
    sound = milestone.evaluate

    def evaluate(model, variables, store, batch_size, progress, **more):
        result = sound(model, variables, store, batch_size, progress, **more)
        return result if progress < 1 else result._replace(val_loss=float("nan"))

    monkeypatch.setattr(milestone, "evaluate", evaluate)
    with pytest.raises(ArithmeticError, match=r"validation loss \(nan\)"):
        loop.train(tiny_config, tmp_path / "run", devices=one_device, report=quiet)
    kept = tmp_path / "run" / "checkpoints"
    assert checkpoint.steps(kept) == [5]
    assert checkpoint.resolve(kept, "best") == 5
