"""Every preset, with every arm, runs shrunken; what its arms share and where they
differ.
"""

from pathlib import Path

import jax
import pytest
import yaml

from trix_jax.cli.common import parse_preset
from trix_jax.cli.train import Args
from trix_jax.lm.train import train

ROOT = Path(__file__).parents[2]
PRESETS = sorted((ROOT / "configs").glob("*.yaml"))
ARMS = {"hierarchical", "sparse", "lookup", "dense", "hash", "random", "learned"}
SMALL = (
    "--model.n-layers 1 --model.d-model 16 --model.n-heads 2 --model.context 16 "
    "--model.dtype float32 --data.source text --data.tokenizer char --train.steps 2 "
    "--train.eval-every 2 --train.batch-size 2 --train.accumulate 1"
).split()


def cases():
    for path in PRESETS:
        for arm in yaml.safe_load(path.read_text())["arms"]:
            marks = () if arm == "hierarchical" else pytest.mark.slow
            yield pytest.param(path, arm, id=f"{path.stem}-{arm}", marks=marks)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_preset_has_the_arms_that_every_preset_has(path):
    assert set(yaml.safe_load(path.read_text())["arms"]) >= ARMS


@pytest.mark.parametrize(("path", "arm"), list(cases()))
def test_preset_arm_trains_shrunken(path, arm, corpus, tmp_path):
    argv = [str(path), "--arm", arm, *SMALL, "--data.path", str(corpus)]
    args, reference = parse_preset(Args, argv, "train")
    summary = train(
        args.config,
        tmp_path / "run",
        reference=reference,
        devices=jax.devices()[:1],
        report=lambda _: None,
    )
    assert summary["arm"] == arm
    assert summary["steps"] == 2
    assert (summary["min_entropy_share"] is None) == (arm == "dense")
