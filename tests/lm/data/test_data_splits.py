"""Splits and caps: validation has the share that was asked, whatever else is asked."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trix_jax.lm.data import DataConfig, prepare
from trix_jax.lm.data.splits import cut_in_two


def quiet(line):
    pass


def whole(split):
    return split.window(0, len(split))


def prepared(tmp_path, texts, **fields):
    """A store of documents, and the lines that said how it came about."""
    path, lines = tmp_path / "a.jsonl", []
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = DataConfig(source="jsonl", path=str(path), **fields)
    number = len(list(tmp_path.iterdir()))
    return prepare(config, tmp_path / f"store{number}", lines.append), lines


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_max_tokens_caps_training_and_leaves_validation_as_it_was(kind, tmp_path):
    texts = [f"document {i}: " + "word " * (i % 7) for i in range(300)]
    fields = {"tokenizer": kind, "vocab_size": 300}
    full, _ = prepared(tmp_path, texts, **fields)
    for cap in (2, 100, len(full.train) - 1):
        some, _ = prepared(tmp_path, texts, max_tokens=cap, **fields)
        np.testing.assert_array_equal(whole(some.val), whole(full.val))
        np.testing.assert_array_equal(whole(some.train), whole(full.train)[:cap])
        assert some.val_bytes == full.val_bytes


def test_max_bytes_bounds_what_is_read_on_both_sides(tmp_path):
    texts = [f"text number {i:04}" for i in range(1000)]  # 16 bytes each
    store, _ = prepared(tmp_path, texts, max_bytes=3200, val_fraction=0.25)
    assert store.manifest["splits"]["train"]["bytes"] + store.val_bytes == 3200
    assert store.val_bytes == 800


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("salt", range(6))
def test_few_documents_give_validation_its_share_whatever_their_hashes(
    count, salt, tmp_path
):
    """With three documents one salt gave 98.5 % of the text to validation."""
    texts = [
        f"{salt}\n" + "a line of some words\n" * (2000 if i == 0 else 20)
        for i in range(count)
    ]
    texts = [text + str(i) for i, text in enumerate(texts)]
    store, lines = prepared(tmp_path, texts)
    train, val = (store.tokenizer.decode(whole(s)) for s in (store.train, store.val))
    size = sum(map(len, texts))
    assert store.manifest["splits"]["train"]["bytes"] + store.val_bytes == size
    assert 0.5 * 0.1 * size <= store.val_bytes <= 1.5 * 0.1 * size
    parts = train.count("<|endoftext|>") + val.count("<|endoftext|>")
    told = [line for line in lines if "few to divide" in line]
    assert (parts, len(told)) == (count + 1, 1)  # one of them is on both sides
    assert any(text.endswith("\n") for text in train.split("<|endoftext|>"))


def test_document_that_crosses_the_line_goes_to_training_if_the_rest_will_do(tmp_path):
    """Whole documents, as near to the share as their hashes allow."""
    texts = [f"{i:03}" * 100 for i in range(4)] + [f"{i:03}" * 10 for i in range(40)]
    store, lines = prepared(tmp_path, texts, val_fraction=0.1)
    share = store.val_bytes / sum(map(len, texts))
    assert 0.05 <= share <= 0.15
    assert not [line for line in lines if "few to divide" in line]


@pytest.mark.slow
@given(text=st.text(min_size=1), share=st.floats(0.001, 0.999))
def test_cut_in_two_keeps_every_character_and_about_the_share(text, share):
    head, tail = cut_in_two(text, share)
    assert head + tail == text
    size = len(text.encode())
    smaller = min(share, 1 - share) * size
    assert abs(len(tail.encode()) - share * size) <= smaller / 4 + 5


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("one two three\n\nfour five", "one two three\n\n"),
        ("one two three is\nfour five six", "one two three is\n"),
        ("one two three4 four five", "one two three4 "),
        ("onetwothree4fourfive", "onetwothre"),
    ],
)
def test_cut_in_two_is_at_a_paragraph_line_or_word(text, cut):
    assert cut_in_two(text, 0.5)[0] == cut


@pytest.mark.parametrize(
    ("texts", "fields", "context", "message"),
    [
        (["a", "b"] * 500, {}, 1, "validation would be 500 of 1,000 bytes"),
        (["some text"] * 9 + ["x" * 40], {"val_fraction": 1e-9}, 1, "validation"),
        (["some text", "x" * 40], {"max_tokens": 1}, 1, "the training split must have"),
        ([f"text {i}" for i in range(99)], {}, 200, "at least context . 1 = 201 token"),
        (["x" * 10], {"val_fraction": 0.1}, 1, "the validation split must have"),
    ],
)
def test_split_that_is_of_no_use_is_refused_and_leaves_nothing(
    texts, fields, context, message, tmp_path
):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = DataConfig(source="jsonl", path=str(path), **fields)
    with pytest.raises(ValueError, match=message):
        prepare(config, tmp_path / "store", quiet, context)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_validation_set_of_its_own_is_all_and_only_validation(kind, tmp_path):
    texts = [f"document {i}: " + "word " * (i % 7) for i in range(50)]
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "a.txt").write_text("other words, ÿ")
    (tmp_path / "val" / "b.txt").write_text("document 3: word")
    fields = {"tokenizer": kind, "vocab_size": 300, "val_path": str(tmp_path / "val")}
    store, lines = prepared(tmp_path, texts, **fields)
    decode = store.tokenizer.decode
    assert decode(whole(store.val)).split("<|endoftext|>") == [
        "other words, ÿ",
        "document 3: word",
        "",
    ]
    assert decode(whole(store.train)).split("<|endoftext|>") == [*texts, ""]
    assert store.val_bytes == len("other words, ÿdocument 3: word".encode())
    assert "validation from val" in store.manifest["source"]
    capped, _ = prepared(tmp_path, texts, max_tokens=9, max_bytes=99, **fields)
    assert capped.tokenizer.decode(whole(capped.val)) == decode(whole(store.val))
    assert len(capped.train) == 9
    assert not [line for line in lines if "few to divide" in line]


def test_one_training_and_one_validation_text_have_no_end_marks(tmp_path):
    for name in ("train.txt", "val.txt"):
        (tmp_path / name).write_text(f"the text of {name}")
    paths = {"path": str(tmp_path / "train.txt"), "val_path": str(tmp_path / "val.txt")}
    store = prepare(DataConfig(**paths), tmp_path / "store", quiet)
    assert bytes(whole(store.train).tolist()) == b"the text of train.txt"
    assert bytes(whole(store.val).tolist()) == b"the text of val.txt"
    assert store.manifest["sources"]["val"]["files"][0]["name"] == "val.txt"
    (tmp_path / "val.txt").write_text("the tixt of val.txt")
    with pytest.raises(ValueError, match=r"than there is now: val\.txt changed"):
        prepare(DataConfig(**paths), tmp_path / "store", quiet)


def test_a_table_beside_text_is_validation_as_it_stands(tmp_path):
    path, val = tmp_path / "train.csv", tmp_path / "val.csv"
    path.write_text("id,text\n1,some text\n" * 9)
    val.write_text("id,text\n")
    config = DataConfig(source="text", path=str(path), val_path=str(val))
    assert prepare(config, tmp_path / "s", quiet).val_bytes == len(val.read_bytes())


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), ("", "is empty"), ("x", "the validation split must")],
)
def test_validation_set_that_is_none_is_refused(content, message, tmp_path):
    path, val = tmp_path / "train.txt", tmp_path / "val.txt"
    path.write_text("some text")
    if content is not None:
        val.write_text(content)
    with pytest.raises(ValueError, match=message):
        prepare(DataConfig(path=str(path), val_path=str(val)), tmp_path / "s", quiet)
    assert not (tmp_path / "s").exists()
