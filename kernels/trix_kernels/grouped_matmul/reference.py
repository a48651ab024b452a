"""The oracle of `grouped_matmul`: plain numpy, a block at a time, in float64."""

import numpy as np


def grouped_matmul(x, w, block_tile):
    """Computes `y[m] = x[m] @ w[n]`, `n = block_tile[m]`."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    y = np.zeros((*x.shape[:2], w.shape[-1]))
    for m, n in enumerate(block_tile):
        y[m] = x[m] @ w[n]
    return y


def transposed_matmul(dy, w, block_tile):
    """Computes `dx[m] = dy[m] @ w[n].T`, `n = block_tile[m]`."""
    return grouped_matmul(dy, np.swapaxes(w, 1, 2), block_tile)


def grouped_outer(x, dy, block_tile, filled, tiles):
    """Computes `dw[n]`, the sum of `x[m, r]` times `dy[m, r]` over the blocks m of tile n
    and their first `filled[m]` rows r.
    """
    dw = np.zeros((tiles, x.shape[-1], dy.shape[-1]))
    for m, n in enumerate(block_tile):
        rows = slice(int(filled[m]))
        dw[n] += np.asarray(x[m, rows], np.float64).T @ np.asarray(dy[m, rows], float)
    return dw
