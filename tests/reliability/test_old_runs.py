"""Runs that an older version began: they go on with what they had."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
import yaml

from trix_jax.lm.checkpoint import checkpoint
from trix_jax.lm.serve.load import load_run
from trix_jax.lm.train import metrics, provenance
from trix_jax.lm.train.loop import train

NAME = "train.sampler"


def quiet(_):
    pass


def sampled(config, sampler):
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, sampler=sampler)
    )


def sampler_of(run):
    return yaml.safe_load((run / "config.yaml").read_text())["train"]["sampler"]


def losses(run):
    lines = metrics.read(run / "metrics.jsonl")
    return [line["loss"] for line in lines if line["event"] == "step"]


def forget_sampler(run):
    """Makes a run's config what the version before the setting wrote."""
    tree = yaml.safe_load((run / "config.yaml").read_text())
    del tree["train"]["sampler"]
    (run / "config.yaml").write_text(yaml.safe_dump(tree))


@pytest.fixture(scope="module")
def old_run(tiny_config, one_device, tmp_path_factory):
    """A finished run as the version before the setting left it, notes included."""
    run, notes = tmp_path_factory.mktemp("old") / "run", provenance.notes

    def old_notes(*args):
        found = notes(*args)
        del found["settings"][NAME]
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(provenance, "notes", old_notes)
        config = sampled(tiny_config, "offsets")
        train(config, run, devices=one_device, report=quiet)
    forget_sampler(run)
    return run


@pytest.mark.slow
def test_old_run_goes_on_with_its_sampler_bit_for_bit(
    old_run, tiny_config, one_device, run_dir, tmp_path
):
    half = tmp_path / "half"
    shutil.copytree(old_run, half)
    shutil.rmtree(half / "checkpoints" / "00000010")
    train(tiny_config, half, devices=one_device, report=quiet)
    assert losses(half) == losses(old_run)
    trees = [checkpoint.restore_arrays(r / "checkpoints", 10) for r in (half, old_run)]
    for x, y in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_array_equal(x, y)
    assert sampler_of(half) == "offsets"
    assert sampler_of(run_dir) == "epochs"
    assert losses(half) != losses(run_dir)


@pytest.mark.slow
def test_old_run_loads_and_refuses_another_sampler_naming_both(
    old_run, tiny_config, one_device, tmp_path
):
    load_run(old_run)
    half = tmp_path / "half"
    shutil.copytree(old_run, half)
    said = "train.sampler was 'offsets' and is 'epochs'"
    with pytest.raises(ValueError, match=said):
        train(sampled(tiny_config, "epochs"), half, devices=one_device, report=quiet)
    (half / "config.yaml").unlink()  # the checkpoint's notes say it too
    with pytest.raises(ValueError, match=said):
        train(tiny_config, half, devices=one_device, report=quiet)
