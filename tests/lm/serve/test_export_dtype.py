"""Exports whose real weights are bfloat16: what the files hold is what is counted as
served.
"""

import contextlib
import dataclasses
import io
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax.traverse_util import flatten_dict

from trix_jax import (
    RoutingConfig,
    TernaryConfig,
    TransformerConfig,
    TransformerLM,
    load_run,
)
from trix_jax.cli.main import main
from trix_jax.frozen import freeze
from trix_jax.interop import safetensors
from trix_jax.lm import ngram
from trix_jax.lm.accounting import costs
from trix_jax.lm.data import open_store
from trix_jax.lm.serve import card
from trix_jax.lm.serve.card import write_card
from trix_jax.lm.serve.export import WEIGHTS, part_bytes
from trix_jax.lm.train.evaluate import evaluate

TILES = TransformerConfig(
    vocab_size=16,
    context=4,
    d_model=16,
    n_layers=2,
    n_heads=2,
    num_tiles=4,
    tiles_per_token=2,
    tiles_per_cluster=2,
)
KINDS = {
    "sparse": {},
    "hash": {"routing": RoutingConfig(source="hash"), "shared_width": 4},
    "narrow": {"expansion": 1, "num_tiles": 8},  # one weight to a byte
    "channel": {"ternary": TernaryConfig(granularity="channel")},
    "learned": {"routing": RoutingConfig(source="learned")},
    "hierarchical": {"ffn": "hierarchical"},
    "lookup": {"ffn": "lookup", "tiles_per_token": 1},
    "own": {"ffn": "lookup", "reads": "own", "grid_size": 2},
    "real": {"ternary": TernaryConfig(mode="none")},
    "dense": {"ffn": "dense"},
}


def test_the_kinds_are_all_ffns():
    assert {kind.get("ffn", "sparse") for kind in KINDS.values()} == {
        "sparse",
        "hierarchical",
        "lookup",
        "dense",
    }


QUICK = ("sparse", "dense")


@pytest.mark.parametrize(
    "kind",
    [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in KINDS],
)
def test_a_files_ffn_bits_are_those_counted_as_served(kind, tmp_path):
    config = dataclasses.replace(TILES, **KINDS[kind])
    model, tokens = TransformerLM(config), jnp.zeros((1, 4), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    variables = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), variables)
    if config.has_ternary_weights:
        variables = freeze(model, variables, tokens)
    sizes = safetensors.write(tmp_path / WEIGHTS, model, variables, "bfloat16")
    stored, _ = safetensors.stored(tmp_path / WEIGHTS)
    assert {name: value.nbytes for name, value in stored.items()} == sizes
    assert 8 * part_bytes(sizes)["ffn"] == costs(config).ffn_bits


@pytest.fixture(scope="module")
def folders(run_dir, tmp_path_factory):
    """The run's export in both dtypes, with what each said last in a file `said`."""
    found = tmp_path_factory.mktemp("exports")
    for dtype in ("float32", "bfloat16"):
        argv = ["export", "--checkpoint", str(run_dir), "--output", str(found / dtype)]
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert main([*argv, "--dtype", dtype, "--json"]) == 0
        (found / dtype / "said").write_text(said.getvalue().splitlines()[-1])
    return found


def test_parameters_are_rounded_once_and_nothing_else(folders):
    _, exact, _ = load_run(folders / "float32")
    _, rounded, _ = load_run(folders / "bfloat16")
    assert exact.keys() == rounded.keys()
    for name, tree in exact.items():
        ours = flatten_dict(rounded[name])
        for path, value in flatten_dict(tree).items():
            if name == "params":
                value = value.astype(jnp.bfloat16).astype(jnp.float32)
            assert ours[path].dtype == value.dtype
            np.testing.assert_array_equal(ours[path], value)


def test_a_rounded_export_and_its_card_say_what_it_holds_and_loses(run_dir, folders):
    exact, rounded = (
        json.loads((folders / dtype / "said").read_text())
        for dtype in ("float32", "bfloat16")
    )
    store = open_store(run_dir / "data")
    before, after = (
        evaluate(*load_run(each)[:2], store).val_loss
        for each in (run_dir, folders / "bfloat16")
    )
    assert (rounded["val_loss_before"], rounded["val_loss"]) == (before, after)
    assert "val_loss" not in exact  # its numbers stay
    assert before != after
    assert abs(before - after) < 1e-3
    about = json.loads((run_dir / "summary.json").read_text())
    text = write_card(folders / "bfloat16", store, about).read_text()
    assert "all others\nbfloat16" in text
    assert "times fewer than in float32" in text


@pytest.mark.slow
def test_a_run_is_exported_with_its_card_unfinished_or_not_at_all(
    run_dir, tmp_path, capsys, monkeypatch
):
    """And evaluated in the batches and on the tokens that it was trained with; for the
    card on all.
    """
    run, out, sizes = shutil.copytree(run_dir, tmp_path / "run"), tmp_path / "out", []
    (run / "summary.json").unlink()
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["train"] |= {"eval_batch_size": 3, "eval_tokens": 20}
    (run / "config.yaml").write_text(yaml.safe_dump(tree))

    def noting(model, variables, store, batch_size=64, **more):
        sizes.append((batch_size, more.get("most", 0)))
        return evaluate(model, variables, store, batch_size, **more)

    monkeypatch.setattr("trix_jax.lm.train.evaluate.evaluate", noting)
    monkeypatch.setattr(card, "evaluate", noting)
    argv = ["export", "--checkpoint", str(run), "--output", str(out), "--card"]
    assert main([*argv, "--dtype", "bfloat16"]) == 0
    assert "seed 42: 10 steps over 1,280 tokens" in (out / "README.md").read_text()
    said = capsys.readouterr().out
    assert ", 32 tokens of " in said
    assert "on all 887 validation tokens" in said
    assert main(["eval", "--checkpoint", str(run), "--tokens", "20"]) == 0
    assert " 32 tokens of " in capsys.readouterr().out
    assert sizes == [(3, 20), (3, 20), (3, 0), (3, 20)]
    shutil.rmtree(out)
    shutil.rmtree(run / "data")
    assert main(argv) == 2
    assert not out.exists()


def test_a_card_counts_a_part_of_the_data_and_says_so(run_dir, folders, monkeypatch):
    monkeypatch.setattr(ngram, "COUNTED", 50)
    about = json.loads((run_dir / "summary.json").read_text())
    path = write_card(folders / "float32", open_store(run_dir / "data"), about)
    assert (
        "N-grams are counted over 50 training tokens, and scored on the first 50 of "
        "validation." in path.read_text()
    )
