"""Tokenizers: round trips, what each refuses, and their files."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from trix_jax.lm.data import ByteTokenizer, CharTokenizer, load_tokenizer, train_bpe

CORPUS = ["the cat sat on the mat. " * 20, "naïve façade, 日本 and 🙂 " * 20]
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
BPE = train_bpe(CORPUS, vocab_size=280)


def tokenizer_of(kind):
    return {
        "char": CharTokenizer("".join(CORPUS), with_eot=True),
        "byte": ByteTokenizer(),
        "bpe": BPE,
    }[kind]


@given(text=TEXT)
@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_open_vocabulary_any_text_round_trips(kind, text):
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text


@given(text=TEXT)
def test_char_its_own_characters_round_trip(text):
    tokenizer = CharTokenizer(text + "x")
    assert tokenizer.vocab_size == len(set(text + "x"))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_char_unknown_character_is_named():
    with pytest.raises(ValueError, match=r"Got 'é' at 3"):
        CharTokenizer("abc").encode("abcé")


def test_bpe_vocabulary_below_floor_raises_and_above_reach_shrinks():
    with pytest.raises(ValueError, match="vocab_size must be at least 258"):
        train_bpe(CORPUS, 257)
    assert BPE.vocab_size == 280
    assert 258 <= train_bpe(["aaaa"], 100_000).vocab_size < 280


def test_bpe_same_corpus_gives_same_tokenizer(tmp_path):
    BPE.save(tmp_path / "one.json")
    train_bpe(CORPUS, 280).save(tmp_path / "two.json")
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_decode_out_of_range_raises_and_eot_is_spelled(kind):
    tokenizer = tokenizer_of(kind)
    assert tokenizer.eot is not None
    assert tokenizer.decode([tokenizer.eot]) == "<|endoftext|>"
    assert tokenizer.decode([]) == ""
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(
            ValueError, match=rf"ids must be in 0 to .* Got 0 to {bad}|Got -1 to 0"
        ):
            tokenizer.decode([0, bad])


def test_bpe_text_that_spells_eot_is_not_eot(tmp_path):
    BPE.save(tmp_path / "tokenizer.json")
    for tokenizer in (BPE, load_tokenizer(tmp_path / "tokenizer.json")):
        ids = tokenizer.encode("a<|endoftext|>b")
        assert tokenizer.eot not in ids
        assert tokenizer.decode(ids) == "a<|endoftext|>b"


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_file_round_trip_encodes_the_same(kind, tmp_path):
    tokenizer, path = tokenizer_of(kind), tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = load_tokenizer(path)
    facts = (loaded.kind, loaded.vocab_size, loaded.eot)
    assert facts == (kind, tokenizer.vocab_size, tokenizer.eot)
    np.testing.assert_array_equal(loaded.encode("the mat"), tokenizer.encode("the mat"))


def test_bpe_file_reads_with_the_tokenizers_library(tmp_path):
    BPE.save(tmp_path / "tokenizer.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.encode("the cat").ids == BPE.encode("the cat").tolist()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not json",
        "[]",
        "{}",
        json.dumps({"trix_tokenizer": "word", "version": 1, "eot": None}),
        json.dumps({"trix_tokenizer": "byte", "version": 2, "eot": 256}),
        json.dumps({"trix_tokenizer": "byte", "version": 1, "eot": 5}),
        json.dumps(
            {"trix_tokenizer": "char", "version": 1, "characters": "ba", "eot": None}
        ),
    ],
)
def test_load_corrupt_file_is_named(text, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    with pytest.raises(
        ValueError, match=r"tokenizer\.json is not a readable tokenizer"
    ):
        load_tokenizer(path)


def test_load_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.json"):
        load_tokenizer(tmp_path / "absent.json")
