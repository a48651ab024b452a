"""Even loads without an auxiliary loss: how far a tile's selection bias must move to
receive its share of the tokens.

    threshold_tn = the score tile n must pass to be chosen by token t: the K-th best of
    the others
    margin_tn    = threshold_tn - (score_tn + bias_n)         negative where n is chosen
    shift_n      = the share-quantile of margin_n over the tokens
    bias        <- bias + rate * shift, centred

A bias that moves by a fixed small step (Wang et al., 2024) cannot follow signatures
read off weights that move quickly; the quantile says at once how far to go. Margins are
kept as histograms, so that micro-batches and devices simply add up.

References:
    Wang et al., 2024, "Auxiliary-Loss-Free Load Balancing Strategy for
    Mixture-of-Experts", https://arxiv.org/abs/2408.15664. Sun, 2025,
    "Binary-Integer-Programming Based Algorithm for Expert Load Balancing in
    Mixture-of-Experts Models", https://arxiv.org/abs/2502.15451 (thresholds and
    quantiles as the duals of an assignment).
"""

import jax.numpy as jnp

from trix_jax.typing import Array, Bool, Float, Integer, Scalar

BINS = 64
REACH = 1.0  # the largest shift that one histogram can ask for, in units of the score
CHOSEN = BINS // 2  # bins below this one hold the tokens that chose the tile


def margin_histogram(
    biased: Float[Array, "T S"],
    chosen: Integer[Array, "T K"],
    mask: Bool[Array, " T"] | None = None,
    tiles: Integer[Array, "T S"] | None = None,
    num_tiles: int | None = None,
) -> Float[Array, "N bins"]:
    """Counts the margins of every tile in `BINS` bins over `-REACH..REACH`; what lies
    outside is in the last bins.

    Args:
        biased: scores with the bias; `-inf` where a token may not choose the tile,
            which is then not counted; nor are NaN.
        chosen: the columns of `biased` that the tokens chose.
        mask: False for tokens that are not counted.
        tiles: which tile each column is of, where tokens have scores of some alone; None
            has those of all, in order.
        num_tiles: N; None has as many columns.
    """
    columns = jnp.arange(biased.shape[-1])[None]
    is_chosen = (chosen[:, :, None] == columns[None]).any(axis=1)
    # Not by top_k: where only its values are used, XLA sorts on CPUs (50 times slower).
    last = jnp.take_along_axis(biased, chosen, axis=-1).min(axis=-1, keepdims=True)
    after = jnp.where(is_chosen, -jnp.inf, biased).max(axis=-1, keepdims=True)
    margin = jnp.where(is_chosen, after, last) - biased
    counted = (biased > -jnp.inf) & ~jnp.isnan(margin)
    if mask is not None:
        counted &= mask[:, None]
    bins = jnp.floor((jnp.where(counted, margin, 0) / REACH + 1) * CHOSEN)
    low, high = (
        jnp.where(is_chosen, 0, CHOSEN),
        jnp.where(is_chosen, CHOSEN - 1, BINS - 1),
    )
    bins = jnp.clip(bins, low, high).astype(jnp.int32)
    empty = jnp.zeros((num_tiles or biased.shape[-1], BINS))
    rows = columns if tiles is None else tiles
    return empty.at[rows, bins].add(counted.astype(jnp.float32))


def loads(margins: Float[Array, "*B N bins"]) -> Float[Array, "*B N"]:
    """Tokens that chose each tile."""
    return margins[..., :CHOSEN].sum(axis=-1)


def step_bias(
    bias: Float[Array, "*B N"],
    margins: Float[Array, "*B N bins"],
    rate: Scalar,
    load: Float[Array, "*B N"] | None = None,
) -> Float[Array, "*B N"]:
    """Moves biases by `rate` times the shift that gives each tile `load` tokens (None:
    the mean), and centres them. A tile that is to get none shifts by 0.
    """
    if load is None:
        load = loads(margins)
        load = jnp.broadcast_to(load.mean(axis=-1, keepdims=True), load.shape)
    bias = bias + rate * _shift(margins, load)
    return bias - bias.mean(axis=-1, keepdims=True)


def _shift(margins, load):
    """The margin below which `load` tokens lie, by interpolation inside a bin."""
    below = jnp.cumsum(margins, axis=-1)
    reached = below >= load[..., None]
    first = jnp.argmax(reached, axis=-1, keepdims=True)
    inside = jnp.take_along_axis(margins, first, axis=-1)[..., 0]
    before = jnp.take_along_axis(below, first, axis=-1)[..., 0] - inside
    edge = first[..., 0].astype(load.dtype) + (load - before) / jnp.maximum(inside, 1)
    shift = jnp.where(reached[..., -1], (edge / CHOSEN - 1) * REACH, REACH)
    return jnp.where(load > 0, shift, 0)  # below no margin lie no tokens
