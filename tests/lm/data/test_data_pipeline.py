"""The pipeline: batches are a function of (seed, step); evaluation covers a split once."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trix_jax.lm.data import Split, eval_batches, train_batches


def line_of(n):
    """A split whose tokens are their own positions, in two shards."""
    return Split(np.split(np.arange(n, dtype=np.uint16), [n // 3]))


def first(n, batches):
    taken = list(itertools.islice(batches, n))
    batches.close()
    return taken


def run(split, n=6, **options):
    options = {"batch_size": 4, "context": 5, "seed": 3} | options
    return first(n, train_batches(split, **options))


def test_train_batches_are_windows_of_consecutive_tokens():
    for batch in run(line_of(50)):
        assert batch.shape == (4, 6)
        assert batch.dtype == np.int32
        np.testing.assert_array_equal(
            (batch - batch[:, :1]) % 50, np.tile(np.arange(6), (4, 1))
        )


@pytest.mark.parametrize(
    ("start_step", "threads"), [(0, 3), (1, 0), (1, 1), (4, 0), (4, 3)]
)
def test_train_batch_i_is_the_same_whatever_the_start_and_threads(start_step, threads):
    split = line_of(50)  # 10 windows: an epoch ends inside a batch
    expected = run(split, n=25)[start_step:]
    got = run(split, n=25 - start_step, start_step=start_step, threads=threads)
    np.testing.assert_array_equal(got, expected)


def test_old_sampler_one_pass_takes_every_offset_once_and_the_next_reshuffles():
    split = line_of(25)  # 20 windows of 6: 5 batches of 4 a pass
    read = run(split, n=10, sampler="offsets")
    starts = np.array(read)[:, :, 0].reshape(2, 20)
    np.testing.assert_array_equal(
        np.sort(starts, axis=1), np.tile(np.arange(20), (2, 1))
    )
    assert (starts[0] != starts[1]).any()
    assert (starts[0] != np.arange(20)).any()


def test_train_batches_seed_changes_the_order():
    split = line_of(200)
    assert (np.array(run(split, seed=1)) != np.array(run(split, seed=2))).any()


def test_train_batches_split_of_one_window_repeats_it():
    old = run(line_of(6), n=1, sampler="offsets")[0]
    np.testing.assert_array_equal(old, np.tile(np.arange(6), (4, 1)))
    for row in run(line_of(6), n=1)[0]:  # each is an epoch, at an offset of its own
        np.testing.assert_array_equal((row - row[0]) % 6, np.arange(6))


@given(
    tokens=st.integers(2, 60), batch_size=st.integers(1, 5), context=st.integers(1, 7)
)
def test_eval_batches_predict_every_token_but_the_first_once(
    tokens, batch_size, context
):
    context = min(context, tokens - 1)
    targets = []
    for batch, mask in eval_batches(
        line_of(tokens), batch_size=batch_size, context=context
    ):
        assert batch.shape == (batch_size, context + 1)
        assert mask.shape == (batch_size, context)
        assert (batch.dtype, mask.dtype) == (np.int32, np.float32)
        kept = mask.astype(bool)
        np.testing.assert_array_equal(batch[:, 1:][kept], batch[:, :-1][kept] + 1)
        targets.extend(batch[:, 1:][kept])
    assert targets == list(range(1, tokens))


def test_batches_of_too_short_a_split_raise_at_once():
    for batches in (
        eval_batches,
        lambda split, **kw: train_batches(split, seed=0, **kw),
    ):
        with pytest.raises(
            ValueError, match=r"split must have at least context \+ 1 = 9 tokens. Got 8"
        ):
            batches(line_of(8), batch_size=1, context=8)


@pytest.mark.parametrize(
    "bad", [{"batch_size": 0}, {"context": 0}, {"seed": -1}, {"start_step": -1}]
)
def test_train_batches_number_out_of_range_raises(bad):
    with pytest.raises(ValueError, match="must be at least"):
        train_batches(line_of(20), **{"batch_size": 1, "context": 2, "seed": 0} | bad)
