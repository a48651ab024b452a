"""Every preset, with every arm, runs shrunken; what its arms share and where they
differ.
"""

import dataclasses
from pathlib import Path

import jax
import pytest
import yaml

from trix_jax.cli.experiment import parse_run
from trix_jax.cli.train import Args
from trix_jax.lm.accounting import costs
from trix_jax.lm.config import resolve
from trix_jax.lm.presets import parse_preset
from trix_jax.lm.train.loop import train

ROOT = Path(__file__).parents[2]
ENGLISH = ROOT / "configs" / "english.yaml"  # the recommended configuration's own
PRESETS = sorted(p for p in (ROOT / "configs").glob("*.yaml") if p != ENGLISH)
ARMS = {"hierarchical", "sparse", "lookup", "dense", "hash", "random", "learned"}
SCALE_ARMS = ARMS | {"dense-active", "dense-bits", "dense-4d"}
TILES = {
    "shakespeare_char": 16,
    "tiny": 16,
    "tiny-64ep": 16,
    "small": 32,
    "medium": 64,
    "code": 64,
    "trix-144m": 128,
    "trix-256m": 128,
}
# What committed commands get by the name of an arm: FFN, source of the routes, and the
# tiles a token of the original's presets.
AS_ASKED = {
    "hierarchical": ("hierarchical", "weights", 1),
    "sparse": ("sparse", "weights", 4),
    "lookup": ("lookup", "weights", 1),
    "dense": ("dense", "weights", 1),
    "dense-active": ("dense", "weights", 1),
    "dense-bits": ("dense", "weights", 1),
    "dense-4d": ("dense", "weights", 1),
    "hash": ("sparse", "hash", 4),
    "random": ("sparse", "random", 4),
    "learned": ("sparse", "learned", 4),
}
SEED_PARAMETERS = {"tiny": 2.5e6, "small": 10e6, "medium": 40e6, "code": 40e6}
# What is trained: of one preset every kind of FFN, of others some, None being the preset
# itself. The rest differ from these in what `SMALL` replaces.
TRAINED = {
    "shakespeare_char": {None, *ARMS - {"random", "sparse"}},
    "tiny": {None, "dense-active"},
    "code": {"lookup"},
    "trix-144m": {"lookup"},
}
SMALL = (
    "--model.n-layers 1 --model.d-model 16 --model.n-heads 2 --model.context 16 "
    "--model.num-tiles 4 --model.tiles-per-cluster 2 --model.dtype float32 "
    "--data.source text --data.tokenizer char --data.val-fraction 0.1 --train.steps 2 "
    "--train.eval-every 2 --train.batch-size 2 --train.accumulate 1"
).split()


def cases():
    for path in PRESETS:
        for arm in (None, *yaml.safe_load(path.read_text())["arms"]):
            if arm in TRAINED.get(path.stem, ()):
                name = f"{path.stem}-{arm or 'base'}"
                yield pytest.param(path, arm, id=name, marks=pytest.mark.slow)


def test_of_a_flag_given_twice_the_last_holds(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text("arms: {dense: {model.ffn: dense}, sparse: {model.ffn: sparse}}\n")
    argv = [str(path), "--arm", "dense", "--arm=sparse", "--seed", "1", "--seed", "2"]
    config = parse_run(argv)
    assert (config.arm, config.model.ffn, config.seed) == ("sparse", "sparse", 2)


def test_a_run_without_a_preset_is_called_what_it_trains():
    assert parse_run(["--model.ffn", "sparse"]).arm == "sparse"
    assert parse_run(["--model.ffn", "sparse", "--arm", "mine"]).arm == "mine"


def preset(path, arm, *flags):
    argv = [str(path), *(["--arm", arm] if arm else []), *flags]
    return parse_preset(Args, argv, "train").config


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_preset_has_the_arms_that_every_preset_has(path):
    assert set(yaml.safe_load(path.read_text())["arms"]) >= ARMS


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_preset_without_an_arm_is_four_of_sixteen_tiles_by_token(path):
    config = preset(path, None)
    model = config.model
    assert (model.ffn, model.num_tiles, model.tiles_per_token) == ("sparse", 16, 4)
    assert (model.router_input, model.routing.source) == ("embedding", "weights")
    assert config.arm == "base"


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            path,
            id=path.stem,
            marks=[] if None in TRAINED.get(path.stem, ()) else pytest.mark.slow,
        )
        for path in PRESETS
    ],
)
def test_named_arm_is_what_the_original_plan_asks(path):
    for arm in yaml.safe_load(path.read_text())["arms"]:
        model = preset(path, arm).model
        found = (model.ffn, model.routing.source, model.tiles_per_token)
        ffn, source, top = AS_ASKED[arm]
        assert found == (ffn, source, 1 if path.stem == "shakespeare_char" else top)
        assert (model.num_tiles, model.router_input) == (TILES[path.stem], "hidden")


@pytest.mark.parametrize("like", ["twin", "moe", "[dense]", "other"])
def test_arm_that_starts_from_no_plain_arm_is_refused(like, tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text(
        f"arms: {{twin: {{like: {like}}}, other: {{like: dense}}, dense: {{}}}}\n"
    )
    with pytest.raises(ValueError, match=r"arms.twin.like .* without a like"):
        preset(path, "twin")


def test_arm_inside_a_preset_is_refused_where_it_would_be_a_label(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text("arms: {dense: {model.ffn: dense}, wide: {arm: dense}}\n")
    for arm in ("wide", "dense", "base"):
        with pytest.raises(
            ValueError, match=r"arms.wide in .* with like. Got arm: dense"
        ):
            preset(path, arm)
    path.write_text("arm: dense\narms: {dense: {model.ffn: dense}}\n")
    with pytest.raises(ValueError, match="of which --arm chooses one"):
        preset(path, "dense")
    path.write_text("arm: mine\nmodel: {ffn: dense}\n")  # a run's own config
    assert preset(path, "base").model.ffn == "dense"


@pytest.mark.slow
def test_matched_width_is_that_of_the_arm_it_starts_from(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text(
        "model: {ffn: sparse, d_model: 16, n_heads: 2, num_tiles: 4, context: 8}\n"
        "arms:\n"
        "  lookup: {model.ffn: lookup, model.tiles_per_cluster: 2}\n"
        "  twin: {model.ffn: dense, model.ffn_width: match-params}\n"
        "  lookup-twin: {like: lookup, model.ffn: dense, model.ffn_width: match-params}\n"
    )
    twin, other = (resolve(preset(path, a), 32).model for a in ("twin", "lookup-twin"))
    assert twin.ffn_width == 64  # as wide as all tiles together
    lookup = dataclasses.replace(preset(path, "lookup").model, vocab_size=32)
    assert abs(costs(other).total / costs(lookup).total - 1) < 0.02


def test_flags_that_suit_the_arm_alone_are_taken():
    # What `sparse` starts from is hierarchical, with four tiles in a cluster.
    flags = ("--model.num-tiles", "32", "--model.tiles-per-token", "8")
    config = preset(ROOT / "configs" / "shakespeare_char.yaml", "sparse", *flags)
    assert (config.model.ffn, config.model.tiles_per_token) == ("sparse", 8)


@pytest.mark.parametrize(
    "name",
    [
        n if n == "tiny" else pytest.param(n, marks=pytest.mark.slow)
        for n in SEED_PARAMETERS
    ],
)
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
    assert summary["arm"] == (arm or "base")
    assert summary["steps"] == 2
    assert (summary["min_entropy_share"] is None) == str(arm).startswith("dense")
