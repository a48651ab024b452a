"""The training loop: repeats, resumes, devices, refusals."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from trix_jax.lm.checkpoint import checkpoint
from trix_jax.lm.serve.load import load_run
from trix_jax.lm.train import metrics
from trix_jax.lm.train.loop import train
from trix_jax.lm.train.optimizer import make_optimizer
from trix_jax.lm.train.run import read_config
from trix_jax.lm.train.step import init_state, make_train_step
from trix_jax.nn.transformer import TransformerLM


def quiet(_):
    pass


def changed(config, section, **values):
    part = dataclasses.replace(getattr(config, section), **values)
    return dataclasses.replace(config, **{section: part})


def arrays(run_dir, step):
    return checkpoint.restore_arrays(run_dir / "checkpoints", step)


def assert_same_arrays(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def losses(run_dir):
    lines = list(metrics.read(run_dir / "metrics.jsonl"))
    return [line["loss"] for line in lines if line["event"] == "step"]


def test_train_run_directory_holds_what_the_contract_says(run_dir, tiny_config):
    files = {path.name for path in run_dir.iterdir()}
    assert files >= {
        "config.yaml",
        "env.json",
        "metrics.jsonl",
        "summary.json",
        "checkpoints",
        "tokenizer.json",
    }
    lines = list(metrics.read(run_dir / "metrics.jsonl"))
    steps = [line for line in lines if line["event"] == "step"]
    evals = [line for line in lines if line["event"] == "eval"]
    assert [line["step"] for line in steps] == list(range(1, 11))
    assert [line["step"] for line in evals] == [5, 10]
    assert steps[0].keys() >= {
        "step",
        "tokens",
        "loss",
        "lr",
        "grad_norm",
        "tokens_per_second",
        "memory_bytes",
        "routing_entropy",
        "aux_balance",
        "aux_diversity",
    }
    assert evals[0].keys() >= {
        "val_loss",
        "val_ppl",
        "val_bits_per_byte",
        "tile_usage",
        "routing_stability",
        "dead_tiles",
    }
    assert len(steps[0]["routing_entropy"]) == tiny_config.model.n_layers
    assert evals[0]["routing_stability"] == []  # nothing to compare with yet
    assert 0 <= evals[1]["routing_stability"][0] <= 1
    np.testing.assert_allclose(np.sum(evals[1]["tile_usage"]), 1, rtol=1e-5)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["final_val_loss"] == evals[1]["val_loss"]
    assert summary["params"].keys() >= {"total", "ffn", "ffn_active", "ffn_bits"}
    assert evals[1]["val_loss"] < evals[0]["val_loss"] < np.log(40)


def test_train_same_config_twice_gives_bit_identical_losses_and_state(
    tiny_config, one_device, run_dir, tmp_path
):
    train(tiny_config, tmp_path / "again", devices=one_device, report=quiet)
    assert losses(tmp_path / "again") == losses(run_dir)
    assert_same_arrays(arrays(tmp_path / "again", 10), arrays(run_dir, 10))


def test_train_interrupted_after_five_steps_goes_on_bit_for_bit(
    tiny_config, one_device, run_dir, tmp_path
):
    """And with another batch of evaluations, of which no step depends."""
    half = tmp_path / "half"
    shutil.copytree(run_dir, half)
    shutil.rmtree(half / "checkpoints" / "00000010")
    messages = []
    small = dataclasses.replace(tiny_config.train, eval_batch_size=2, max_skipped=3)
    config = dataclasses.replace(tiny_config, train=small)
    train(config, half, devices=one_device, report=messages.append)
    assert "eval_batch_size: 2" in (half / "config.yaml").read_text()
    load_run(half)  # the checkpoints of before are of the same run
    load_run(half, 5)
    assert any("resuming" in message and "step 5" in message for message in messages)
    assert losses(half) == losses(run_dir)
    assert_same_arrays(arrays(half, 10), arrays(run_dir, 10))


@pytest.mark.slow
def test_train_again_leaves_what_a_finished_run_says_of_its_origin(
    tiny_config, one_device, run_dir, tmp_path
):
    done = tmp_path / "done"
    shutil.copytree(run_dir, done)
    for name, values in (
        ("env.json", {"cpu": "another machine"}),
        ("summary.json", {"git_commit": "another commit", "seconds": 1.5}),
    ):
        tree = json.loads((done / name).read_text()) | values
        (done / name).write_text(json.dumps(tree))
    names = ("env.json", "summary.json", "metrics.jsonl", "config.yaml")
    before = {name: (done / name).read_bytes() for name in names}
    often = dataclasses.replace(tiny_config.train, eval_every=3)
    asked = dataclasses.replace(tiny_config, train=often)
    summary = train(asked, done, devices=one_device, report=quiet)
    assert summary["git_commit"] == "another commit"
    assert {name: (done / name).read_bytes() for name in names} == before
    (done / "summary.json").unlink()  # a kill before it: this process ends the run
    again = train(tiny_config, done, devices=one_device, report=quiet)
    assert again["git_commit"] != "another commit"
    assert "another machine" not in (done / "env.json").read_text()


@pytest.mark.slow
def test_train_eight_devices_match_one_within_addition_order(
    tiny_config, run_dir, tmp_path
):
    eight = tmp_path / "eight"
    train(tiny_config, eight, devices=jax.devices()[:8], report=quiet)
    np.testing.assert_allclose(losses(eight), losses(run_dir), rtol=2e-5)
    one, many = arrays(run_dir, 5), arrays(eight, 5)
    np.testing.assert_array_equal(one["step"], many["step"])
    flat = jax.tree.leaves_with_path(one["params"])
    for (path, x), y in zip(flat, jax.tree.leaves(many["params"]), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-4, err_msg=jax.tree_util.keystr(path))
    for (path, x), y in zip(
        jax.tree.leaves_with_path(one["routing"]),
        jax.tree.leaves(many["routing"]),
        strict=True,
    ):
        np.testing.assert_allclose(x, y, atol=1e-3, err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
def test_train_accumulated_micro_batches_match_one_batch(
    tiny_config, one_device, tmp_path
):
    # Without the balance loss, whose load is a micro-batch's own.
    routing = dataclasses.replace(
        tiny_config.model.routing, balance_weight=0.0, diversity_weight=0.0
    )
    config = changed(tiny_config, "model", routing=routing)
    config = changed(config, "train", steps=4, eval_every=4)
    for name, parts in (("whole", 1), ("parts", 4)):
        cut = changed(config, "train", accumulate=parts)
        train(cut, tmp_path / name, devices=one_device, report=quiet)
    np.testing.assert_allclose(
        losses(tmp_path / "parts"), losses(tmp_path / "whole"), rtol=2e-5
    )


@pytest.mark.slow
def test_a_run_that_goes_on_keeps_its_name(tiny_config, one_device, tmp_path):
    short = changed(tiny_config, "train", steps=2, eval_every=2)
    named = dataclasses.replace(short, arm="mine")
    train(named, tmp_path, devices=one_device, report=quiet)
    assert short.arm == short.model.ffn  # what a run is called that nobody names
    train(short, tmp_path, devices=one_device, report=quiet)
    assert read_config(tmp_path).arm == "mine"
    other = dataclasses.replace(short, arm="other")
    with pytest.raises(ValueError, match="arm was 'mine' and is 'other'"):
        train(other, tmp_path, devices=one_device, report=quiet)


@pytest.mark.slow
def test_accumulated_gradients_are_held_once(tiny_config):
    size = {"vocab_size": 64, "d_model": 64, "expansion": 16, "ffn": "dense"}
    model = TransformerLM(dataclasses.replace(tiny_config.model, **size))

    def taken(parts):
        config = changed(tiny_config, "train", batch_size=32, accumulate=parts).train
        optimizer = make_optimizer(config)
        state = jax.eval_shape(lambda: init_state(model, optimizer, 0))
        batch = jax.ShapeDtypeStruct((parts, 32 // parts, 17), jax.numpy.int32)
        step = jax.jit(make_train_step(model, optimizer, config), donate_argnums=0)
        analysis = step.lower(state, batch).compile().memory_analysis()
        assert analysis is not None
        leaves = jax.tree.leaves(state.params)
        return analysis.temp_size_in_bytes, 4 * sum(leaf.size for leaf in leaves)

    (few, one_copy), (many, _) = taken(4), taken(32)
    assert many < few + one_copy


@pytest.mark.slow
def test_train_non_finite_loss_stops_and_keeps_the_last_checkpoint(
    tiny_config, one_device, tmp_path
):
    config = changed(tiny_config, "train", learning_rate=1e30, clip=0.0, max_skipped=2)
    with pytest.raises(ArithmeticError, match="not finite at step"):
        train(config, tmp_path / "run", devices=one_device, report=quiet)
    for step in checkpoint.steps(tmp_path / "run" / "checkpoints"):
        params = arrays(tmp_path / "run", step)["params"]
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_train_resume_never_refuses_a_directory_with_a_run(tiny_config, run_dir):
    with pytest.raises(ValueError, match="resume='never' needs a workdir without"):
        train(tiny_config, run_dir, resume="never", report=quiet)


def test_train_resume_must_refuses_an_empty_directory(tiny_config, tmp_path):
    with pytest.raises(ValueError, match="resume='must' needs a workdir with a check"):
        train(tiny_config, tmp_path / "none", resume="must", report=quiet)


def test_train_other_settings_in_a_run_directory_are_refused_by_name(
    tiny_config, run_dir, one_device
):
    other = dataclasses.replace(tiny_config, seed=7)
    with pytest.raises(ValueError, match="other settings: seed was 42 and is 7"):
        train(other, run_dir, devices=one_device, report=quiet)


def test_train_damaged_newest_step_is_set_aside_and_the_one_before_used(
    tiny_config, one_device, run_dir, tmp_path
):
    hurt = tmp_path / "hurt"
    shutil.copytree(run_dir, hurt)
    files = [p for p in (hurt / "checkpoints" / "00000010").rglob("*") if p.is_file()]
    victim = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    messages = []
    train(tiny_config, hurt, devices=one_device, report=messages.append)
    assert any(victim.name in m and "set aside" in m for m in messages)
    assert_same_arrays(arrays(hurt, 10), arrays(run_dir, 10))


def test_train_all_steps_damaged_never_starts_anew(
    tiny_config, one_device, run_dir, tmp_path
):
    hurt = tmp_path / "hurt"
    shutil.copytree(run_dir, hurt)
    for manifest in hurt.glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    with pytest.raises(ValueError, match="no good checkpoint"):
        train(tiny_config, hurt, devices=one_device, report=quiet)


def test_train_batch_that_does_not_split_over_devices_is_refused(tiny_config, tmp_path):
    config = changed(tiny_config, "train", batch_size=12)
    with pytest.raises(ValueError, match=r"train\.batch_size=12 must be a multiple"):
        train(config, tmp_path / "run", devices=jax.devices()[:8], report=quiet)
