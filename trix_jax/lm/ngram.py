"""N-gram language models as floors: what counting alone achieves on the same split."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Integer

from trix_jax.lm.data import Store

ORDERS = (1, 2, 3, 4, 5)
COUNTED = 2_000_000  # tokens of a split that a page counts, or scores: seconds


def floors(
    store: Store,
    orders: Sequence[int] = ORDERS,
    most: int | None = None,
    scored: int | None = None,
) -> dict[int, float]:
    """`ngram_losses` of a token store: order to nats per token of its validation split.

    Args:
        store: counted and scored.
        orders: lengths n.
        most: training tokens that are counted, from the first; None counts all.
        scored: validation tokens that are scored, from the second, as in an evaluation;
            None scores all.
    """
    train = store.train.window(0, min(len(store.train), most or len(store.train)))
    val = store.val.window(0, min(len(store.val), (scored or len(store.val)) + 1))
    return ngram_losses(train, val, orders, store.tokenizer.vocab_size)


def ngram_losses(
    train: Integer[np.ndarray, " T"],
    val: Integer[np.ndarray, " S"],
    orders: Sequence[int] = ORDERS,
    vocab_size: int | None = None,
) -> dict[int, float]:
    """Nats per token, `mean(-log p_n(val[i] | val[i-n+1 : i]))` over `i >= 1`, of
    interpolated Witten-Bell n-gram models.

    With `c(h w)` the times the tokens `h w` follow each other in `train`, `c(h)` their
    sum over `w`, and `t(h)` the number of distinct `w` after `h`,

        p_n(w | h) = (c(h w) + t(h) * p_{n-1}(w | h without its first token)) / (c(h) + t(h)),    p_0(w) = 1 / vocab_size,

    and `p_n = p_{n-1}` where `h` was never seen or would reach before the start of
    `val`.

    Args:
        train: Tokens to count.
        val: Tokens to score, all but the first, which is only context.
        orders: Lengths n to report; 1 is the unigram.
        vocab_size: Number of ids. None: the distinct ones of `train` and `val`.

    Returns:
        Order to loss.

    Raises:
        ValueError: There is nothing to count or score, or an order is below 1.

    References:
        Witten and Bell, 1991, The zero-frequency problem,
        https://doi.org/10.1109/18.87000; interpolated as in Chen and Goodman, 1998,
        section 2.5, https://dash.harvard.edu/handle/1/25104739.
    """
    if len(train) < 1 or len(val) < 2 or not orders or min(orders) < 1:
        raise ValueError(
            "train must have a token, val two, and orders numbers from 1 up. "
            f"Got {len(train)} tokens, {len(val)} tokens, orders={tuple(orders)}."
        )
    # Ids become dense, so that a context and a token make one 64-bit key.
    ids, inverse = np.unique(np.concatenate([train, val]), return_inverse=True)
    train, val, width = inverse[: len(train)], inverse[len(train) :], len(ids)
    p = np.full(len(val), 1 / (vocab_size or width))
    train_contexts, val_contexts = (
        np.zeros(len(train), np.int64),
        np.zeros(len(val), np.int64),
    )
    losses = {}
    for order in range(1, max(orders) + 1):
        # Entry i: the id of the order - 1 tokens before token i + order - 1; in val, -1
        # for one that train does not have.
        keys, train_grams, counts = np.unique(
            train_contexts * width + train[order - 1 :],
            return_inverse=True,
            return_counts=True,
        )
        val_grams = _index(keys, val_contexts * width + val[order - 1 :])
        p[order - 1 :] = _interpolate(
            p[order - 1 :], keys // width, counts, val_contexts, val_grams
        )
        losses[order] = float(-np.log(p[1:]).mean())
        train_contexts, val_contexts = train_grams[:-1], val_grams[:-1]
    return {order: losses[order] for order in orders}


def _interpolate(
    lower: np.ndarray,
    contexts: np.ndarray,
    counts: np.ndarray,
    val_contexts: np.ndarray,
    val_grams: np.ndarray,
) -> np.ndarray:
    """`(c(h w) + t(h) * lower) / (c(h) + t(h))`, or `lower` where the context is
    unseen; `contexts` is the one of each gram.
    """
    if not len(counts):
        return lower
    size = (
        int(contexts.max()) + 2
    )  # one more, always zero, for a context seen only at the end of train
    total = np.bincount(contexts, counts, size)
    kinds = np.bincount(contexts, minlength=size)
    seen = np.minimum(val_contexts, size - 1)
    hits = np.where(val_grams < 0, 0, counts[val_grams])
    unseen = (seen < 0) | (total[seen] == 0)
    return np.where(
        unseen,
        lower,
        (hits + kinds[seen] * lower) / np.where(unseen, 1, total[seen] + kinds[seen]),
    )


def _index(ordered: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Position of each value in an ordered array, -1 where it is not there."""
    if not len(ordered):
        return np.full(len(values), -1)
    places = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return np.where(ordered[places] == values, places, -1)
