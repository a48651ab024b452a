"""Tokens to tile-sorted blocks and back, with static shapes and nothing dropped.

The A = T * K assignments are sorted by tile and each tile's run is padded to whole
blocks of R rows, so that every block belongs to one tile. However the tokens are
routed, `floor((A + N (R - 1)) / R)` blocks are enough: the shapes do not depend on the
routing, one trace serves all of it, and a tile may take every token or none.

A plan is one sort, one scatter of A numbers, and counts and sums of a number a tile or
a block: no loop, which on a GPU would start its kernels anew for every step.

The moves are gathers both ways, forward and backward: the transpose of `to_blocks` is
`sum_from_blocks`, that of `from_blocks` puts every assignment back into its row.

References:
    Gale et al., 2022, "MegaBlocks: Efficient Sparse Training with Mixture-of-Experts",
    https://arxiv.org/abs/2211.15841.
"""

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trix_jax.compiled import together
from trix_jax.ops import linear_map, vary_alike
from trix_jax.typing import Array, Bool, Float, Integer

READS = 16  # of a sum that are written out
SYMBOLIC_ROWS = 32  # rows in a block where the number of tokens is not known


class Plan(NamedTuple):
    """Where every assignment goes.

    Attributes:
        block_tile: the tile of each block (any tile for an unused block, whose rows are
            zero).
        source: the assignment `t * K + k` in each row of the blocks; A marks padding.
        slot: the row of each assignment, the inverse of `source`; 0 for those of masked
            tokens, which have no row.
        used: number of blocks that hold assignments; the others come last.
    """

    block_tile: Integer[Array, " M"]
    source: Integer[Array, "M R"]
    slot: Integer[Array, "T K"]
    used: Integer[Array, "1"]


def block_rows(assignments: Any, num_tiles: int) -> int:
    """Rows in a block: half a tile's mean load, but 32 where the load allows it, a power
    of two from 1 to 128.

    Larger blocks hold more padding, smaller ones load a tile's weights more often. On
    two CPU cores (AMD EPYC 7003, jax 0.12.0.1) a frozen forward pass of T=8192, D=512,
    N=64, F=128 takes 125, 138, 156 ms of processor time in blocks of 32, 64, 128 rows,
    forward and backward 395, 382, 426 ms. A symbolic number of assignments
    (`jax.export`) takes 32.
    """
    if not isinstance(assignments, int):
        return SYMBOLIC_ROWS
    load = np.floor(np.log2(max(assignments, 1) / num_tiles))
    return int(2 ** np.clip(np.maximum(load - 1, np.minimum(load, 5)), 0, 7))


def num_blocks(assignments: Any, num_tiles: int, rows: int) -> Any:
    """The most blocks that any routing needs: the largest possible sum of `ceil(count_n
    / rows)`.
    """
    blocks = (assignments + num_tiles * (rows - 1)) // rows
    return min(assignments, blocks) if isinstance(assignments, int) else blocks


@together("num_tiles", "rows")
def make_plan(
    tiles: Integer[Array, "T K"],
    num_tiles: int,
    rows: int | None = None,
    mask: Bool[Array, " T"] | None = None,
) -> Plan:
    """Sorts assignments by tile, in token order within a tile, into blocks of `rows`
    rows.

    Args:
        tiles: the chosen tiles, each in 0..N-1.
        num_tiles: N, the tiles of the layer.
        rows: rows in a block; None takes `block_rows`.
        mask: False for tokens that take no room. `from_blocks` and the sums
            then read what another token has for them: take it out.
    """
    assignments = tiles.size
    rows = rows or block_rows(assignments, num_tiles)
    blocks = num_blocks(assignments, num_tiles, rows)
    if (
        assignments == rows == 1 and mask is None
    ):  # one token decoded: there is nothing to sort
        zero = jnp.zeros((1, 1), jnp.int32)
        return Plan(tiles.reshape(1).astype(jnp.int32), zero, zero, zero[0] + 1)
    counts_N = count_tiles(tiles, num_tiles, mask)
    first_N = jnp.cumsum(counts_N, dtype=jnp.int32) - counts_N
    blocks_N = (counts_N + rows - 1) // rows
    last_block_N = jnp.cumsum(blocks_N, dtype=jnp.int32)
    first_row_N = (last_block_N - blocks_N) * rows
    if mask is not None:
        tiles = jnp.where(mask[:, None], tiles, num_tiles)  # behind all others
    flat = tiles.reshape(-1).astype(jnp.int32)
    places = jnp.arange(assignments, dtype=jnp.int32)
    sorted_tile, order = jax.lax.sort((flat, places), num_keys=1, is_stable=True)
    sorted_slot = _at(first_row_N - first_N, sorted_tile) + places
    if mask is not None:
        sorted_slot = jnp.where(sorted_tile < num_tiles, sorted_slot, 0)
    slot = jnp.zeros_like(order).at[order]
    slot = slot.set(sorted_slot, unique_indices=True, wrap_negative_indices=False)
    tile = _block_tile(last_block_N, blocks)
    row_MR = jnp.arange(blocks * rows, dtype=jnp.int32).reshape(blocks, rows)
    place_MR = row_MR - _at(first_row_N, tile)[:, None]
    is_real = place_MR < _at(counts_N, tile)[:, None]
    source = _at(order, _at(first_N, tile)[:, None] + place_MR)
    source = jnp.where(is_real, source, assignments)
    return Plan(tile, source, slot.reshape(tiles.shape), last_block_N[-1:])


@together("num_tiles")
def count_tiles(
    tiles: Integer[Array, "T K"],
    num_tiles: int,
    mask: Bool[Array, " T"] | None = None,
) -> Integer[Array, " N"]:
    """Assignments of each tile, those of masked tokens (False) left out."""
    if mask is not None:
        tiles = jnp.where(mask[:, None], tiles, num_tiles)  # dropped
    flat = tiles.reshape(-1).astype(jnp.int32)
    return _count(flat, num_tiles)


def _count(numbers, end):
    """How often each of 0..end-1 is there; other numbers are dropped."""
    zeros = jnp.zeros(end, jnp.int32)
    return zeros.at[numbers].add(1, mode="drop", wrap_negative_indices=False)


def _at(x, index):
    """`x[index]`, the last element for an index past the end."""
    return x.at[index].get(mode="clip", wrap_negative_indices=False)


def _block_tile(last_block_N, blocks):
    """The tile of each block, from the number of blocks up to the end of each tile's:
    how many tiles have ended.
    """
    ended = jnp.cumsum(_count(last_block_N, blocks), dtype=jnp.int32)
    return jnp.minimum(ended, last_block_N.size - 1)


def to_blocks(x: Float[Array, "T D"], plan: Plan) -> Float[Array, "M R D"]:
    """Copies every token to the row of each of its assignments; padding rows are zero."""
    x, plan = vary_alike((x, plan))
    return linear_map(_copy, _sum_copies, plan, x)


def from_blocks(y: Float[Array, "M R D"], plan: Plan) -> Float[Array, "T K D"]:
    """Reads every assignment's row back into token order: the exact inverse
    permutation.
    """
    y, plan = vary_alike((y, plan))
    return linear_map(_read, _put_back, plan, y)


def sum_from_blocks(y: Float[Array, "M R D"], plan: Plan) -> Float[Array, "T D"]:
    """The sum over every token's assignments: the transpose of `to_blocks`."""
    y, plan = vary_alike((y, plan))
    return linear_map(_sum_copies, _copy, plan, y)


def gated_sum(
    y: Float[Array, "M R D"], gates: Float[Array, "T K"], plan: Plan
) -> Float[Array, "T D"]:
    """Computes `sum_k gates[t, k] * y[slot[t, k]]`: the gated sum of `from_blocks`, in
    the wider dtype of the two.
    """
    y, gates, plan = vary_alike((y, gates, plan))
    return linear_map(_sum_read, _gated_copies(y.dtype), (plan, gates), y)


def numbers_to_blocks(x: Float[Array, "T K"], plan: Plan) -> Float[Array, "M R"]:
    """The number of every assignment in its row; 0 in padding rows."""
    x, plan = vary_alike((x, plan))
    return linear_map(_place, _collect, plan, x)


def numbers_from_blocks(x: Float[Array, "M R"], plan: Plan) -> Float[Array, "T K"]:
    """The number in every assignment's row, the inverse of `numbers_to_blocks`."""
    x, plan = vary_alike((x, plan))
    return linear_map(_collect, _place, plan, x)


def _place(plan, x):
    return _rows(x.reshape(-1), plan.source)


def _collect(plan, x):
    return _at(x.reshape(-1), plan.slot)


def _copy(plan, x):
    return _rows(x, plan.source // plan.slot.shape[-1])


def _sum_copies(plan, dy):
    wide = jnp.promote_types(dy.dtype, jnp.float32)
    return _sum_read((plan, jnp.ones((), wide)), dy).astype(dy.dtype)


@functools.lru_cache
def _gated_copies(dtype):
    def copies(fixed, dy):
        plan, gates = fixed
        return _put_back(plan, (dy[:, None] * gates[..., None]).astype(dtype))

    return copies


def _sum_read(fixed, y):
    """The sum over k of what y has for every token's k-th assignment, gated. On CPUs up to
    `READS` are read one after the other: for a sum over an axis XLA would write all of
    them first (1.3 and 0.3 ms for `T=2048, K=11, D=128`, two cores).
    """
    if fixed[0].slot.shape[1] > READS:
        return _sum_at_once(fixed, y)
    return jax.lax.platform_dependent(
        fixed, y, cpu=_sum_one_by_one, default=_sum_at_once
    )


def _sum_one_by_one(fixed, y):
    plan, gates = fixed
    y, gates = y.reshape(-1, y.shape[-1]), jnp.broadcast_to(gates, plan.slot.shape)
    reads = range(plan.slot.shape[1])
    parts = (_at(y, plan.slot[:, k]) * gates[:, k, None] for k in reads)
    return functools.reduce(operator.add, parts)


def _sum_at_once(fixed, y):
    plan, gates = fixed
    gates = jnp.broadcast_to(gates, plan.slot.shape)
    return (_read(plan, y) * gates[..., None]).sum(axis=1)


def _read(plan, y):
    return _at(y.reshape(-1, y.shape[-1]), plan.slot)


def _put_back(plan, dy):
    return _rows(dy.reshape(-1, dy.shape[-1]), plan.source)


def _rows(x_AD, source):
    """Rows of `x` by index, zero where the index is past the end."""
    rows = x_AD.at[source]
    return rows.get(mode="fill", fill_value=0, wrap_negative_indices=False)
