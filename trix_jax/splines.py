"""Functions that are linear in every cell of a grid, many of them at once.

    u = (place + 1) / 2 * G          the cell is floor(u), l = u - floor(u) in 0..1
    m_n(place) = c[n, cell, 0] + sum_j c[n, cell, 1 + j] * l_j

`place` is in -1..1 on each of the d axes, so that a function has G^d cells of 1 + d
coefficients. It may jump between cells.
"""

import jax
import jax.numpy as jnp
import numpy as np

from trix_jax.compiled import together
from trix_jax.typing import Array, Float, Integer


@together("grid")
def evaluate(
    coefficients: Float[Array, "N cells terms"],
    tiles: Integer[Array, "T K"],
    place: Float[Array, "T #K axes"],
    grid: int,
) -> Float[Array, "T K"]:
    """Computes `m_n(place)` of each token's tiles n, at a place a token or a place a
    tile.

    Args:
        place: in -1..1; the last cell takes what is beyond.
        grid: G, cells along an axis.
    """
    position = (place + 1) / 2 * grid
    cell = jax.lax.stop_gradient(jnp.clip(jnp.floor(position), 0, grid - 1))
    local = position - cell
    index = jnp.zeros(cell.shape[:-1], jnp.int32)
    for axis in range(cell.shape[-1]):
        index = index * grid + cell[..., axis].astype(jnp.int32)
    c = coefficients[tiles, index]
    total = c[..., 0]
    for axis in range(local.shape[-1]):
        total = total + c[..., 1 + axis] * local[..., axis]
    return total


def ramp(grid: int) -> np.ndarray:
    """Ternary coefficients `[G, 2]` of `max(u - floor(G / 2), 0)` on one axis, up to 2;
    of more than four cells the others stay at 1..2.
    """
    left = np.arange(grid) - grid // 2
    return np.stack([np.clip(left, 0, 1), left >= 0], axis=-1).astype(np.float32)
