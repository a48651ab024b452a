"""The sampler: every token a target once an epoch, whoever reads which part of it."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trix_jax.lm.data import Split, batch_windows, train_batches


def line_of(n, shards=1):
    """A split whose tokens are their own positions."""
    return Split(np.array_split(np.arange(n, dtype=np.uint16), shards))


def rows(split, count, *, batch_size, resume_at=(), **numbers):
    """The first `count` windows, read by a run that was stopped after those batches."""
    batches = -(-count // batch_size)
    bounds = [0, *sorted({at for at in resume_at if at < batches}), batches]
    found = []
    for start, stop in itertools.pairwise(bounds):
        options = {"batch_size": batch_size, "start_step": start, "threads": 0}
        reader = train_batches(split, **options, **numbers)
        found += itertools.islice(reader, stop - start)
    return np.concatenate(found)[:count]


@pytest.mark.slow
@given(
    context=st.integers(1, 9),
    more=st.integers(1, 60),
    batch_size=st.integers(1, 7),
    shards=st.integers(1, 5),
    resume_at=st.lists(st.integers(1, 40), max_size=3),
    seed=st.integers(0, 2**32 - 1),
)
def test_epoch_has_every_token_as_target_once_but_for_the_stated_rest(
    context, more, batch_size, shards, resume_at, seed
):
    tokens, epochs = context + more, 4
    windows, rest = divmod(tokens, context)
    read = rows(
        line_of(tokens, shards),
        epochs * windows,
        batch_size=batch_size,
        resume_at=resume_at,
        context=context,
        seed=seed,
    )
    np.testing.assert_array_equal(read[:, 1:], (read[:, :-1] + 1) % tokens)
    for epoch in np.split(read, epochs):
        counts = np.bincount(epoch[:, 1:].reshape(-1), minlength=tokens)
        assert Counter(counts.tolist()) == Counter({1: tokens - rest, 0: rest})


@pytest.mark.parametrize(("processes", "batch_size"), [(1, 8), (2, 8), (4, 12)])
def test_rows_cut_by_processes_make_the_epoch_together(processes, batch_size):
    split, context, seen = line_of(960), 10, np.zeros(960, int)
    for process in range(processes):
        batches = train_batches(split, batch_size=batch_size, context=context, seed=1)
        for batch in itertools.islice(batches, 96 // batch_size):
            mine = np.split(batch, processes)[process]
            np.add.at(seen, mine[:, 1:].reshape(-1), 1)
    np.testing.assert_array_equal(seen, np.ones(960))


def test_old_sampler_draws_some_targets_never_and_some_often():
    """The fault that the sampler mends: of 5,000 tokens in an epoch's worth of windows
    the share that is a target 0, 1, 2, ... times is about Poisson's of mean one.
    """
    split, context = line_of(5000), 10
    for sampler, never, once in (("offsets", 0.37, 0.37), ("epochs", 0.0, 1.0)):
        numbers = {"context": context, "seed": 0, "sampler": sampler}
        read = rows(split, 500, batch_size=50, **numbers)
        counts = np.bincount(read[:, 1:].reshape(-1), minlength=5000)
        assert abs((counts == 0).mean() - never) < 0.03
        assert abs((counts == 1).mean() - once) < 0.06


def test_epochs_differ_in_order_and_in_where_windows_begin():
    split, context = line_of(1000), 10
    starts = rows(split, 300, batch_size=20, context=context, seed=7)[:, 0]
    first, second, third = starts.reshape(3, 100)
    assert len({int(epoch[0]) % context for epoch in (first, second, third)}) > 1
    steps = [np.diff(epoch) % 1000 for epoch in (first, second, third)]
    assert not np.array_equal(steps[0], steps[1])
    assert not np.array_equal(steps[1], steps[2])


def test_batch_windows_are_the_starts_of_the_batch():
    split = line_of(120)
    for sampler in ("epochs", "offsets"):
        numbers = {"batch_size": 7, "context": 11, "seed": 5, "sampler": sampler}
        batches = list(itertools.islice(train_batches(split, **numbers), 5))
        for batch, tokens in enumerate(batches):
            starts = batch_windows(split, batch=batch, **numbers)
            assert starts == tokens[:, 0].tolist()


@pytest.mark.parametrize(
    ("sampler", "golden"),
    [
        ("offsets", [[29, 30, 31, 7], [26, 3, 18, 19], [34, 36, 24, 41]]),
        ("epochs", [[13, 23, 38, 28], [18, 8, 48, 33], [20, 0, 30, 5]]),
    ],
)
def test_batches_are_the_numbers_that_older_runs_had(sampler, golden):
    """Batches 0, 1 and 11 of 4 windows of 5 of 50 tokens, seed 3; "offsets" as printed
    by the version before the sampler had a name. Runs that go on depend on them.
    """
    numbers = {"batch_size": 4, "context": 5, "seed": 3, "sampler": sampler}
    got = [batch_windows(line_of(50), batch=batch, **numbers) for batch in (0, 1, 11)]
    assert got == golden


@pytest.mark.usefixtures("no_type_hook")
def test_unknown_sampler_is_refused():
    with pytest.raises(
        ValueError, match=r"sampler must be epochs or offsets\. Got 'x'"
    ):
        batch_windows(
            line_of(50), batch_size=1, context=2, seed=0, batch=0, sampler="x"
        )
