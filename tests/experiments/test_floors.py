"""N-gram floors are counted on the data of their setting, and kept beside others."""

import json
import shlex

import yaml

from experiments import floors
from experiments.quality.design import SETTINGS
from trix_jax.lm.data import DataConfig, prepare


def test_floors_of_a_store_are_added_beside_those_there(tmp_path, monkeypatch):
    monkeypatch.setattr(floors, "PATH", tmp_path / "floors.json")
    floors.PATH.write_text('{"other": {}}')
    (tmp_path / "text.txt").write_text("the tile that matches best is computed. " * 200)
    data = DataConfig(source="text", path=str(tmp_path / "text.txt"), tokenizer="char")
    store = prepare(data, tmp_path / "store", lambda _: None)
    floors.main(["shakespeare-char-muon", str(tmp_path / "store")])
    known = json.loads(floors.PATH.read_text())
    assert set(known) == {"other", "shakespeare-char-muon"}
    found = known["shakespeare-char-muon"]
    losses = [found["val_loss"][str(order)] for order in range(1, 6)]
    assert losses == sorted(losses, reverse=True)  # the text repeats: longer is better
    assert found["store_fingerprint"] == store.fingerprint


def test_floors_of_english_are_on_the_data_of_its_setting():
    preset = floors.PATH.parents[3] / SETTINGS["english-256-muon"].preset
    data = yaml.safe_load(preset.read_text())["data"]
    flags = shlex.split(floors.ENGLISH)
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    assert given.pop("--data.path") == "FOLDER"
    asked = {f"--data.{k.replace('_', '-')}": str(v) for k, v in data.items()}
    assert given == asked
