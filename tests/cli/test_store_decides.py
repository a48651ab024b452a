"""Flags and presets beside a store that is there: the store decides, and runs say so."""

import dataclasses
import json

import pytest
import yaml

from trix_jax.cli import main
from trix_jax.lm.data import DataConfig, prepare

PRESET = """
model: {n_layers: 1, d_model: 16, n_heads: 2, context: 16, num_tiles: 4, tiles_per_cluster: 2}
data: {tokenizer: char, val_fraction: 0.25, max_tokens: 7}
train: {steps: 2, batch_size: 8, eval_every: 2}
"""


@pytest.fixture(scope="module")
def store(corpus, tmp_path_factory):
    config = DataConfig("text", str(corpus), "bpe", vocab_size=300, val_fraction=0.2)
    return prepare(config, tmp_path_factory.mktemp("a") / "store", lambda _: None)


@pytest.fixture
def preset(tmp_path):
    path = tmp_path / "preset.yaml"
    path.write_text(PRESET)
    return path


@pytest.mark.parametrize(
    ("flags", "both"),
    [
        ("--data.tokenizer=char", "--data.tokenizer char {} tokenizer=bpe"),
        ("--data.vocab-size 512", "--data.vocab-size 512 {} vocab_size=300"),
        ("--data.vocab_size 512", "--data.vocab-size 512 {} vocab_size=300"),
        ("--data.val-fraction 0.1", "--data.val-fraction 0.1 {} val_fraction=0.2"),
        ("--data.max-tokens 9", "--data.max-tokens 9 {} max_tokens=None"),
        ("--data.source jsonl", "--data.source jsonl {} source=text"),
    ],
)
@pytest.mark.parametrize("verb", ["train", "prepare"])
def test_typed_flag_that_contradicts_the_store_names_both_values(
    verb, flags, both, store, tmp_path, capsys
):
    data = ["--data.path", str(store.directory), *flags.split()]
    assert main([verb, "--workdir", str(tmp_path / "new"), *data]) == 2
    said = " ".join(capsys.readouterr().err.split())
    typed, there = both.split(" {} ")
    assert f"{typed} is not what the store" in said
    assert f"was made with, {there}." in said
    assert not (tmp_path / "new").exists()


def test_prepare_of_a_store_says_where_that_is_and_does_not_rebuild_it(
    store, tmp_path, capsys
):
    path, new = str(store.directory), tmp_path / "new"
    argv = ["prepare", "--workdir", str(new), "--data.path", path]
    assert main([*argv, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["workdir"] == path
    assert f"{path}: fingerprint {store.fingerprint}" in err
    assert main([*argv, "--rebuild"]) == 2
    said = capsys.readouterr().err
    assert "path must be text, or tokens, to rebuild a store from." in said
    assert f"Got the store {path}." in said
    assert not new.exists()


@pytest.mark.slow
def test_preset_yields_to_the_store_and_the_run_records_what_is_true(
    store, preset, tmp_path
):
    run = tmp_path / "run"
    argv = ["train", preset, "--workdir", run, "--data.path", store.directory]
    typed = ["--data.vocab-size", "300", "--data.tokenizer", "bpe"]
    assert main([*map(str, argv), *typed]) == 0
    recorded = yaml.safe_load((run / "config.yaml").read_text())
    path = str(store.directory)
    true = DataConfig("text", path, "bpe", vocab_size=300, val_fraction=0.2)
    assert recorded["data"] == dataclasses.asdict(true)
    assert recorded["model"]["vocab_size"] == 300
    assert main([*map(str, argv)]) == 0  # goes on: nothing of the run has changed


def test_prepare_of_a_preset_makes_what_its_training_makes(
    preset, corpus, tmp_path, capsys
):
    flags = ["--data.source", "text", "--data.path", str(corpus), "--json"]
    place, more = str(tmp_path / "store"), ["--data.max-tokens", "3000"]
    assert main(["prepare", str(preset), "--workdir", place, *flags, *more]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    config = DataConfig("text", str(corpus), "char", val_fraction=0.25, max_tokens=3000)
    trained = prepare(config, tmp_path / "data", lambda _: None)
    assert result["fingerprint"] == trained.fingerprint
    assert result["train_tokens"] == 3000
    size = len(corpus.read_text())
    assert result["val_tokens"] == size - int(size * 0.75)
    # Its own 7 training tokens hold no window of its model's context.
    assert main(["prepare", str(preset), "--workdir", place + "7", *flags]) == 2
    assert "at least context + 1 = 17 tokens. Got 7" in capsys.readouterr().err


def test_prepare_of_neither_name_nor_preset_says_what_there_is(capsys):
    assert main(["prepare", "fineweb_6m", "--workdir", "x"]) == 2
    assert "fineweb_5m, " in (said := capsys.readouterr().err)
    assert "a .yaml file. Got 'fineweb_6m'" in said
