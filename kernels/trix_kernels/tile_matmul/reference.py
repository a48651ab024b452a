"""The oracle of `tile_matmul`: plain numpy on unpacked weights."""

import numpy as np


def tile_matmul(x, q, scale, block_tile):
    """Computes `y[m] = sum_g (x[m, :, g] @ q[n, g]) * scale[n, g]`, `n =
    block_tile[m]`, in float64.
    """
    groups = scale.shape[-2]
    y = np.zeros((*x.shape[:2], q.shape[-1]))
    for m, n in enumerate(block_tile):
        parts = np.split(np.asarray(x[m], np.float64), groups, axis=-1)
        rows = np.split(np.asarray(q[n], np.float64), groups, axis=0)
        scales = np.asarray(scale[n], np.float64)
        for part, weights, s in zip(parts, rows, scales, strict=True):
            y[m] += (part @ weights) * s
    return y
