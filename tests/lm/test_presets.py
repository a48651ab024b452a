"""Every preset, with every arm, runs shrunken; what its arms share and where they
differ.
"""

import dataclasses
from pathlib import Path

import jax
import pytest
import yaml

from trix_jax.cli.train import Args
from trix_jax.lm.accounting import costs
from trix_jax.lm.config import resolve
from trix_jax.lm.presets import parse_preset
from trix_jax.lm.train.loop import train

ROOT = Path(__file__).parents[2]
PRESETS = sorted((ROOT / "configs").glob("*.yaml"))
ARMS = {"hierarchical", "sparse", "lookup", "dense", "hash", "random", "learned"}
SCALE_ARMS = ARMS | {"dense-active", "dense-bits", "dense-4d"}
SEED_PARAMETERS = {"tiny": 2.5e6, "small": 10e6, "medium": 40e6, "code": 40e6}
# Arms that are trained: all of one preset, of the others their own, and a matched width.
TRAINED = {"shakespeare_char": ARMS, "tiny": {"lookup", "hierarchical", "dense-active"}}
SMALL = (
    "--model.n-layers 1 --model.d-model 16 --model.n-heads 2 --model.context 16 "
    "--model.num-tiles 4 --model.tiles-per-cluster 2 --model.dtype float32 "
    "--data.source text --data.tokenizer char --data.val-fraction 0.1 --train.steps 2 "
    "--train.eval-every 2 --train.batch-size 2 --train.accumulate 1"
).split()


def cases():
    for path in PRESETS:
        for arm in yaml.safe_load(path.read_text())["arms"]:
            if arm in TRAINED.get(path.stem, {"lookup"}):
                name = f"{path.stem}-{arm}"
                yield pytest.param(path, arm, id=name, marks=pytest.mark.slow)


def preset(path, arm, *flags):
    argv = [str(path), "--arm", arm, *flags]
    return parse_preset(Args, argv, "train").config


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_preset_has_the_arms_that_every_preset_has(path):
    assert set(yaml.safe_load(path.read_text())["arms"]) >= ARMS


def test_flags_that_suit_the_arm_alone_are_taken():
    # The preset without its arm is hierarchical, with four tiles in a cluster.
    flags = ("--model.num-tiles", "32", "--model.tiles-per-token", "8")
    config = preset(ROOT / "configs" / "shakespeare_char.yaml", "sparse", *flags)
    assert (config.model.ffn, config.model.tiles_per_token) == ("sparse", 8)


@pytest.mark.parametrize("name", SEED_PARAMETERS)
def test_scale_preset_has_the_parameters_of_the_seed_within_a_tenth(name):
    path = ROOT / "configs" / f"{name}.yaml"
    assert set(yaml.safe_load(path.read_text())["arms"]) == SCALE_ARMS
    config = preset(path, "lookup")
    vocab = config.data.vocab_size
    total = costs(dataclasses.replace(config.model, vocab_size=vocab)).total
    assert abs(total / SEED_PARAMETERS[name] - 1) < 0.1
    assert config.seed == 42
    assert config.model.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("arm", "cost", "tolerance"),
    [
        ("dense", "total", 0.001),
        ("dense-active", "ffn_active", 0.03),
        ("dense-bits", "ffn_bits", 0.03),
    ],
)
def test_dense_arm_of_tiny_costs_what_lookup_costs(arm, cost, tolerance):
    path = ROOT / "configs" / "tiny.yaml"
    lookup = dataclasses.replace(preset(path, "lookup").model, vocab_size=8192)
    dense = resolve(preset(path, arm), vocab_size=8192).model
    assert dense.ffn == "dense"
    ratio = getattr(costs(dense), cost) / getattr(costs(lookup), cost)
    assert abs(ratio - 1) < tolerance


@pytest.mark.parametrize(("path", "arm"), list(cases()))
def test_preset_arm_trains_shrunken(path, arm, corpus, tmp_path):
    config = preset(path, arm, *SMALL, "--data.path", str(corpus))
    summary = train(
        config,
        tmp_path / "run",
        devices=jax.devices()[:1],
        report=lambda _: None,
    )
    assert summary["arm"] == arm
    assert summary["steps"] == 2
    assert (summary["min_entropy_share"] is None) == arm.startswith("dense")
