"""Tokens to tile-sorted blocks and back, with static shapes and nothing dropped.

The A = T * K assignments are sorted by tile and each tile's run is padded to whole
blocks of R rows, so that every block belongs to one tile. However the tokens are
routed, `floor((A + N (R - 1)) / R)` blocks are enough: the shapes do not depend on the
routing, one trace serves all of it, and a tile may take every token or none.

The moves are gathers both ways, forward and backward: `to_blocks` and `from_blocks` are
each other's transpose.

References:
    Gale et al., 2022, "MegaBlocks: Efficient Sparse Training with Mixture-of-Experts",
    https://arxiv.org/abs/2211.15841.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from trix_jax.ops import linear_map, vary_alike
from trix_jax.typing import Array, Bool, Float, Integer

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
    load = np.floor(np.log2(assignments / num_tiles))
    return int(2 ** np.clip(np.maximum(load - 1, np.minimum(load, 5)), 0, 7))


def num_blocks(assignments: Any, num_tiles: int, rows: int) -> Any:
    """The most blocks that any routing needs: the largest possible sum of `ceil(count_n
    / rows)`.
    """
    blocks = (assignments + num_tiles * (rows - 1)) // rows
    return min(assignments, blocks) if isinstance(assignments, int) else blocks


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
        mask: False for tokens that take no room. `from_blocks` then reads what another
            token has for them: take it out.
    """
    assignments = tiles.size
    rows = rows or block_rows(assignments, num_tiles)
    blocks = num_blocks(assignments, num_tiles, rows)
    if (
        assignments == rows == 1 and mask is None
    ):  # one token decoded: there is nothing to sort
        zero = jnp.zeros((1, 1), jnp.int32)
        return Plan(tiles.reshape(1).astype(jnp.int32), zero, zero, zero[0] + 1)
    if mask is not None:
        tiles = jnp.where(mask[:, None], tiles, num_tiles)  # behind all others
    flat = tiles.reshape(-1).astype(jnp.int32)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    sorted_slot, last_block_N = _slots(flat[order], num_tiles, rows)
    if mask is not None:
        is_real = flat[order] < num_tiles
        sorted_slot = jnp.where(is_real, sorted_slot, _past(blocks * rows, assignments))
    source = (
        jnp.full(blocks * rows, assignments, jnp.int32)
        .at[sorted_slot]
        .set(order, unique_indices=True)
    )
    slot = (
        jnp.zeros(assignments, jnp.int32)
        .at[order]
        .set(sorted_slot, unique_indices=True)
    )
    if mask is not None:
        slot = jnp.where(slot < blocks * rows, slot, 0)
    return Plan(
        _block_tile(last_block_N, blocks),
        source.reshape(blocks, rows),
        slot.reshape(tiles.shape),
        last_block_N[-1:],
    )


def _past(end, count):
    """Indices behind the end, which scatters drop."""
    return end + jnp.arange(count, dtype=jnp.int32)


def _block_tile(last_block_N, blocks):
    """The tile of each block, from the number of blocks up to the end of each tile's."""
    numbers = jnp.arange(blocks, dtype=jnp.int32)
    tile = jnp.searchsorted(last_block_N, numbers, side="right")
    return jnp.minimum(tile, last_block_N.size - 1).astype(jnp.int32)


def _slots(sorted_tile, num_tiles, rows):
    """The row of each assignment among all blocks' rows, with every tile's first one at
    the start of a block; and the number of blocks up to the end of each tile's.
    """
    tiles_N = jnp.arange(num_tiles, dtype=jnp.int32)
    if isinstance(sorted_tile.shape[0], int):
        end_N = jnp.searchsorted(sorted_tile, tiles_N, side="right").astype(jnp.int32)
    else:  # a binary search needs to know the size
        end_N = (sorted_tile[None] <= tiles_N[:, None]).sum(axis=1, dtype=jnp.int32)
    start_N = jnp.concatenate([jnp.zeros(1, jnp.int32), end_N[:-1]])
    blocks_N = (end_N - start_N + rows - 1) // rows
    last_block_N = jnp.cumsum(blocks_N)
    first_row_N = (last_block_N - blocks_N) * rows
    sorted_slot = (
        first_row_N[sorted_tile]
        + jnp.arange(sorted_tile.size, dtype=jnp.int32)
        - start_N[sorted_tile]
    )
    return sorted_slot, last_block_N


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


def _copy(plan, x):
    return _rows(x, plan.source // plan.slot.shape[-1])


def _sum_copies(plan, dy):
    return _read(plan, dy).sum(axis=1)


def _read(plan, y):
    return y.reshape(-1, y.shape[-1])[plan.slot]


def _put_back(plan, dy):
    return _rows(dy.reshape(-1, dy.shape[-1]), plan.source)


def _rows(x_AD, source):
    """Rows of `x` by index, zero where the index is past the end."""
    return x_AD.at[source].get(mode="fill", fill_value=0)
