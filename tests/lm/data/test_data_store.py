"""The token store: shards, the manifest, and damage to either."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trix_jax.lm.data import DataConfig, Split, open_store, prepare
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
