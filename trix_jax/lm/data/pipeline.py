"""Batches of token windows: each token once an epoch to train on, and once to evaluate.

Batch `i` of a training run is a function of `(split, batch_size, context, seed, sampler,
i)` alone: windows come in one endless order, and batch `i` takes places
`i * batch_size` onward. No worker holds a position, so a run resumes from its step
number, and every host of a group can cut its rows from the same global batch.

With `sampler="epochs"` the n tokens of the split are a ring, `context` targets a window,
and an epoch is a keyed permutation of its `n // context` disjoint windows: window `k` of
epoch `e` has the targets `offset(e) + 1 + k * context` onward. So a token is a target
once an epoch, but for the `n % context` tokens behind the last window, which begin
elsewhere in the next. One window an epoch may go over the end of the ring, from the
split's last token to its first.

With `sampler="offsets"`, that of runs before it had a name, the windows at all offsets
are permuted, `n - context` of them: in as many steps as an epoch has, a token is a target
as often as a Poisson variable of mean one.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence, Sized
from typing import Literal

import numpy as np
from jaxtyping import Float32, Int32

from trix_jax.lm.data.store import Split

Sampler = Literal["epochs", "offsets"]
MOST_WINDOWS = 2**48  # of a run: "without end" has a length that grain can count


def train_batches(
    split: Split,
    *,
    batch_size: int,
    context: int,
    seed: int,
    start_step: int = 0,
    sampler: Sampler | None = None,
    threads: int = 1,
    prefetch: int = 64,
) -> Iterator[np.ndarray]:
    """Yields int32 batches `[batch_size, context + 1]` without end, from batch
    `start_step` on.

    Args:
        split: Tokens to draw from.
        batch_size: Windows in a batch.
        context: Tokens the model sees; a window has one more, the last target.
        seed: Names the order of the windows.
        start_step: Number of the first batch; batch `i` is the same whatever it is.
        sampler: Which windows there are; see above. None: epochs.
        threads: Threads that read ahead; 0 reads in the caller's thread.
        prefetch: Batches they read ahead.

    Raises:
        ValueError: The split is shorter than one window, or a number is out of range.
    """
    _check(split, batch_size, context)
    if seed < 0 or start_step < 0 or threads < 0 or prefetch < 1:
        raise ValueError(
            "seed, start_step and threads must be at least 0 and prefetch at least 1. "
            f"Got seed={seed}, start_step={start_step}, threads={threads}, prefetch={prefetch}."
        )
    import grain

    def read(starts: Sequence[int]) -> np.ndarray:
        return np.stack([read_window(split, start, context + 1) for start in starts])

    starts = _starts(split, batch_size, context, seed, sampler)
    options = grain.ReadOptions(threads, prefetch if threads else 0)
    return iter(starts[start_step:].map(read).to_iter_dataset(options))


def batch_windows(
    split: Split,
    *,
    batch_size: int,
    context: int,
    seed: int,
    batch: int,
    sampler: Sampler | None = None,
) -> list[int]:
    """Where the windows of batch `batch` of `train_batches` start in the split."""
    starts = _starts(split, batch_size, context, seed, sampler)[batch]
    assert starts is not None  # None is grain's word for what a filter left out
    return starts


def epoch_windows(split: Split, context: int) -> int:
    """Windows in an epoch."""
    return len(split) // context


def _starts(
    split: Split, batch_size: int, context: int, seed: int, sampler: Sampler | None
):
    """Where the windows of each batch start, a list a batch, without end."""
    import grain  # here and not above: it takes seconds, and only training needs it

    if sampler not in (None, "epochs", "offsets"):
        raise ValueError(f"sampler must be epochs or offsets. Got {sampler!r}.")
    is_old = sampler == "offsets"
    tokens, windows = len(split), epoch_windows(split, context)

    def start(place: int, window: int) -> int:
        offset = _offset(seed, place // windows, tokens, context)
        return (offset + window * context) % tokens

    def starts(batch: int, drawn: Sequence[int]) -> list[int]:
        if is_old:
            return [int(offset) for offset in drawn]
        return [start(batch * batch_size + i, int(w)) for i, w in enumerate(drawn)]

    count = tokens - context if is_old else windows
    order = grain.MapDataset.range(count).seed(seed).shuffle()
    order = order.repeat(MOST_WINDOWS // count + 1)
    return order.batch(batch_size, batch_fn=list).map_with_index(starts)


def _offset(seed: int, epoch: int, tokens: int, context: int) -> int:
    """Where the first window of an epoch starts: from a hashed place on, about 0.62
    windows further each epoch, so that windows begin at all `context` phases in turn.
    """
    stride = max(1, round(0.618 * context))
    while math.gcd(stride, context) > 1:
        stride += 1
    first = int.from_bytes(hashlib.sha256(f"{seed}".encode()).digest()[:8], "big")
    return (first + epoch * stride) % tokens


def read_window(split: Split, start: int, length: int) -> Int32[np.ndarray, " T"]:
    """A window of the ring: behind the split's last token comes its first."""
    if (over := start + length - len(split)) <= 0:
        return split.window(start, length)
    return np.concatenate([split.window(start, length - over), split.window(0, over)])


def eval_targets(split: Split, context: int, most: int = 0) -> int:
    """Tokens that an evaluation predicts: all of a split but the first, or the first
    `most` of these, rounded up to whole windows; 0 takes all.
    """
    every = len(split) - 1
    return min(every, -(-most // context) * context) if most else every


def eval_batches(
    split: Split, *, batch_size: int, context: int, most: int = 0
) -> Iterator[tuple[Int32[np.ndarray, "B _"], Float32[np.ndarray, "B L"]]]:
    """Yields `(tokens, mask)` that predict every token of the split but the first
    exactly once, in order; with `most` the first of them (`eval_targets`).

    `tokens` is int32 `[batch_size, context + 1]`: row `r` starts at the last token of
    row `r - 1`. `mask` is float32 `[batch_size, context]`: 1 where `tokens[:, 1:]` is a
    target, 0 on the padding of the last batch.

    Raises:
        ValueError: The split is shorter than one window, or a number is out of range.
    """
    _check(split, batch_size, context)
    if most < 0:
        raise ValueError(f"most must not be negative. Got {most}.")
    return _eval_batches(split, batch_size, context, eval_targets(split, context, most))


def _eval_batches(
    split: Split, batch_size: int, context: int, end: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    targets = batch_size * context
    for start in range(0, end, targets):
        real = min(targets, end - start)
        line = np.zeros(targets + 1, np.int32)
        line[: real + 1] = split.window(start, real + 1)
        tokens = np.lib.stride_tricks.sliding_window_view(line, context + 1)[
            ::context
        ].copy()
        mask = (
            (np.arange(targets) < real).astype(np.float32).reshape(batch_size, context)
        )
        yield tokens, mask


def check_context(name: str, split: Sized, context: int) -> None:
    """Raises a ValueError unless the split called `name` holds a window: `context`
    tokens and a last target.
    """
    if len(split) < context + 1:
        raise ValueError(
            f"the {name} split must have at least context + 1 = {context + 1} tokens. "
            f"Got {len(split)}: give more text, another --data.val-fraction or a shorter "
            "context."
        )


def _check(split: Split, batch_size: int, context: int) -> None:
    if batch_size < 1 or context < 1:
        raise ValueError(
            f"batch_size and context must be at least 1. Got {batch_size} and {context}."
        )
    if len(split) < context + 1:
        raise ValueError(
            f"split must have at least context + 1 = {context + 1} tokens. Got {len(split)}."
        )
