"""prepare: documents to a store, split before windows, the same every time."""

import dataclasses
import json

import numpy as np
import pytest

from trix_jax.lm.data import DataConfig, open_store, prepare


def quiet(line):
    pass


def whole(split):
    return split.window(0, len(split))


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return DataConfig(source="jsonl", path=str(path))


def documents_of(store, split):
    """The texts of a split of several documents, in order."""
    return store.tokenizer.decode(whole(split)).split("<|endoftext|>")[:-1]


@pytest.mark.parametrize("kind", ["char", "byte"])
def test_prepare_one_document_cuts_its_characters(kind, tmp_path):
    text = "".join(chr(97 + i % 26) for i in range(104)) + "é"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    config = DataConfig(source="text", path=str(tmp_path / "a.txt"), tokenizer=kind)
    store = prepare(config, tmp_path / "store", quiet)
    assert store.tokenizer.decode(whole(store.train)) == text[:94]
    assert store.tokenizer.decode(whole(store.val)) == text[94:]
    assert store.val_bytes == 12
    assert (store.val_tokens, store.tokenizer.vocab_size) == {
        "char": (11, 27),
        "byte": (12, 257),
    }[kind]


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_prepare_documents_stay_whole_on_one_side(kind, tmp_path):
    texts = [f"document {i}: " + "word " * (i % 7) for i in range(200)]
    config = write_jsonl(tmp_path / "a.jsonl", texts)
    config = DataConfig("jsonl", config.path, kind, vocab_size=300, val_fraction=0.2)
    store = prepare(config, tmp_path / "store", quiet)
    train, val = documents_of(store, store.train), documents_of(store, store.val)
    assert sorted(train + val) == sorted(texts)
    size = sum(map(len, texts))
    assert 0.2 * size <= sum(map(len, val)) == store.val_bytes < 0.25 * size


def test_prepare_exact_duplicates_land_on_one_side(tmp_path):
    texts = [f"text number {i % 20}" for i in range(100)]
    store = prepare(write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "store", quiet)
    train, val = documents_of(store, store.train), documents_of(store, store.val)
    assert len(train) + len(val) == 100
    assert not set(train) & set(val)


def test_prepare_side_of_a_document_ignores_order(tmp_path):
    texts = [f"text number {i}" for i in range(50)]
    one = prepare(write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "one", quiet)
    two = prepare(
        write_jsonl(tmp_path / "b.jsonl", texts[::-1]), tmp_path / "two", quiet
    )
    assert set(documents_of(one, one.val)) == set(documents_of(two, two.val))


def test_prepare_bpe_learns_from_training_documents_only(tmp_path):
    texts = ["common common common", "zyzzyva zyzzyva zyzzyva"]
    config = write_jsonl(tmp_path / "a.jsonl", texts)
    store = prepare(
        DataConfig("jsonl", config.path, "bpe", vocab_size=300, val_fraction=0.5),
        tmp_path / "store",
        quiet,
    )
    (train,), (val,) = documents_of(store, store.train), documents_of(store, store.val)
    assert len(store.tokenizer.encode(train)) < len(train) / 2
    assert len(store.tokenizer.encode(val)) == len(val)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["same"] * 3, "must not all be the same"),
        (["x"], "one side of a document"),
        ([""], "holds no text"),
    ],
)
def test_prepare_corpus_too_poor_to_split_raises_and_leaves_nothing(
    texts, message, tmp_path
):
    config = write_jsonl(tmp_path / "a.jsonl", texts)
    with pytest.raises(ValueError, match=message):
        prepare(config, tmp_path / "store", quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_prepare_twice_is_byte_equal_and_second_call_reads_no_source(tmp_path):
    config = write_jsonl(tmp_path / "a.jsonl", [f"text {i}" for i in range(20)])
    one = prepare(config, tmp_path / "one", quiet)
    two = prepare(config, tmp_path / "two", quiet)
    assert one.fingerprint == two.fingerprint
    for path in one.directory.iterdir():
        assert path.read_bytes() == (two.directory / path.name).read_bytes()
    (tmp_path / "a.jsonl").unlink()
    assert prepare(config, tmp_path / "one", quiet).fingerprint == one.fingerprint


def test_prepare_over_store_of_another_config_says_what_differs(tmp_path):
    config = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    prepare(config, tmp_path / "store", quiet)
    with pytest.raises(
        ValueError, match="another config: tokenizer='byte' there and 'char' here"
    ):
        prepare(DataConfig("jsonl", config.path, "char"), tmp_path / "store", quiet)
    prepare(
        DataConfig("jsonl", config.path, vocab_size=999), tmp_path / "store", quiet
    )  # no effect on bytes


def test_prepare_into_folder_of_something_else_raises(tmp_path):
    config = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    with pytest.raises(ValueError, match="must be new, empty or a token store"):
        prepare(config, tmp_path, quiet)
    (tmp_path / "empty").mkdir()
    assert prepare(config, tmp_path / "empty", quiet).val_tokens > 0


def test_prepare_damaged_store_is_refused(tmp_path):
    config = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    prepare(config, tmp_path / "store", quiet)
    shard = tmp_path / "store" / "train_00000.npy"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"train_00000\.npy"):
        prepare(config, tmp_path / "store", quiet)


def test_prepare_path_of_a_store_opens_it_in_place(tmp_path):
    config = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    store = prepare(config, tmp_path / "store", quiet)
    again = prepare(DataConfig(path=str(store.directory)), tmp_path / "unused", quiet)
    assert (
        again.fingerprint
        == store.fingerprint
        == open_store(store.directory).fingerprint
    )
    assert not (tmp_path / "unused").exists()


@pytest.mark.usefixtures("no_type_hook")
def test_prepare_takes_paths_as_their_text(tmp_path, tokenizer_file):
    path, val = tmp_path / "a.txt", tmp_path / "b.txt"
    path.write_text("the tile " * 20)
    val.write_text("a token " * 20)
    fields = {"path": path, "val_path": val, "tokenizer": tokenizer_file("gpt2")}
    config = DataConfig(**fields)
    assert config == DataConfig(**{name: str(value) for name, value in fields.items()})
    store = prepare(config, tmp_path / "store", quiet)
    assert store.manifest["config"]["path"] == str(path)
    moved = dataclasses.replace(config, path=val)
    assert moved.path == str(val)


def test_prepare_default_source_with_path_reads_the_path(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    path = str(tmp_path / "a.jsonl")
    store = prepare(DataConfig(path=path, val_fraction=0.5), tmp_path / "store", quiet)
    assert sorted(
        documents_of(store, store.train) + documents_of(store, store.val)
    ) == ["one", "two"]


def test_prepare_default_config_is_the_embedded_corpus(tmp_path):
    store = prepare(DataConfig(), tmp_path / "store", quiet)
    total = len(store.train) + len(store.val)
    assert 1.3e6 < total < 1.7e6
    assert 0.1 <= store.val_tokens / total < 0.13
    assert np.unique(whole(store.val)).size > 64


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"val_fraction": 0.0}, "val_fraction must be between 0 and 1"),
        ({"val_fraction": 1.0}, "val_fraction must be between 0 and 1"),
        ({"max_bytes": 0}, "max_bytes must be at least 1"),
        ({"tokenizer": "word"}, "tokenizer must be char, byte, bpe or the path"),
        ({"source": "web"}, "source must be stdlib"),
        ({"tokenizer": "bpe", "vocab_size": 100}, "vocab_size must be at least 258"),
        ({"path": "/no/such/file"}, "does not exist"),
    ],
)
@pytest.mark.usefixtures("no_type_hook")
def test_prepare_bad_config_raises(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        prepare(DataConfig(**{"max_bytes": 50_000} | fields), tmp_path / "store", quiet)
