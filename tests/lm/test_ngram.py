"""N-gram floors against the formula written out one token at a time."""

import math
import shutil
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trix_jax.cli.report import run_report
from trix_jax.lm import ngram
from trix_jax.lm.ngram import floors, ngram_losses
from trix_jax.lm.serve.load import open_run_data

TOKENS = st.lists(st.integers(0, 4), min_size=2, max_size=40)


def spelled_out(train, val, order, vocab_size):
    grams = Counter(
        tuple(train[i : i + n])
        for n in range(1, order + 1)
        for i in range(len(train) - n + 1)
    )

    def probability(token, context):
        lower = probability(token, context[1:]) if context else 1 / vocab_size
        after = [count for gram, count in grams.items() if gram[:-1] == context]
        if not after:
            return lower
        return (grams[(*context, token)] + len(after) * lower) / (
            sum(after) + len(after)
        )

    contexts = [tuple(val[max(0, i - order + 1) : i]) for i in range(1, len(val))]
    losses = [
        -math.log(probability(t, c)) for t, c in zip(val[1:], contexts, strict=True)
    ]
    return sum(losses) / len(losses)


@given(train=TOKENS, val=TOKENS)
def test_ngram_losses_equal_the_formula(train, val):
    losses = ngram_losses(
        np.array(train), np.array(val), orders=(1, 2, 4), vocab_size=9
    )
    for order, loss in losses.items():
        assert loss == pytest.approx(
            spelled_out(train, val, order, vocab_size=9), rel=1e-12
        )


def test_ngram_losses_default_vocabulary_is_the_ids_present():
    train, val = np.array([5, 5, 900], np.uint16), np.array([5, 70, 5], np.int32)
    expected = spelled_out(train.tolist(), val.tolist(), 3, vocab_size=3)
    assert ngram_losses(train, val, orders=[3]) == {3: pytest.approx(expected)}


def test_ngram_losses_deterministic_cycle_falls_with_order():
    cycle = np.tile([0, 1, 0, 2], 500)  # two tokens of context tell the next one
    losses = ngram_losses(cycle, cycle[:400], orders=(1, 2, 3))
    assert losses[1] > losses[2] > 0.3 > 0.05 > losses[3]


@pytest.mark.parametrize(
    ("train", "val", "orders"),
    [([], [0, 1], (1,)), ([0], [0], (1,)), ([0], [0, 1], (0,)), ([0], [0, 1], ())],
)
def test_ngram_losses_nothing_to_count_raises(train, val, orders):
    with pytest.raises(ValueError, match="train must have a token, val two"):
        ngram_losses(np.array(train, np.int32), np.array(val), orders)


def test_floors_count_and_score_what_is_asked(run_dir, tmp_path, monkeypatch):
    store = open_run_data(run_dir)
    train, val = store.train.window(0, 50), store.val.window(0, 31)
    size = store.tokenizer.vocab_size
    assert floors(store, (1, 2), 50, 30) == ngram_losses(train, val, (1, 2), size)
    whole = floors(store, (1,))
    assert whole == floors(store, (1,), scored=len(store.val) + 9)
    monkeypatch.setattr(ngram, "COUNTED", 50)
    run = shutil.copytree(run_dir, tmp_path / "run")
    text = run_report(run, pytest.fail).read_text()
    assert "bigram, counting 50 tokens, on the first 50 of validation |" in text
