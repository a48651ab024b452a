"""Tokenizers: round trips, what each refuses, and their files."""

import concurrent.futures
import json
import random
import signal
import threading
import time

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from trix_jax.lm.data import ByteTokenizer, CharTokenizer, load_tokenizer, train_bpe
from trix_jax.lm.data.interruptible import interruptible

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


@pytest.mark.slow
def test_bpe_over_one_very_long_word_takes_seconds_and_encodes_it():
    """400,000 characters took 200 s, 25 times those of 80,000."""
    draw = random.Random(0)
    word = "".join(draw.choices("abcdefghij", k=400_000))
    began = time.process_time()
    tokenizer = train_bpe([f"a word {word} and others"], 1000)
    assert time.process_time() - began < 60
    assert tokenizer.vocab_size == 1000
    assert tokenizer.decode(tokenizer.encode(word)) == word


def test_bpe_of_words_below_the_limit_is_the_library_s_own(tmp_path):
    texts = ["x" * 1999 + " y" * 3000, "some text, more text " * 50, "12345" * 399]
    train_bpe(texts, 300).save(tmp_path / "ours.json")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    ours = json.loads((tmp_path / "ours.json").read_text(encoding="utf-8"))
    assert ours["model"]["vocab"] == json.loads(inner.to_str())["model"]["vocab"]


def test_signal_is_heard_while_a_library_s_call_lasts():
    class Heard(Exception):
        pass

    def hear(*_):
        raise Heard

    before, over = signal.signal(signal.SIGALRM, hear), threading.Event()
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(Heard):
            interruptible(lambda: over.wait(30))
    finally:
        signal.signal(signal.SIGALRM, before)
        over.set()
    assert interruptible(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda: 1 // 0)


def test_a_call_that_ends_while_it_is_waited_for_gives_its_result(monkeypatch):
    sound = concurrent.futures.wait

    def late(futures, timeout):
        done = sound(futures, timeout=0)
        return sound(futures) if done.done else done

    monkeypatch.setattr(concurrent.futures, "wait", late)
    assert interruptible(lambda: time.sleep(0.05) or 3) == 3

    def action():
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        interruptible(action)
