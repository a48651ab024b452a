"""`tile_ffn` of sets of tiles, which rows meet together:

    y = sum over n in set s of act(x @ up_n) @ down_n = act(x @ up_s) @ down_s

where `up_s` `[D, K F]` has the set's K tiles side by side and `down_s` `[K F, D]` one below
the other. A row goes to one wide tile, once, in place of K narrow ones, and what is
copied are weights, as often as tiles are in sets.

    CPUs    for some blocks at a time, as long as there are any in use:
                put the weights of their sets side by side
                y_m = act(x_m @ up_s) @ down_s, a batched product

so that these weights stay in the cache, all cores have a block, and nothing is done for
blocks that hold nothing. The backward pass runs the same loop, and adds a set's gradients
to those of its tiles. Elsewhere, and under `vmap`, all blocks are one batch.

On two CPU cores (AMD EPYC, jax 0.12.0.1) a layer of 96 tiles of D / 4, eleven a token,
forward and backward, takes tile by tile and in 64 sets, in milliseconds (`T, D`): 8 and 3
(2048, 64), 15 and 8 (2048, 128), 51 and 20 (8192, 128), 115 and 81 (8192, 256). Its
temporary memory falls from 37, 82, 265 and 583 MB to 6, 16, 24 and 49.
"""

import functools
import operator
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from trix_kernels.derivatives import linear_map, with_backward
from trix_kernels.grouped_matmul.products import summed
from trix_kernels.tile_ffn.blockwise import Rows
from trix_kernels.tile_ffn.xla import loop_unless_vmapped
from trix_kernels.varying import vary_alike, vary_like

BLOCKS = 16  # at a time
CACHE = 1 << 23  # bytes that the weights of these blocks may take


class Members(NamedTuple):
    """Which tiles are in which sets.

    Attributes:
        tiles: of each set, no tile twice.
        places: `s * K + k` of each set s that a tile is the k-th of; S * K marks none.
    """

    tiles: Integer[Array, "S K"]
    places: Integer[Array, "N P"]


class Joined(NamedTuple):
    """The weights of tiles, or of sets; a row for each hidden neuron."""

    up: Float[Array, "N F D"]
    down: Float[Array, "N F O"]


def sets_ffn(
    rows: Rows,
    up: Float[Array, "N D F"],
    down: Float[Array, "N F O"],
    members: Members,
    act: Callable,
) -> Float[Array, "M R O"]:
    """Computes `sum_n act(x[m] @ up[n]) @ down[n]` over the tiles n of set `tile[m]`.

    Products are of numbers in the dtype of `x`, summed in float32 and rounded to it.
    Gradients of weights are float32 sums.

    Args:
        rows: with sets for tiles. Blocks that are not used, and rows that hold nothing,
            are zero.
        act: elementwise, one object for one function.
    """
    weights = Joined(jnp.swapaxes(up, 1, 2), down)
    rows, weights, members = vary_alike((rows, weights, members))
    fixed = rows.tile, rows.used, members
    return _differentiable(act)((rows.x, weights), fixed)


def join(
    up: Float[Array, "N D F"], down: Float[Array, "N F D"], members: Members
) -> tuple[Float[Array, "S D W"], Float[Array, "S W D"]]:
    """The weights of each set as those of one tile, `W = K F` wide."""
    joined = _joined(Joined(jnp.swapaxes(up, 1, 2), down), members)
    return jnp.swapaxes(joined.up, 1, 2), joined.down


@lru_cache(256)
def _differentiable(act):
    """One object for one function, so that calls outside of `jit` compile once."""
    run = with_backward(partial(_forward, act), partial(_backward, act))
    return jax.jit(run, inline=True)


def _forward(act, inputs, fixed):
    loop, batched = partial(_loop, act), partial(_batched, act)
    if inputs[0].shape[0] == 0:
        return batched(inputs, fixed)
    cpu = loop_unless_vmapped(loop, batched)
    return jax.lax.platform_dependent(inputs, fixed, cpu=cpu, default=batched)


def _backward(act, primals, dy):
    inputs, fixed = primals

    def loop(given, fixed):
        inputs, dy = given
        return _loop_back(act, inputs, dy, fixed)

    def batched(given, fixed):
        inputs, dy = given
        return jax.vjp(lambda inputs: _batched(act, inputs, fixed), inputs)[1](dy)[0]

    if inputs[0].shape[0] == 0:
        return batched((inputs, dy), fixed)
    cpu = loop_unless_vmapped(loop, batched)
    return jax.lax.platform_dependent((inputs, dy), fixed, cpu=cpu, default=batched)


def _batched(act, inputs, fixed):
    x, weights = inputs
    tile, _, members = fixed
    own = jax.tree.map(lambda w: w[tile], _joined(weights, members))
    return _ffn(act, x, own)


def _loop(act, inputs, fixed):
    x, weights = inputs
    members, count = fixed[2], _at_a_time(inputs, fixed)

    def step(m, y):
        own = _of_blocks(weights, members, _some(sets, m, count))
        return _put(y, _ffn(act, _some(blocks, m, count), own), m)

    blocks, sets = _whole((x, fixed[0]), count)
    start = jnp.zeros((*blocks.shape[:2], weights.down.shape[-1]), x.dtype)
    return _steps(step, vary_like(start, inputs), fixed, count)[: x.shape[0]]


def _loop_back(act, inputs, dy, fixed):
    x, weights = inputs
    members, count = fixed[2], _at_a_time(inputs, fixed)

    def step(m, carry):
        dx, total = carry
        chosen = _some(sets, m, count)
        own = _of_blocks(weights, members, chosen)
        rows = _some(blocks, m, count), _some(dy_blocks, m, count)
        dx_m, grads = _gradients(act, *rows, own)

        def add(total, grad):
            to = members.tiles[chosen].reshape(-1)
            return total.at[to].add(grad.reshape(to.size, *total.shape[1:]))

        return _put(dx, dx_m, m), jax.tree.map(add, total, grads)

    blocks, dy_blocks, sets = _whole((x, dy, fixed[0]), count)
    start = jnp.zeros_like(blocks), jax.tree.map(_no_gradient, weights)
    start = vary_like(start, (inputs, dy))
    dx, total = _steps(step, start, fixed, count)
    total = jax.tree.map(lambda grad, w: grad.astype(w.dtype), total, weights)
    return dx[: x.shape[0]], total


def _at_a_time(inputs, fixed):
    """Blocks of a step."""
    x, weights = inputs
    row = sum(w.shape[1] * w.shape[2] * x.dtype.itemsize for w in weights)
    return max(1, min(BLOCKS, CACHE // (row * fixed[2].tiles.shape[1]), x.shape[0]))


def _whole(arrays, count):
    """Arrays of blocks with zeros behind, so that steps come out even."""

    def fill(array):
        more = [(0, -array.shape[0] % count), *[(0, 0)] * (array.ndim - 1)]
        return jnp.pad(array, more)

    return jax.tree.map(fill, arrays)


def _steps(step, start, fixed, count):
    """Calls `(first block, carry) -> carry` as long as blocks are in use."""
    _, used, _ = fixed

    def body(carry):
        m, rest = carry
        return m + count, step(m, rest)

    first = vary_like(jnp.zeros((), jnp.int32), fixed)
    return jax.lax.while_loop(lambda c: c[0] < used[0], body, (first, start))[1]


def _some(array, first, count):
    return jax.lax.dynamic_slice_in_dim(array, first, count)


def _put(array, part, first):
    return jax.lax.dynamic_update_slice_in_dim(array, part, first, 0)


def _of_blocks(weights, members, sets):
    """The weights of the set of each block, its tiles one below the other."""
    tiles = members.tiles[sets]
    return jax.tree.map(lambda w: _below(w[tiles]), weights)


def _below(w):
    """`[B, K, F, D]` to `[B, K F, D]`."""
    return w.reshape(w.shape[0], -1, w.shape[-1])


def _joined(weights, members):
    """The weights of every set."""
    maps = _copy, _sum_copies, members
    return jax.tree.map(lambda w: _below(linear_map(*maps, w)), weights)


def _copy(members, w):
    return _at(w, members.tiles)


def _sum_copies(members, dw):
    """The sum over the sets that a tile is in, in their order."""
    dw = dw.reshape(-1, *dw.shape[2:])
    reads = (_at(dw, places) for places in jnp.swapaxes(members.places, 0, 1))
    return functools.reduce(operator.add, reads)


def _at(x, index):
    """`x[index]`, zero past the end."""
    return x.at[index].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def _ffn(act, x, own):
    return _product(act(_product(x, _turned(own.up))), own.down)


def _gradients(act, x, dy, own):
    """Of blocks to their rows and to the weights of their sets."""
    h = _product(x, _turned(own.up))
    a, act_back = jax.vjp(act, h)
    (dh,) = act_back(_product(dy, _turned(own.down)))
    return _product(dh, own.up), Joined(_outer(dh, x), _outer(a, dy))


def _product(x, w):
    y = jnp.matmul(x, w.astype(x.dtype), preferred_element_type=summed(x.dtype))
    return y.astype(x.dtype)


def _outer(x, dy):
    """`x.T @ dy` of a matrix that is transposed before, see `grouped_matmul.xla`."""
    x = jax.lax.optimization_barrier(_turned(x))
    return jnp.matmul(x, dy, preferred_element_type=summed(x.dtype))


def _turned(x):
    return jnp.swapaxes(x, -1, -2)


def _no_gradient(w):
    return jnp.zeros(w.shape, summed(w.dtype))
