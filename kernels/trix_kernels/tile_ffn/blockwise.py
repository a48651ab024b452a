"""`tile_ffn` for XLA on CPUs: block after block, so that what a block needs stays in the
cache.

    for each run of blocks of one tile:  take the tile's weights, unpacked if packed
        for each block of the run:       y_m = act(x_m @ up) @ down

A batched matmul first writes a copy of a tile's weights for every block that it has, and
computes the blocks that hold nothing. Where that copy is small beside the rows it is the
faster (`suits_batches` in `xla.py`); else a tile is unpacked here once, and the loop ends
with the last block in use. The backward pass runs the same two loops, adds
up a tile's gradient beside its weights and computes the hidden layer again.

Blocks wait for each other, so cores have to share one. A product of some million
multiply-adds stays on one core; the forward pass cuts a tile's outputs into lanes, a
batched product of which XLA computes a lane a core (58 to 37 ms for 8,192 tokens, 64
packed tiles of 512 x 128, two cores). The seven products of the backward pass lose more
by it in moving arrays around than they gain (200 to 250 ms).
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from trix_kernels.tile_matmul.xla import matmul
from trix_kernels.varying import vary_like
from trix_kernels.weights import Packed, unpack

LANE = 64  # outputs that a lane has at least


class Rows(NamedTuple):
    """What the blocks hold.

    Attributes:
        x: the rows.
        tile: of each block; where blocks of one tile stand together its weights are
            decoded once.
        used: number of blocks to compute; they come first.
    """

    x: Float[Array, "M R D"]
    tile: Integer[Array, " M"]
    used: Integer[Array, "1"]


def forward(
    rows: Rows, weights: Any, shape: tuple[int, int], act: Callable
) -> Float[Array, "M R O"]:
    """Computes `act(x[m] @ up[n]) @ down[n]`, `n = tile[m]`; blocks not used are zero.

    Args:
        weights: up and down, each `Packed` or a pair `(q, scale)`.
        shape: F, the hidden width, and O.
        act: elementwise.
    """
    x = rows.x

    def run(first, tile, y):
        pair = _in_lanes(decoded(_take(weights, tile), shape))

        def block(carry):
            m, y = carry
            return m + 1, _put(y, _ffn_in_lanes(x[m], pair, act), m)

        return _while_same_tile(block, (first, y), rows, tile)

    start = jnp.zeros((*x.shape[:2], shape[1]), x.dtype)
    return _runs(run, vary_like(start, x), rows)


def backward(
    rows: Rows,
    weights: Any,
    dy: Float[Array, "M R O"],
    shape: tuple[int, int],
    act: Callable,
) -> tuple[Float[Array, "M R D"], Any]:
    """The gradient of `forward` to `x` and to the leaves of `weights`, None to words."""
    numbers, words = split(weights)

    def run(first, tile, carry):
        dx, total = carry
        own, kept = _take(numbers, tile), _take(words, tile)

        def block(carry):
            m, dx, grads = carry

            def value(x, own):
                return ffn(x, decoded(join(own, kept), shape), act)

            dx_m, more = jax.vjp(value, rows.x[m], own)[1](dy[m])
            return m + 1, _put(dx, dx_m, m), jax.tree.map(jnp.add, grads, more)

        start = first, dx, _take(total, tile)  # of an earlier run of the same tile
        m, dx, grads = _while_same_tile(block, start, rows, tile)
        total = jax.tree.map(lambda all_, one: _put(all_, one, tile), total, grads)
        return m, (dx, total)

    start = jnp.zeros_like(rows.x), jax.tree.map(jnp.zeros_like, numbers)
    return _runs(run, start, rows)


def ffn(x: Float[Array, "*B R D"], pair: Any, act: Callable) -> Float[Array, "*B R O"]:
    """Computes `act(x @ up) @ down` with `pair = ((up, scale), (down, scale))`."""
    (up, up_scale), (down, down_scale) = pair
    return matmul(act(matmul(x, up, up_scale)), down, down_scale)


def lanes(features: int) -> int:
    """Lanes that `features` outputs are cut into: a power of two, at most one a core."""
    count = 1
    while features % (2 * count) == 0 and features // (2 * count) >= LANE:
        if 2 * count > (os.cpu_count() or 1):
            break
        count *= 2
    return count


def _in_lanes(pair):
    """`(q, scale)` of one tile, cut by outputs: `[lanes, I, O / lanes]`."""

    def cut(leaf, count):
        if leaf.shape[-1] == 1:  # one scale for all outputs
            return jnp.broadcast_to(leaf, (count, *leaf.shape))
        return jnp.moveaxis(leaf.reshape(*leaf.shape[:-1], count, -1), -2, 0)

    return tuple(
        tuple(cut(leaf, lanes(weights[0].shape[-1])) for leaf in weights)
        for weights in pair
    )


def _ffn_in_lanes(x, pair, act):
    up, down = pair
    return _joined(act(_joined(x, *up)), *down)


def _joined(x, q, scale):
    """`matmul` of a block with a matrix in lanes, put side by side again."""
    y = matmul(jnp.broadcast_to(x, (q.shape[0], *x.shape)), q, scale)
    return jnp.moveaxis(y, 0, -2).reshape(x.shape[0], -1)


def decoded(weights: Any, shape: tuple[int, int]) -> Any:
    """Up and down as pairs `(q, scale)`, unpacked to `shape` outputs if packed."""
    return tuple(
        unpack(w, features) if isinstance(w, Packed) else tuple(w)
        for w, features in zip(weights, shape, strict=True)
    )


def split(tree: Any) -> tuple[Any, Any]:
    """The leaves that are real numbers, and those that are words; None elsewhere."""

    def is_number(leaf):
        return jnp.issubdtype(leaf.dtype, jnp.inexact)

    return (
        jax.tree.map(lambda leaf: leaf if is_number(leaf) else None, tree),
        jax.tree.map(lambda leaf: None if is_number(leaf) else leaf, tree),
    )


def join(numbers: Any, words: Any) -> Any:
    """The inverse of `split`."""

    def is_leaf(leaf):
        return leaf is None

    return jax.tree.map(
        lambda a, b: b if a is None else a, numbers, words, is_leaf=is_leaf
    )


def _runs(run, start, rows):
    """Calls `(first block, tile, carry) -> (block behind, carry)` for every tile in use."""

    def body(carry):
        first, rest = carry
        return run(first, rows.tile[first], rest)

    first = vary_like(jnp.zeros((), jnp.int32), rows)
    return jax.lax.while_loop(lambda c: c[0] < rows.used[0], body, (first, start))[1]


def _while_same_tile(block, start, rows, tile):
    last = rows.tile.shape[0] - 1

    def goes_on(carry):
        m = carry[0]
        return (m < rows.used[0]) & (rows.tile[jnp.minimum(m, last)] == tile)

    return jax.lax.while_loop(goes_on, block, start)


def _take(tree, at):
    return jax.tree.map(lambda leaf: leaf[at], tree)


def _put(array, part, at):
    return jax.lax.dynamic_update_index_in_dim(array, part.astype(array.dtype), at, 0)
