"""`jax.pmap`, `jax.shard_map` and one device: the same numbers."""

import dataclasses
import json
import operator
import shutil

import jax
import numpy as np
import pytest

from trix_jax import routing
from trix_jax.lm.train import metrics, parallel
from trix_jax.lm.train.loop import train
from trix_jax.lm.train.optimizer import make_optimizer
from trix_jax.lm.train.step import init_state, make_train_step
from trix_jax.nn.transformer import TransformerLM

SLICED = parallel.Spread(is_sliced=True)


def after_steps(config, devices, mapping, steps=3):
    model = dataclasses.replace(config.model, vocab_size=40)
    settings = dataclasses.replace(config.train, accumulate=2)
    lm, optimizer = TransformerLM(model), make_optimizer(settings)

    def make(*axis_and_slices):
        return make_train_step(lm, optimizer, settings, *axis_and_slices)

    step = parallel.compile_step(make, devices, mapping)
    state = parallel.place(init_state(lm, optimizer, 0), devices, mapping)
    losses, chance = [], np.random.default_rng(0)
    for _ in range(steps):
        batch = chance.integers(0, 40, (2, 8, model.context + 1), np.int32)
        before, (state, values) = state, step(state, batch)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))
        losses.append(float(values.loss))
    return losses, parallel.fetch(state, devices, mapping)


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_pmap_and_shard_map_agree_bit_for_bit_and_with_one_device(tiny_config, dropout):
    model = dataclasses.replace(tiny_config.model, dropout=dropout)
    config = dataclasses.replace(tiny_config, model=model)
    eight = jax.devices()[:8]
    a, one = after_steps(config, eight, "pmap")
    b, other = after_steps(config, eight, "shard_map")
    assert a == b
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(x, y)
    if dropout:
        return  # one device draws other masks
    alone, state = after_steps(config, eight[:1], "jit")
    np.testing.assert_allclose(a, alone, rtol=2e-6)
    for x, y in zip(
        jax.tree.leaves(state.routing), jax.tree.leaves(one.routing), strict=True
    ):
        np.testing.assert_allclose(x, y, atol=1e-3)


@pytest.mark.slow
def test_sharded_state_gives_the_numbers_of_whole_copies_in_an_eighth_of_the_bytes(
    tiny_config,
):
    eight = jax.devices()[:8]
    copies, state = after_steps(tiny_config, eight, "shard_map")
    slices, sharded = after_steps(tiny_config, eight, SLICED)
    np.testing.assert_allclose(slices, copies, rtol=2e-6)
    paths = jax.tree_util.tree_leaves_with_path(state)
    for (path, x), y in zip(paths, jax.tree.leaves(sharded), strict=True):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(x, y, atol=1e-5, err_msg=name)
    placed = parallel.place(sharded, eight, SLICED)
    moved = (placed.params, placed.opt_state)
    held = sum(x.addressable_data(0).nbytes for x in jax.tree.leaves(moved))
    total = sum(x.nbytes for x in jax.tree.leaves(moved))
    assert held < 0.15 * total


@pytest.mark.slow
def test_sharded_run_goes_on_with_one_device_and_evaluates_in_this_process(
    tiny_config, one_device, run_dir, tmp_path
):
    eight = jax.devices()[:8]
    run, quiet = tmp_path / "run", lambda _: None
    train(tiny_config, run, devices=eight, shard_state=True, report=quiet)
    losses = [
        [x["loss"] for x in metrics.read(r / "metrics.jsonl") if x["event"] == "step"]
        for r in (run, run_dir)
    ]
    np.testing.assert_allclose(*losses, rtol=2e-5)
    shutil.rmtree(run / "checkpoints" / "00000010")
    done = train(tiny_config, run, devices=one_device, report=quiet)
    reference = json.loads((run_dir / "summary.json").read_text())
    assert done["final_val_loss"] == pytest.approx(
        reference["final_val_loss"], rel=2e-5
    )


@pytest.mark.parametrize(
    "mapping",
    [
        "jit",
        pytest.param("pmap", marks=pytest.mark.slow),
        pytest.param("shard_map", marks=pytest.mark.slow),
        SLICED,
    ],
)
def test_clusters_are_rebuilt_and_nothing_else_moves(tiny_config, mapping):
    devices = jax.devices()[: 1 if mapping == "jit" else 8]
    model = dataclasses.replace(
        tiny_config.model,
        vocab_size=40,
        ffn="hierarchical",
        num_tiles=8,
        tiles_per_cluster=2,
    )
    state = init_state(TransformerLM(model), make_optimizer(tiny_config.train), 0)
    router = state.routing["block_00"]["ffn"]["tiles"]["router"]
    pairs = np.random.default_rng(0).normal(size=(4, 16))  # tiles 0 and 4, 1 and 5, ..
    router["signature"] = np.concatenate([pairs, pairs]).astype(np.float32)
    placed = parallel.place(state, devices, mapping)
    new = parallel.rebuild_clusters(placed, devices, mapping)
    kept = [(s.params, s.opt_state, s.rng) for s in (placed, new)]
    assert all(map(operator.is_, *map(jax.tree.leaves, kept)))
    got = parallel.fetch(new, devices, mapping).routing
    want = routing.rebuild_clusters(jax.device_get(state.routing))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    members = got["block_00"]["ffn"]["tiles"]["router"]["members"]
    assert [0, 4] in np.sort(members).tolist()


def test_flat_tiles_have_no_clusters_to_rebuild(tiny_config):
    model = dataclasses.replace(tiny_config.model, vocab_size=40)
    state = init_state(TransformerLM(model), make_optimizer(tiny_config.train), 0)
    assert parallel.rebuild_clusters(state, jax.devices()[:1], "jit") is state
