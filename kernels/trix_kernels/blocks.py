"""Rows sorted by tile, as whole blocks: what the kernels take, made from an array of
group sizes.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Integer

from trix_kernels.weights import ROWS


class Blocks(NamedTuple):
    """Where the rows of each block lie.

    Attributes:
        tile: of each block; any tile for an unused block.
        row: of `x` in each row of the blocks.
        is_row: False for padding.
        used: number of blocks that hold rows.
    """

    tile: Int[Array, " M"]
    row: Int[Array, "M R"]
    is_row: Bool[Array, "M R"]
    used: Int[Array, "1"]


def make_blocks(group_sizes: Integer[Array, " N"], total: int, rows: int) -> Blocks:
    """Cuts `total` sorted rows into blocks of `rows`, none of which has two tiles.

    Shapes depend on `total` and N alone: nothing recompiles when the sizes change.
    """
    sizes = group_sizes.astype(jnp.int32)
    count = min(total, (total + sizes.size * (rows - 1)) // rows)
    last = jnp.cumsum(-(-sizes // rows))
    block = jnp.arange(count, dtype=jnp.int32)
    tile = jnp.searchsorted(last, block, side="right").astype(jnp.int32)
    tile = jnp.minimum(tile, sizes.size - 1)
    first = last[tile] - -(-sizes[tile] // rows)
    start = jnp.cumsum(sizes)[tile] - sizes[tile]
    within = (block - first)[:, None] * rows + jnp.arange(rows, dtype=jnp.int32)[None]
    is_row = (within < sizes[tile][:, None]) & (block < last[-1])[:, None]
    row = jnp.where(is_row, start[:, None] + within, 0)
    return Blocks(tile, row, is_row, last[-1:].astype(jnp.int32))


def block_rows(total: int, tiles: int) -> int:
    """Rows in a block: the largest of `ROWS` that is not above half a tile's mean load,
    or the smallest.
    """
    half = total / max(tiles, 1) / 2
    return max([rows for rows in ROWS if rows <= half], default=ROWS[0])
