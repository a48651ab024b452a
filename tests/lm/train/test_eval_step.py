"""Evaluation where the variables are: the numbers of one device, nothing sent but the
batches; and steps saved part by part.
"""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp

from trix_jax.lm.checkpoint import checkpoint
from trix_jax.lm.data import open_store
from trix_jax.lm.train import eval_step, parallel
from trix_jax.lm.train.evaluate import evaluate
from trix_jax.lm.train.optimizer import make_optimizer
from trix_jax.lm.train.step import init_state
from trix_jax.nn.transformer import TransformerLM

EIGHT = jax.devices()[:8]
SLICED = parallel.Spread(is_sliced=True)
SPREAD = parallel.Spread(4, is_sliced=True)
BATCH = 12  # eight devices do not divide it


@pytest.fixture(scope="module")
def store(run_dir):
    return open_store(run_dir / "data")


@pytest.fixture(scope="module")
def model(tiny_config, store):
    shape = {"vocab_size": store.tokenizer.vocab_size, "num_tiles": 8}
    return TransformerLM(dataclasses.replace(tiny_config.model, **shape))


@pytest.fixture(scope="module")
def state(model, tiny_config):
    return init_state(model, make_optimizer(tiny_config.train), 0)


@pytest.fixture(scope="module")
def alone(model, state, store):
    variables = parallel.variables_of(state, EIGHT[:1])
    return evaluate(model, variables, store, BATCH)


@pytest.mark.slow
@pytest.mark.parametrize("mapping", ["pmap", "shard_map", SLICED, SPREAD])
def test_all_devices_of_a_state_evaluate_what_one_does(
    model, state, store, alone, mapping
):
    placed = parallel.place(state, EIGHT, mapping)
    variables = parallel.variables_of(placed, EIGHT, mapping)
    result = evaluate(model, variables, store, BATCH)
    # Sums of eight parts against sums of one, in float32.
    assert result.val_loss == pytest.approx(alone.val_loss, rel=2e-6)
    assert result.tokens == alone.tokens == store.val_tokens - 1
    assert result.tile_usage == alone.tile_usage
    np.testing.assert_array_equal(result.routes, alone.routes)
    assert result.routes.devices() == set(EIGHT)


@pytest.mark.slow
def test_variables_on_a_mesh_of_explicit_axes_evaluate(model, state, store, alone):
    variables = parallel.variables_of(state, EIGHT[:1])
    mesh = jax.make_mesh((2,), ("x",), devices=EIGHT[:2])
    placed = jax.device_put(variables, NamedSharding(mesh, P()))
    result = evaluate(model, placed, store, BATCH)
    assert result.val_loss == pytest.approx(alone.val_loss, rel=2e-6)
    assert result.routes.devices() == set(EIGHT[:2])


@pytest.mark.slow
@pytest.mark.parametrize("mapping", ["jit", SPREAD])
def test_a_batch_moves_nothing_but_itself(
    model, state, store, alone, mapping, monkeypatch
):
    devices = EIGHT[: 1 if mapping == "jit" else 8]
    make, steps = eval_step.compiled, []

    def guarded(*how):
        step = make(*how)

        def call(*args):
            steps.append(step)
            with jax.transfer_guard("disallow"):
                return step(*args)

        return call

    monkeypatch.setattr(eval_step, "compiled", guarded)
    placed = parallel.place(state, devices, mapping)
    variables = parallel.variables_of(placed, devices, mapping)
    result = evaluate(model, variables, store, BATCH)
    assert result.val_loss == pytest.approx(alone.val_loss, rel=2e-6)
    host = jax.device_get(variables)  # and that the guard would have seen it
    place = eval_step.settle(variables)[1]
    batch = np.zeros((BATCH, model.config.context + 1), np.int32)
    rows = eval_step.put(place, batch, np.ones_like(batch[:, 1:], np.float32))
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        guarded(model.config, place)(host, *rows, 1.0)
    assert len(steps) > 2


def test_variables_on_two_meshes_are_refused(model, state, store):
    two = [
        parallel.place(state, devices, "shard_map").params
        for devices in (EIGHT[:2], EIGHT[2:4])
    ]
    mixed = {"params": {**two[0], "embed": two[1]["embed"]}}
    with pytest.raises(ValueError, match="must lie on one mesh"):
        evaluate(model, mixed, store, BATCH)


def test_a_state_in_slices_is_saved_in_slices_and_comes_back_anywhere(state, tmp_path):
    placed = parallel.place(state, EIGHT, SLICED)
    saved = parallel.to_save(placed, EIGHT, SLICED)
    assert saved is placed  # nothing is brought together
    path = checkpoint.save(tmp_path, 1, saved._asdict(), {})
    leaves = jax.tree_util.tree_leaves_with_path(placed.params)
    written = ocp.metadata(path).metadata["params"]
    for key, leaf in leaves:
        found = written
        for name in key:
            found = found[name.key]
        part = leaf.addressable_data(0).shape
        assert found.storage_metadata.chunk_shape == part, key
    whole = checkpoint.restore_arrays(tmp_path, 1)
    jax.tree.map(np.testing.assert_array_equal, whole["params"], state.params)
    spread = parallel.place(state, EIGHT, parallel.Spread(4))  # another mesh
    for template in (state, spread):
        back, _ = checkpoint.restore(tmp_path, 1, template._asdict())
        jax.tree.map(np.testing.assert_array_equal, back, state._asdict())
        places = [jax.tree.map(lambda x: x.sharding, t) for t in (back, template)]
        assert places[0] == places[1]._asdict()
