"""Batches of token windows: random ones to train on, every token once to evaluate on.

Batch `i` of a training run is a function of `(split, batch_size, context, seed, i)`
alone: the windows of all offsets are shuffled by a keyed permutation, one per pass over
the split, and batch `i` takes places `i * batch_size` onward. No worker holds a
position, so a run resumes from its step number, and every host of a group can cut its
rows from the same global batch.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float32, Int32

from trix_jax.lm.data.store import Split


def train_batches(
    split: Split,
    *,
    batch_size: int,
    context: int,
    seed: int,
    start_step: int = 0,
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
        return np.stack([split.window(int(start), context + 1) for start in starts])

    batches = _starts(split, context, seed).batch(batch_size, batch_fn=read)[
        start_step:
    ]
    options = grain.ReadOptions(threads, prefetch if threads else 0)
    return iter(batches.to_iter_dataset(options))


def batch_windows(
    split: Split, *, batch_size: int, context: int, seed: int, batch: int
) -> list[int]:
    """Where the windows of batch `batch` of `train_batches` start in the split."""
    batches = _starts(split, context, seed).batch(batch_size, batch_fn=np.array)
    return np.asarray(batches[batch]).tolist()


def _starts(split: Split, context: int, seed: int):
    import grain  # here and not above: it takes seconds, and only training needs it

    return grain.MapDataset.range(len(split) - context).seed(seed).shuffle().repeat()


def eval_batches(
    split: Split, *, batch_size: int, context: int
) -> Iterator[tuple[Int32[np.ndarray, "B _"], Float32[np.ndarray, "B L"]]]:
    """Yields `(tokens, mask)` that predict every token of the split but the first
    exactly once, in order.

    `tokens` is int32 `[batch_size, context + 1]`: row `r` starts at the last token of
    row `r - 1`. `mask` is float32 `[batch_size, context]`: 1 where `tokens[:, 1:]` is a
    target, 0 on the padding of the last batch.

    Raises:
        ValueError: The split is shorter than one window, or a number is out of range.
    """
    _check(split, batch_size, context)
    return _eval_batches(split, batch_size, context)


def _eval_batches(
    split: Split, batch_size: int, context: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    targets = batch_size * context
    for start in range(0, len(split) - 1, targets):
        real = min(targets, len(split) - 1 - start)
        line = np.zeros(targets + 1, np.int32)
        line[: real + 1] = split.window(start, real + 1)
        tokens = np.lib.stride_tricks.sliding_window_view(line, context + 1)[
            ::context
        ].copy()
        mask = (
            (np.arange(targets) < real).astype(np.float32).reshape(batch_size, context)
        )
        yield tokens, mask


def check_context(name: str, split: Split, context: int) -> None:
    """Raises a ValueError unless the split called `name` holds a window: `context`
    tokens and a last target.
    """
    if len(split) < context + 1:
        raise ValueError(
            f"the {name} split must have at least context + 1 = {context + 1} tokens. "
            f"Got {len(split)}."
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
