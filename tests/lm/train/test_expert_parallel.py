"""Tiles spread over devices in training: one device's numbers, and its checkpoints."""

import dataclasses
import json
import shutil
from functools import partial

import jax
import numpy as np
import pytest

from trix_jax.lm.checkpoint import checkpoint
from trix_jax.lm.train import metrics, parallel
from trix_jax.lm.train.loop import train
from trix_jax.lm.train.optimizer import make_optimizer
from trix_jax.lm.train.step import init_state, make_train_step
from trix_jax.nn.transformer import TransformerLM

pytestmark = pytest.mark.slow


def after_steps(config, devices, mapping, steps=3):
    """Loss and gradient norm of each step, the state on the host, and as it lies."""
    lm, optimizer = TransformerLM(config.model), make_optimizer(config.train)
    make = partial(make_train_step, lm, optimizer, config.train)
    step = parallel.compile_step(make, devices, mapping)
    state = parallel.place(init_state(lm, optimizer, 0), devices, mapping)
    values, chance = [], np.random.default_rng(0)
    for _ in range(steps):
        batch = chance.integers(0, 40, (2, 8, config.model.context + 1), np.int32)
        state, found = step(state, batch)
        values.append((float(found.loss), float(found.grad_norm)))
    return values, parallel.fetch(state, devices, mapping), state


@pytest.mark.parametrize(
    ("ffn", "mapping"),
    [
        ("sparse", parallel.Spread(8)),
        ("hierarchical", parallel.Spread(4, is_sliced=True)),
    ],
)
def test_steps_with_spread_tiles_give_one_devices_numbers(tiny_config, ffn, mapping):
    model = dataclasses.replace(
        tiny_config.model, ffn=ffn, num_tiles=8, tiles_per_cluster=4, vocab_size=40
    )
    config = dataclasses.replace(tiny_config, model=model)
    eight = jax.devices()[:8]
    one, alone, _ = after_steps(config, eight[:1], "jit")
    many, spread, placed = after_steps(config, eight, mapping)
    np.testing.assert_allclose(many, one, rtol=5e-6)
    paths = jax.tree_util.tree_leaves_with_path(alone)
    for (path, x), y in zip(paths, jax.tree.leaves(spread), strict=True):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(y, x, atol=2e-5, err_msg=name)
    kernel = placed.params["block_00"]["ffn"]["tiles"]["up"]["kernel"]
    share = kernel.addressable_data(0).size / kernel.size
    assert share == 1 / 8  # by 8 tiles, or by 4 and in two slices


def test_run_with_spread_tiles_goes_on_with_one_device(
    tiny_config, one_device, run_dir, tmp_path
):
    run, quiet = tmp_path / "run", lambda _: None
    train(tiny_config, run, devices=jax.devices()[:8], shard_tiles=4, report=quiet)
    lines = [
        [x for x in metrics.read(r / "metrics.jsonl") if x["event"] == "step"]
        for r in (run, run_dir)
    ]
    for key in ("loss", "grad_norm", "routing_entropy"):
        many, one = ([line[key] for line in of] for of in lines)
        np.testing.assert_allclose(many, one, rtol=2e-5)
    many, one = (
        checkpoint.restore_arrays(r / "checkpoints", 10) for r in (run, run_dir)
    )
    assert jax.tree.map(np.shape, many) == jax.tree.map(np.shape, one)
    shutil.rmtree(run / "checkpoints" / "00000010")
    done = train(tiny_config, run, devices=one_device, report=quiet)
    reference = json.loads((run_dir / "summary.json").read_text())
    assert done["final_val_loss"] == pytest.approx(
        reference["final_val_loss"], rel=2e-5
    )
