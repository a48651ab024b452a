"""Tiles spread over devices: routed tokens travel to the devices that hold their tiles
and back, nothing dropped.

The N tiles lie in order on the t devices of a mesh axis, N / t on each, and every
device routes tokens of its own. An all-to-all has one static shape, but a routing may
send all of a device's A = T * K assignments to one device. Buffers for that worst case
would hold, and compute, t A rows. Instead tokens travel in rounds:

    c      = ceil(SLACK * A / t)                  rows a device sends to each in a round
    rounds = ceil(most(source, destination) / c)  counted as the program runs, at most t

so that buffers hold t c = SLACK * A rows whatever the routing, one round is enough
where loads are even, and uneven ones cost time, not tokens. The backward pass runs the
rounds anew: nothing of a round is kept. (`jax.lax.ragged_all_to_all` would save the
empty rows, but its result has the worst case's static size, and XLA has none for CPUs.)

Inside `jax.shard_map(..., check_vma=False)`, on a mesh ("data", "tile"):

    layer = SparseTriXFFN(512, axis_name=("data", "tile"), tile_axis="tile")
    cut = specs(params, "tile")    # how parameters and gradients go in and out
    grads = mean_gradients(grads, cut, ("data", "tile"))

References:
    Lepikhin et al., 2020, "GShard", https://arxiv.org/abs/2006.16668 (experts over
    devices, all-to-all); it drops what does not fit.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from trix_jax.ops import linear_map, vary_alike, vary_like, with_backward
from trix_jax.typing import Array, Bool, Float, Integer

SLACK = 1.25  # rows of a round over those of an even load

Compute = Callable[
    [Float[Array, "T D"], Integer[Array, "T K"], Any], Float[Array, "T K D"]
]


class Queue(NamedTuple):
    """The device of every assignment's tile, the tile's number there, its place (from
    0) among those that go to the same device, and the rounds that the axis needs.
    """

    device: Integer[Array, " A"]
    tile: Integer[Array, " A"]
    place: Integer[Array, " A"]
    rounds: Integer[Array, ""]


def rows_a_round(assignments: int, devices: int) -> int:
    """Rows that one device sends to another in a round (c)."""
    return min(assignments, math.ceil(SLACK * assignments / devices))


def route_tiles(
    compute: Compute,
    x: Float[Array, "T D"],
    tiles: Integer[Array, "T K"],
    weights: Any,
    num_tiles: int,
    axis_name: str,
    mask: Bool[Array, " T"] | None = None,
) -> Float[Array, "T K D"]:
    """Computes tile `tiles[t, k]` of token `x[t]`, wherever on the axis it is.

    Args:
        compute: `(x, tiles, weights)` to the output of each assignment, for the tiles
            of this device, which it counts from 0.
        tiles: each in 0..N-1.
        weights: of this device's tiles.
        num_tiles: N, a multiple of the axis's devices.
        axis_name: the mesh axis that the tiles are spread over.
        mask: False for tokens that stay at home; their outputs are 0.
    """
    if mask is not None:
        tiles = jnp.where(mask[:, None], tiles, num_tiles)
    queue = line_up(tiles.reshape(-1), num_tiles, axis_name)
    one_round = partial(_round, compute, axis_name, tiles.shape[-1])
    x, weights, tiles = vary_alike((x, weights, tiles))
    sum_rounds = with_backward(
        partial(_sum_rounds, one_round), partial(_sum_rounds_back, one_round)
    )
    return sum_rounds((x, weights), queue).reshape(*tiles.shape, -1)


def line_up(flat_A: Integer[Array, " A"], num_tiles: int, axis_name: str) -> Queue:
    """Every assignment's place in the queue to the device of its tile; a tile past the
    last is nobody's, and its turn never comes.
    """
    devices, count = jax.lax.axis_size(axis_name), flat_A.size
    device, tile = jnp.divmod(flat_A.astype(jnp.int32), num_tiles // devices)
    load = jnp.bincount(device, length=devices)
    order = jnp.argsort(flat_A, stable=True)
    first = (jnp.cumsum(load) - load)[device[order]]
    place = jnp.arange(count, dtype=jnp.int32) - first.astype(jnp.int32)
    place = jnp.zeros(count, jnp.int32).at[order].set(place, unique_indices=True)
    place = jnp.where(device < devices, place, devices * count)
    rounds = -(-load.max().astype(jnp.int32) // rows_a_round(count, devices))
    return Queue(device, tile, place, jax.lax.pmax(rounds, axis_name))


def _round(compute, axis_name, k, number, x, weights, queue: Queue):
    """Outputs of the assignments whose turn it is, 0 for the others."""
    devices, count = jax.lax.axis_size(axis_name), queue.place.size
    rows = rows_a_round(count, devices)
    turn, place = jnp.divmod(queue.place, rows)
    slot = jnp.where(turn == number, queue.device * rows + place, devices * rows)
    source = jnp.full(devices * rows, count, jnp.int32)
    source = source.at[slot].set(jnp.arange(count, dtype=jnp.int32), mode="drop")

    def exchange(rows_RD):
        by_device = rows_RD.reshape(devices, rows, *rows_RD.shape[1:])
        moved = jax.lax.all_to_all(by_device, axis_name, 0, 0, tiled=True)
        return moved.reshape(rows_RD.shape)

    x_A = jnp.repeat(x, k, axis=0)
    received = exchange(_move(source, slot, x_A))
    # An empty row is 0 and goes to tile 0; its output is never read.
    tiles = exchange(queue.tile.at[source].get(mode="fill", fill_value=0))
    y = compute(received, tiles[:, None], weights)[:, 0]
    return _move(slot, source, exchange(y))


def _move(there, back, x_AD):
    """Rows `there` of `x`, 0 where the index is past the end; `back` is the inverse."""
    return linear_map(_rows_there, _rows_back, (there, back), x_AD)


def _rows_there(ends, x_AD):
    return x_AD.at[ends[0]].get(mode="fill", fill_value=0)


def _rows_back(ends, dy):
    return _rows_there(ends[::-1], dy)


def _sum_rounds(one_round, inputs, queue: Queue):
    x, weights = inputs
    start = vary_like(jnp.zeros((queue.place.size, x.shape[-1]), x.dtype), x)

    def add(i, y):
        return y + one_round(i, x, weights, queue)

    return jax.lax.fori_loop(0, queue.rounds, add, start)


def _sum_rounds_back(one_round, kept, dy):
    inputs, queue = kept

    def add(i, total):
        _, pull = jax.vjp(lambda *of: one_round(i, *of, queue), *inputs)
        return jax.tree.map(jnp.add, total, pull(dy))

    start = jax.tree.map(jnp.zeros_like, inputs)
    return jax.lax.fori_loop(0, queue.rounds, add, start)


def specs(tree: Any, axis_name: str) -> Any:
    """How the variables of layers, or an optimizer's state of them, lie on a mesh: the
    weights of tiles are cut along their first axis, all else is whole everywhere.
    """

    def spec(path, _):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        has_tiles = "tiles/up/" in name or "tiles/down/" in name
        return P(axis_name) if has_tiles else P()

    return jax.tree_util.tree_map_with_path(spec, tree)


def mean_gradients(grads: Any, specs: Any, axis_names: Sequence[str]) -> Any:
    """Gradients of the mean loss over all devices, from those of each device's own.

    What is whole everywhere is averaged. What is cut along an axis has met the tokens
    of all its devices already, so it is only divided by their number.
    """

    def mean(grad, spec):
        cut = axes_of(spec)
        rest = tuple(name for name in axis_names if name not in cut)
        grad = jax.lax.pmean(grad, rest) if rest else grad
        return grad / math.prod(map(jax.lax.axis_size, cut)) if cut else grad

    return jax.tree.map(mean, grads, specs)


def global_norm(tree: Any, specs: Any) -> Float[Array, ""]:
    """Computes `sqrt(sum of squares)` of arrays of which each device has its part."""
    squares: dict[tuple[str, ...], list] = {}
    for leaf, spec in zip(jax.tree.leaves(tree), jax.tree.leaves(specs), strict=True):
        squares.setdefault(axes_of(spec), []).append(jnp.sum(jnp.square(leaf)))
    sums = {cut: sum(of) for cut, of in squares.items()}
    return jnp.sqrt(sum(jax.lax.psum(s, cut) if cut else s for cut, s in sums.items()))


def axes_of(spec: P) -> tuple[str, ...]:
    """The mesh axes that an array is cut along."""
    names = (n if isinstance(n, tuple) else (n,) for n in spec if n is not None)
    return tuple(name for group in names for name in group)
