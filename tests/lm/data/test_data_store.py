"""The token store: shards, the manifest, and damage to either."""

import errno
import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trix_jax.lm.data import DataConfig, Split, is_store, open_store, prepare
from trix_jax.lm.data.store import SplitWriter


@pytest.fixture
def store(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("To be, or not to be, that is the question. " * 20)
    config = DataConfig(source="text", path=str(path))
    return prepare(config, tmp_path / "store", report=lambda line: None)


@given(cuts=st.lists(st.integers(1, 7), min_size=1, max_size=6), data=st.data())
def test_window_across_shards_equals_slice(cuts, data):
    line = np.arange(sum(cuts), dtype=np.uint16)
    split = Split(np.split(line, np.cumsum(cuts)[:-1]))
    start = data.draw(st.integers(0, len(line)))
    length = data.draw(st.integers(0, len(line) - start))
    window = split.window(start, length)
    assert window.dtype == np.int32
    np.testing.assert_array_equal(window, line[start : start + length])


@pytest.mark.parametrize(("start", "length"), [(-1, 2), (3, 3), (0, 6), (6, 0)])
def test_window_outside_split_raises(start, length):
    with pytest.raises(ValueError, match="window must lie inside 0 to 5"):
        Split([np.arange(5)]).window(start, length)


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(65_536, np.uint16), (65_537, np.uint32)]
)
def test_writer_fills_shards_of_the_narrowest_type(vocab_size, dtype, tmp_path):
    line = np.arange(vocab_size - 23, vocab_size)
    with SplitWriter(tmp_path, "val", vocab_size, shard_tokens=10) as writer:
        for piece in np.split(line, [1, 4, 4, 20]):
            writer.append(piece, num_bytes=len(piece))
    assert (writer.tokens, writer.bytes) == (23, 23)
    shards = [np.load(path, allow_pickle=False) for path in sorted(tmp_path.iterdir())]
    assert [len(shard) for shard in shards] == [10, 10, 3]
    assert {shard.dtype for shard in shards} == {np.dtype(dtype)}
    np.testing.assert_array_equal(np.concatenate(shards), line)


def test_manifest_counts_what_the_files_hold(store):
    manifest = json.loads((store.directory / "manifest.json").read_text())
    assert set(manifest["files"]) == {
        "train_00000.npy",
        "val_00000.npy",
        "tokenizer.json",
    }
    assert (
        manifest["files"]["val_00000.npy"]["tokens"]
        == store.val_tokens
        == len(store.val)
        == 86
    )
    assert store.val_bytes == 86
    assert manifest["fingerprint"] == store.fingerprint
    assert len(store.train) == 860 - 86


@pytest.mark.parametrize(
    "name", ["train_00000.npy", "val_00000.npy", "tokenizer.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_open_damaged_file_is_named(name, damage, store):
    path = store.directory / name
    content = bytearray(path.read_bytes())
    match damage:
        case "flip":
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        case "truncate":
            path.write_bytes(content[:-3])
        case "delete":
            path.unlink()
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        open_store(store.directory)


def test_open_manifest_with_another_count_is_refused(store):
    path = store.directory / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["splits"]["val"]["bytes"] += 1
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"manifest\.json.*checksum"):
        open_store(store.directory, verify=False)


def text_of(tmp_path):
    (tmp_path / "text").mkdir(exist_ok=True)
    path = tmp_path / "text" / "corpus.txt"
    path.write_text("To be, or not to be, that is the question. " * 20)
    return DataConfig(source="text", path=str(path))


@pytest.mark.parametrize("place", ["link", "dangling", "empty", "disk"])
def test_store_goes_into_a_folder_that_is_there_without_moving_it(
    place, store, tmp_path, monkeypatch
):
    """A link, or a disk's own folder, over which nothing can be renamed."""
    there = tmp_path / "there"
    target = tmp_path / "elsewhere" if place in ("link", "dangling") else there
    if place != "dangling":
        target.mkdir()
    if place in ("link", "dangling"):
        there.symlink_to(target, target_is_directory=True)
    if place == "disk":
        (there / "lost+found").mkdir()
    number = target.stat().st_ino if target.exists() else None
    sound = os.rename

    def rename(source, goal):
        if place != "dangling" and Path(goal) in (there, target):
            raise OSError(errno.EBUSY, "Device or resource busy")
        sound(source, goal)

    monkeypatch.setattr(os, "rename", rename)
    made = prepare(text_of(tmp_path), there, report=lambda line: None)
    assert made.fingerprint == store.fingerprint
    assert number in (None, target.stat().st_ino)
    files = {path.name for path in target.iterdir()} - {"lost+found"}
    assert files == {path.name for path in store.directory.iterdir()}
    assert there.is_symlink() == (place in ("link", "dangling"))


@pytest.mark.parametrize("moved", [0, 1, 2, 3])
def test_store_killed_while_its_files_moved_is_none_and_is_made_anew(
    moved, store, tmp_path, monkeypatch
):
    there, sound, count = tmp_path / "there", os.rename, itertools.count()
    there.mkdir()

    def rename(source, goal):
        if Path(goal).parent == there and next(count) == moved:
            raise KeyboardInterrupt
        sound(source, goal)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as if killed
        with pytest.raises(KeyboardInterrupt):
            prepare(text_of(tmp_path), there, report=lambda line: None)
    assert not is_store(there)
    made = prepare(text_of(tmp_path), there, report=lambda line: None)
    assert made.fingerprint == store.fingerprint
    files = {path.name for path in there.iterdir()}
    assert files == {path.name for path in store.directory.iterdir()}
