"""Long texts are encoded in parts, to the ids of the whole."""

import importlib
import json
import random
import unicodedata

import numpy as np
import pytest
import tokenizers as hf
from hypothesis import given
from hypothesis import strategies as st

from trix_jax.lm.data import (
    CharTokenizer,
    DataConfig,
    load_tokenizer,
    prepare,
    train_bpe,
)
from trix_jax.lm.data.long_texts import PART, cuts_of, parts

CORPUS = ["the cat's sat on the mat.\r\n\r\n  And\ta 12345 " * 20, "日本 and 🙂\n" * 20]
BPE = train_bpe(CORPUS, vocab_size=290)
WORDS = ["the", "cat", "'s", "12345", "…", "日本", "🙂", "e\u0301", "\u180e", "\x1c"]
SPACES = [" ", "  ", "\n", "\n\n\n", "\r\n", "\t", "\u00a0", "\u3000", " \n "]


def inner(tokenizer):
    """The library's own tokenizer, of all of a text at once."""
    return hf.Tokenizer.from_str(tokenizer.content())


def whole(tokenizer, text):
    return inner(tokenizer).encode(text, add_special_tokens=False).ids


def long(pieces, seed=0):
    """A text of some parts, of pieces in a random order."""
    draw, drawn = random.Random(seed), []
    while sum(map(len, drawn)) < 1.3 * PART:
        drawn += draw.choices(pieces, k=1000)
    return "".join(drawn)


@given(text=st.lists(st.sampled_from(WORDS + SPACES), max_size=40).map("".join))
@pytest.mark.parametrize("cuts", [" ", " \n"])
def test_any_text_in_short_parts_has_the_ids_of_the_whole(text, cuts):
    found = [*parts(text, cuts, 3)]
    assert "".join(found) == text
    assert [i for part in found for i in whole(BPE, part)] == whole(BPE, text)


@pytest.mark.parametrize(
    "pieces",
    [
        WORDS + SPACES,
        ["a line\n"],
        ["\n", "\n\n", "x"],
        ["a", " " * 99],
        ["日本", "。\n"],
        ["<|user|>", "<|endoftext|>", " ", "\n"],
        ["unbroken"],
        [" "],
    ],
)
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bpe", "gpt2"])
def test_long_texts_have_the_ids_of_the_whole(kind, pieces, tokenizer_file):
    tokenizer = BPE if kind == "bpe" else load_tokenizer(tokenizer_file("gpt2"))
    text = long(pieces)
    spelled = text.replace("<|endoftext|>", "<|end\ufdd0oftext|>")
    texts = ["the mat", spelled, "", "the cat"]
    found = tokenizer.encode_batch(texts)
    assert [ids.tolist() for ids in found] == [whole(tokenizer, t) for t in texts]


def test_a_long_text_is_encoded_in_parts_where_that_is_known(tokenizer_file):
    text = long(["some words\n", " and more"])
    for tokenizer in (BPE, load_tokenizer(tokenizer_file("gpt2"))):
        assert max(map(len, tokenizer.parts(text))) < 1.1 * PART
    for kind in ("llama", "bert"):
        assert [*load_tokenizer(tokenizer_file(kind)).parts(text)] == [text]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("normalizer", {"type": "NFC"}),
        ("pre_tokenizer", None),
        ("pre_tokenizer", {"type": "Whitespace"}),
        ("rstrip", True),
        ("content", "<two words>"),
        ("use_regex", False),
    ],
)
def test_no_cut_is_known_of_another_tokenizer(field, value):
    tree = json.loads(inner(BPE).to_str())
    assert cuts_of(tree) == " \n"
    prefixed = tree["pre_tokenizer"] | {"add_prefix_space": True}
    assert cuts_of(tree | {"pre_tokenizer": prefixed}) == " "
    places = {"use_regex": tree["pre_tokenizer"]} | dict.fromkeys(
        ("rstrip", "content"), tree["added_tokens"][0]
    )
    places.get(field, tree)[field] = value
    assert cuts_of(tree) == ""


@pytest.mark.slow
@pytest.mark.parametrize("space", [" ", "\n"])
def test_a_word_ends_before_a_space_behind_any_character(space):
    split = hf.pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    codes = [*range(0x3000), *range(0x3000, 0x110000, 13)]  # from there on scripts
    every = [c for c in map(chr, codes) if unicodedata.category(c) != "Cs"]
    for start in range(0, len(every), 20_000):
        text = "".join(f"{c}{space}x" for c in every[start : start + 20_000])
        apart = [word for part in parts(text, space, 2) for word, _ in split(part)]
        assert apart == [word for word, _ in split(text)]


@pytest.mark.slow
def test_bpe_learns_the_same_from_parts():
    text = long([*"abcdefgh", " ", "\n", "\n\n", "'s"])
    tree = json.loads(train_bpe([text], 300).content())
    inner = hf.Tokenizer(hf.models.BPE())
    inner.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = hf.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([text], trainer)
    assert tree["model"] == json.loads(inner.to_str())["model"]


def test_char_encodes_long_texts_and_names_the_place_of_an_unknown_one():
    tokenizer = CharTokenizer("abc")
    text = "abc" * PART
    assert np.array_equal(tokenizer.encode(text), np.tile([0, 1, 2], PART))
    assert tokenizer.encode("").dtype == np.int32
    with pytest.raises(ValueError, match=f"Got 'é' at {len(text)}"):
        tokenizer.encode(text + "é")


def test_prepare_says_what_is_encoded_in_one_piece(
    tmp_path, tokenizer_file, monkeypatch
):
    module = importlib.import_module("trix_jax.lm.data.prepare")
    monkeypatch.setattr(module, "LONG_CHARACTERS", int(1.2 * PART))
    (tmp_path / "a.txt").write_text("the tile " * (PART // 5))
    for kind in ("gpt2", "bert"):
        lines, file = [], tokenizer_file(kind)
        config = DataConfig(path=str(tmp_path / "a.txt"), tokenizer=str(file))
        prepare(config, tmp_path / kind, lines.append)
        is_told = any("are encoded in one piece" in line for line in lines)
        assert is_told == (kind == "bert")
