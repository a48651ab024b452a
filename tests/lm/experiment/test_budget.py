"""What an experiment is expected to need."""

import dataclasses
import json

import numpy as np
import pytest
import yaml

from trix_jax.cli import experiment
from trix_jax.lm.accounting import costs
from trix_jax.lm.config import RunConfig, TrainConfig
from trix_jax.lm.data import DataConfig, prepare
from trix_jax.lm.experiment import budget


def test_budget_without_the_compiler_counts_and_models(monkeypatch, models, tmp_path):
    monkeypatch.setattr(budget.train_steps, "compiler", lambda: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = RunConfig(
        model=models["lookup"],
        data=DataConfig(tokenizer="bpe", vocab_size=64),
        train=TrainConfig(steps=100, batch_size=16),
    )
    text, (row,) = budget.estimate(
        {("s", "lookup"): config},
        {("s", "lookup"): 3},
        3.0,
        "the command",
        lambda _: None,
    )
    assert row["params"] == costs(models["lookup"]).total
    assert row["peak_bytes"] is None
    assert 0 < row["h100_hours"] < row["thor_hours"]
    assert row["usd"] == pytest.approx(3 * budget.SLACK * row["h100_hours"] * 3.0)
    assert "A dash was not compiled" in text
    assert text.endswith("Made by `the command`.")


def test_dry_run_charges_every_arm_its_own_seeds(small, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(budget.train_steps, "compiler", lambda: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tree = yaml.safe_load(small.read_text()) | {"arm_seeds": {"dense": [3]}}
    small.write_text(yaml.safe_dump(tree))
    assert experiment.main([str(small), "--dry-run", "--json"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    lookup, dense = told["budget"]
    assert (told["runs"], lookup["runs"], dense["runs"]) == (3, 2, 1)
    for row in told["budget"]:
        a_run = budget.SLACK * row["h100_hours"] * 3.0
        assert row["usd"] == pytest.approx(row["runs"] * a_run)
    assert "with one seed no difference has an interval" in err


def test_bytes_of_a_token_are_34_a_channel_and_5_a_head_and_key(models):
    # Few products: memory is what takes the step's time.
    model = dataclasses.replace(models["dense"], ffn_width=4 * 16)
    config = RunConfig(model=model, train=TrainConfig(batch_size=2**20))
    tokens, a_layer = 2**20 * 16, 34 * 16 + 5 * 2 * 16
    num_bytes = 4 * tokens * (a_layer + 4 * 64) + 28 * costs(model).total
    bandwidth = budget.train_steps.GPUS["h100"].bandwidth
    seconds = budget.step_seconds(config, "h100")
    assert seconds == pytest.approx(num_bytes / bandwidth)


def test_bytes_of_an_ffn_are_4_a_hidden_unit_and_4_a_channel_of_each_tile(models):
    dense = dataclasses.replace(models["dense"], ffn_width=8)
    lookup = models["lookup"]
    tokens, d = 2**20 * dense.context, dense.d_model
    hidden = costs(lookup).ffn_active_training / (2 * d * lookup.n_layers)
    copies = lookup.tiles_per_token * d
    found = [
        budget.step_seconds(
            RunConfig(model=m, train=TrainConfig(batch_size=2**20)), "h100"
        )
        for m in (lookup, dense)
    ]
    per_token = 4 * dense.n_layers * 4 * (hidden + copies - 8)
    state = 28 * (costs(lookup).total - costs(dense).total)
    bandwidth = budget.train_steps.GPUS["h100"].bandwidth
    wanted = (tokens * per_token + state) / bandwidth
    assert found[0] - found[1] == pytest.approx(wanted)


def test_vocabulary_of_a_store_is_its_tokenizer_s(tmp_path):
    (tmp_path / "a.txt").write_text("abcd" * 50)
    text = DataConfig(source="text", path=str(tmp_path / "a.txt"), tokenizer="char")
    store = prepare(text, tmp_path / "store", lambda _: None)
    data = DataConfig(path=str(store.directory), tokenizer="bpe")
    filled = budget.filled(RunConfig(data=data))
    assert filled.model.vocab_size == store.tokenizer.vocab_size < 10


@pytest.mark.parametrize("source", ["tokens", "stdlib"])
def test_vocabulary_of_token_files_is_that_of_their_ids(source, tmp_path):
    for name, ids in {"train": [5, 900], "val": [7, 1200]}.items():
        np.save(tmp_path / f"{name}.npy", np.array(ids, np.int32))
    data = DataConfig(source=source, path=str(tmp_path))
    assert budget.filled(RunConfig(data=data)).model.vocab_size == 1201
    given = dataclasses.replace(data, vocab_size=1500)
    assert budget.filled(RunConfig(data=given)).model.vocab_size == 1500


@pytest.mark.slow
def test_compile_case_compiles_a_step_for_an_absent_gpu(models):
    python = budget.train_steps.compiler()
    if python is None:
        pytest.skip("needs the dependency group aot, or TRIX_AOT_PYTHON")
    model = models["lookup"]
    done = budget.train_steps.compile_case(python, "h100", model, 16, 2, 1)
    assert done["peak_bytes"] > 4 * 3 * costs(model).total
