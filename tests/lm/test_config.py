"""Configs: YAML to flags and back, refusals, what is counted."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trix_jax.lm import config as cfg
from trix_jax.lm import presets
from trix_jax.lm.accounting import active_width, costs, match_bits, match_params
from trix_jax.lm.train import provenance
from trix_jax.lm.train.optimizer import decay_mask, learning_rate_schedule
from trix_jax.nn.transformer import TransformerConfig, TransformerLM
from trix_jax.routing import RoutingConfig
from trix_jax.ternary import TernaryConfig


def test_to_flags_nested_and_dotted_names_become_flags():
    tree = {"seed": 1, "model": {"d_model": 64, "tied": False}, "train.clip": 0.5}
    assert presets.to_flags(tree) == [
        *("--seed", "1", "--model.d-model", "64", "--model.no-tied"),
        *("--train.clip", "0.5"),
    ]


def test_to_flags_list_value_raises():
    with pytest.raises(ValueError, match=r"model.d_model must be a single value"):
        presets.to_flags({"model": {"d_model": [1, 2]}})


@pytest.mark.parametrize(
    "text", ["- 1\n", "a: [1\n", "1: 2\n", "\x00", "!!map [a]", "model: !!map [x]\n"]
)
def test_read_yaml_not_a_mapping_raises_naming_the_file(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"bad\.yaml"):
        cfg.read_yaml(path)


@pytest.mark.parametrize(
    "text", ["train: {steps: 1}\ntrain: {clip: 1}\n", "train:\n  clip: 1\n  clip: 2\n"]
)
def test_read_yaml_a_key_given_twice_raises_naming_it_and_the_line(tmp_path, text):
    path = tmp_path / "twice.yaml"
    path.write_text(text)
    key = "train" if text.count("train") == 2 else "clip"
    with pytest.raises(ValueError, match=f"(?s)it has {key} twice.*line [23]"):
        cfg.read_yaml(path)


@pytest.mark.parametrize("number", ["010", "-0_7", "1:30", "1:30.5", "!!int ''"])
def test_read_yaml_a_number_of_another_base_raises_as_it_stands(tmp_path, number):
    path = tmp_path / "seed.yaml"
    path.write_text(f"seed: {number}\nsteps: 1_000\nother: 0x1F\nnone: 0\n")
    with pytest.raises(ValueError, match=r"quote '.*' or write it decimal"):
        cfg.read_yaml(path)
    path.write_text(path.read_text().replace(number, "10"))
    assert cfg.read_yaml(path) == {
        "seed": 10,
        "steps": 1000,
        "other": 31,
        "none": 0,
    }


@pytest.mark.parametrize(
    "text",
    [
        "train: {learning_rate: 1, learning-rate: 2}",
        "train: {learning_rate: 1}\ntrain.learning_rate: 2",
        "arms: {a: {train.learning-rate: 1, train: {learning_rate: 2}}}",
    ],
)
def test_preset_with_a_setting_in_two_spellings_is_refused(tmp_path, text):
    path = tmp_path / "two.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"must give train\.learning-rate once"):
        presets.preset_flags(path, cfg.BASE_ARM)


def test_read_yaml_missing_file_raises(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        cfg.read_yaml(tmp_path / "none.yaml")


def test_preset_flags_unknown_arm_names_those_there_are(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text("arms: {dense: {model.ffn: dense}}\n")
    with pytest.raises(ValueError, match=r"dense, base\. Got 'dens'"):
        presets.preset_flags(path, "dens")


def test_config_round_trips_through_its_tree():
    config = cfg.RunConfig(
        seed=3,
        model=TransformerConfig(
            ternary=TernaryConfig(granularity="channel"),
            routing=RoutingConfig(gate="none"),
        ),
    )
    assert cfg.from_tree(cfg.to_tree(config)) == config


def test_config_without_later_settings_is_as_it_was():
    tree = cfg.to_tree(cfg.RunConfig(model=TransformerConfig(vocab_size=9)))
    for name in ("attention", "remat", "implementation"):
        del tree["model"][name]
    model = cfg.from_tree(tree).model
    assert (model.attention, model.remat, model.implementation) == ("auto", False, None)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"sed": 1}, "sed is not a setting"),
        ({"seed": "x"}, "seed must be"),
        ({"seed": True}, "seed must be"),
        ({"model": {"ffn": "moe"}}, "model.ffn must be"),
        ({"model": 3}, "model. must be a mapping"),
    ],
)
def test_from_tree_bad_value_raises_naming_it(tree, message):
    with pytest.raises(ValueError, match=message):
        cfg.from_tree(tree)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("learning_rate", -1.0),
        ("learning_rate", float("inf")),
        ("beta2", 1.5),
        ("beta1", 1.0),
        ("beta2", 1 - 1e-9),  # 1 in float32
        ("beta2", float("nan")),
        ("accumulate", 5),
        ("clip", -1.0),
        ("schedule", "linear"),
        ("decay_share", 1.5),
    ],
)
def test_train_config_impossible_value_raises_naming_it(no_type_hook, name, value):
    with pytest.raises(ValueError, match=name):
        cfg.TrainConfig(**{name: value})


def test_resolve_vocabulary_against_tokenizer_raises():
    config = cfg.RunConfig(model=TransformerConfig(vocab_size=100))
    with pytest.raises(ValueError, match="vocab_size=100 must be the tokenizer's 65"):
        cfg.resolve(config, 65)


@pytest.mark.parametrize(
    "ffn",
    [
        "sparse",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("hierarchical", "lookup")),
    ],
)
def test_match_params_dense_twin_has_as_many_parameters_within_two_percent(ffn):
    trix = TransformerConfig(vocab_size=65, ffn=ffn)
    width = match_params(trix, trix)
    dense = dataclasses.replace(trix, ffn="dense", ffn_width=width)
    assert abs(costs(dense).total / costs(trix).total - 1) < 0.02


@pytest.mark.slow
def test_costs_total_is_what_init_makes():
    config = TransformerConfig(vocab_size=9, n_layers=1, d_model=16, n_heads=2)
    tokens = jnp.zeros((1, 4), jnp.int32)
    params = TransformerLM(config).init(jax.random.key(0), tokens)["params"]
    assert costs(config).total == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_costs_by_hand():
    # Two layers, D=128, 16 tiles of 32: scores 16 D, tiles 4 * 2 * D * 32 a token.
    sparse = TransformerConfig(
        vocab_size=65, ffn="sparse", n_layers=2, tiles_per_token=4
    )
    assert costs(sparse).ffn_active == 2 * (16 * 128 + 4 * 2 * 128 * 32)
    assert active_width(sparse) == 8 + 4 * 32
    assert costs(sparse).ffn_bits == 2 * (2 * 2 * 128 * 512 + 16 * 2 * 16)
    channel = dataclasses.replace(sparse, ternary=TernaryConfig(granularity="channel"))
    scales = 16 * (32 + 128)
    assert costs(channel).ffn_bits == 2 * (2 * 2 * 128 * 512 + 16 * scales)
    dense = TransformerConfig(vocab_size=65, ffn="dense", n_layers=2)
    assert costs(dense).ffn_active == 2 * 2 * 128 * 512
    assert costs(dense).ffn_bits == 16 * costs(dense).ffn
    # With clusters of 4: 4 addresses and 2 * 4 tiles are scored, all 16 in training.
    deep = dataclasses.replace(sparse, ffn="hierarchical", top_k_clusters=2)
    tiles = 4 * 2 * 128 * 32
    assert costs(deep).ffn_active == 2 * ((4 + 8) * 128 + tiles)
    assert costs(deep).ffn_active_training == 2 * ((4 + 16) * 128 + tiles)
    assert costs(sparse).ffn_active_training == costs(sparse).ffn_active


def test_width_of_equal_bits_counts_routing():
    tiles = TransformerConfig(
        vocab_size=4096, ffn="sparse", expansion=16, num_tiles=64, tiles_per_token=7
    )
    dense = TransformerConfig(vocab_size=4096, ffn="dense")
    widths = []
    for how in (
        RoutingConfig(source="hash"),
        RoutingConfig(),
        RoutingConfig(hold_after=0.1, hold="routes"),
    ):
        one = dataclasses.replace(tiles, routing=how)
        width = match_bits(dense, one)
        cost, twin = costs(one), costs(dataclasses.replace(dense, ffn_width=width))
        unit = 16 * 4 * 2 * 128  # bits of one more hidden unit in four layers
        assert abs(cost.ffn_bits + cost.routing_bits - twin.ffn_bits) < unit
        widths.append(width)
    # 64 signatures of D numbers and a bias; and a row of D for each of 4,096 ids.
    assert widths[1] - widths[0] == 32
    assert widths[2] - widths[1] == 4096 * 128 // (4 * 2 * 128)
    unknown = dataclasses.replace(one, vocab_size=None)
    with pytest.raises(ValueError, match=r"give model\.vocab_size"):
        match_bits(dense, unknown)


def test_costs_of_lookups_by_hand():
    # 256 tiles in 16 clusters of 16: 16 addresses and 2 * 16 tiles are scored.
    sizes = {"n_layers": 1, "num_tiles": 256, "tiles_per_cluster": 16, "grid_size": 2}
    sizes |= {"vocab_size": 65, "top_k_clusters": 2, "tiles_per_token": 8}
    own = TransformerConfig(ffn="lookup", reads="own", **sizes)
    # A token reads, takes a spline of one number, and writes, eight times.
    assert costs(own).ffn_active == (16 + 32) * 128 + 8 * (128 + 1 + 128)
    assert costs(own).ffn_active_training == (16 + 256) * 128 + 8 * (2 * 128 + 1)
    directions, splines, scales = 2 * 256 * 128, 256 * 2 * 2, 3
    rest = 256 + 2 * 128 + 1  # a scale a tile, the norm, the output's scale
    ternary = directions + splines
    assert costs(own).ffn == ternary + rest
    assert costs(own).ffn_bits == 2 * ternary + 16 * (scales + rest)
    real = dataclasses.replace(own, ternary=TernaryConfig(mode="none"))
    assert costs(real).ffn_bits == 2 * splines + 16 * (directions + 1 + rest)
    both = dataclasses.replace(real, ternary_splines=False)
    assert costs(both).ffn_bits == 16 * costs(own).ffn
    # Biases, tiles of clusters and their biases: signatures are the rows that tiles
    # read by.
    assert costs(own).routing_bits == 16 * (256 + 256 + 16)
    # The compressor's two matrices, and two numbers and a direction a tile.
    shared = dataclasses.replace(own, reads="shared")
    compressor = 128 * 32 + 32 * 2
    assert costs(shared).ffn_active == 48 * 128 + compressor + 8 * (2 + 128)


@pytest.mark.parametrize("ffn", ["sparse", "hierarchical", "lookup"])
def test_costs_of_a_hash_have_no_scores(ffn):
    sizes = {"vocab_size": 65, "n_layers": 1, "num_tiles": 16, "tiles_per_cluster": 4}
    by_weights = TransformerConfig(ffn=ffn, **sizes)
    by_hash = dataclasses.replace(by_weights, routing=RoutingConfig(source="hash"))
    scores = 16 if ffn == "sparse" else 4 + 4
    assert costs(by_weights).ffn_active - costs(by_hash).ffn_active == 128 * scores
    assert active_width(by_weights) - active_width(by_hash) == scores / 2
    cost = costs(by_hash)
    assert cost.ffn_active_training == cost.ffn_active


def test_learning_rate_schedule_warms_up_and_ends_at_its_share():
    config = cfg.TrainConfig(steps=100, warmup_steps=10, learning_rate=1.0)
    schedule = learning_rate_schedule(config)
    assert float(schedule(0)) == pytest.approx(0.1)
    assert float(schedule(9)) == pytest.approx(1.0)
    assert float(schedule(100)) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        # After two updates of warm-up eight more: 0.1 + 0.9 (1 + cos(pi u / 8)) / 2.
        (
            "cosine",
            [
                0.5,
                1,
                1,
                0.965746,
                0.868198,
                0.722208,
                0.55,
                0.377792,
                0.231802,
                0.134254,
            ],
        ),
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        # Four of ten updates fall from 1 towards 0.1, by 0.225 each.
        ("wsd", [0.5, 1, 1, 1, 1, 1, 1, 0.775, 0.55, 0.325]),
    ],
)
def test_learning_rate_schedules_are_their_formulas(schedule, rates):
    settings = {"steps": 10, "warmup_steps": 2, "learning_rate": 1.0}
    config = cfg.TrainConfig(schedule=schedule, decay_share=0.4, **settings)
    found = [float(learning_rate_schedule(config)(u)) for u in range(10)]
    np.testing.assert_allclose(found, rates, atol=1e-6)


def test_lookup_of_a_config_that_knows_no_reads_has_the_one_cluster_it_had():
    model = TransformerConfig(ffn="lookup", top_k_clusters=2)
    tree = cfg.to_tree(cfg.RunConfig(model=model))
    assert cfg.from_tree(tree).model == model
    assert cfg.model_from_tree(tree["model"]) == model
    del tree["model"]["reads"]
    one = dataclasses.replace(model, top_k_clusters=1)
    assert cfg.from_tree(tree).model == cfg.model_from_tree(tree["model"]) == one
    # Its checkpoints are those of this model.
    meta, opened = {"settings": provenance.flat(tree)}, cfg.from_tree(tree)
    provenance.check(meta, opened, Path("none"), 1, "a step")
    two = cfg.RunConfig(model=model)
    with pytest.raises(ValueError, match="top_k_clusters was 1 and is 2"):
        provenance.check(meta, two, Path("none"), 1, "a step")


def test_signatures_of_a_config_that_knows_no_router_input_met_the_hidden_state():
    tree = cfg.to_tree(cfg.RunConfig(model=TransformerConfig(ffn="sparse")))
    del tree["model"]["router_input"]
    was = TransformerConfig(ffn="sparse", router_input="hidden")
    assert cfg.from_tree(tree).model == cfg.model_from_tree(tree["model"]) == was
    meta = {"settings": provenance.flat(tree)}
    provenance.check(meta, cfg.from_tree(tree), Path("none"), 1, "a step")
    now = cfg.RunConfig(model=TransformerConfig(ffn="sparse"))
    with pytest.raises(
        ValueError, match="router_input was 'hidden' and is 'embedding'"
    ):
        provenance.check(meta, now, Path("none"), 1, "a step")
    # A dense FFN routes nothing.
    dense = cfg.RunConfig(model=TransformerConfig(ffn="dense"))
    tree = cfg.to_tree(dense)
    del tree["model"]["router_input"]
    assert cfg.from_tree(tree) == dense
    meta = {"settings": provenance.flat(tree)}
    provenance.check(meta, dense, Path("none"), 1, "a step")


def test_learning_rate_of_a_config_that_names_no_schedule_is_cosine():
    tree = cfg.to_tree(cfg.RunConfig())
    del tree["train"]["schedule"], tree["train"]["decay_share"]
    assert cfg.from_tree(tree).train.schedule == "cosine"


def test_learning_rate_schedule_warmup_is_clipped_to_the_run():
    config = cfg.TrainConfig(steps=5, warmup_steps=100, learning_rate=1.0)
    assert float(learning_rate_schedule(config)(4)) == pytest.approx(1.0)


@pytest.mark.parametrize("ffn", ["hierarchical", "lookup", "dense"])
def test_decay_mask_leaves_norms_scales_embeddings_and_splines_alone(ffn):
    ternary = TernaryConfig() if ffn == "lookup" else TernaryConfig(rule="fixed")
    config = TransformerConfig(vocab_size=65, n_layers=1, ffn=ffn, ternary=ternary)
    model, tokens = TransformerLM(config), jnp.zeros((1, 4), jnp.int32)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens))["params"]
    mask = jax.tree_util.tree_leaves_with_path(decay_mask(params))
    names = {
        jax.tree_util.keystr(path, simple=True, separator="/"): m for path, m in mask
    }
    decayed = {name for name, m in names.items() if m}
    assert decayed
    assert all(name.endswith("/kernel") for name in decayed)
    for word in (
        "norm",
        "scale",
        "embed",
        "positions",
        "splines",
        "directions",
        "bias",
    ):
        assert not any(word in name for name in decayed)


def test_kernels_by_name_bind_the_step_and_not_who_counts_or_serves(no_type_hook):
    named = TransformerConfig(
        vocab_size=7,
        n_layers=1,
        ffn="sparse",
        attention="cudnn",
        implementation="mosaic_gpu",
    )
    plain = dataclasses.replace(named, attention="auto", implementation=None)
    assert named.on_any_device() == plain
    assert costs(named) == costs(plain)
    xla = dataclasses.replace(named, attention="xla", implementation="xla")
    assert xla.on_any_device() == xla
    with pytest.raises(ValueError, match="implementation must be one of"):
        TransformerConfig(ffn="dense", implementation="bogus")


def test_ternary_settings_of_a_lookup_without_ternary_products_are_refused():
    TransformerConfig(
        ffn="lookup", reads="own", ternary=TernaryConfig(rule="threshold")
    )
    with pytest.raises(ValueError, match="with reads='shared'"):
        TransformerConfig(ffn="lookup", ternary=TernaryConfig(rule="threshold"))
