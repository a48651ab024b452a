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


def quantize(x):
    """Computes `round(x * (127 / max|x|))` and `max|x| * (1/127)`, a row, in float32."""
    x = np.asarray(x, np.float32)
    largest = np.abs(x).max(axis=-1, keepdims=True)
    largest = np.where(largest < 2.0**-119, np.float32(127), largest)
    known = np.where(np.isfinite(largest), x, 0)
    values = np.rint(known * (np.float32(127) / largest)).astype(np.int8)
    return values, largest * np.float32(1 / 127)


def tile_matmul_int8(x, q, scale, block_tile):
    """Computes `(sum_g (values[m, :, g] @ q[n, g]) * scale[n, g]) * s[m]`, the inner
    sums as integers, the rest in float32.
    """
    values, s = quantize(x)
    y = np.zeros((*x.shape[:2], q.shape[-1]), np.float32)
    for m, n in enumerate(block_tile):
        parts = np.split(values[m].astype(np.int64), scale.shape[-2], axis=-1)
        rows = np.split(np.asarray(q[n], np.int64), scale.shape[-2], axis=0)
        scales = np.asarray(scale[n], np.float32)
        for part, weights, w in zip(parts, rows, scales, strict=True):
            y[m] += (part @ weights).astype(np.float32) * w
    return y * s
