"""The oracle of `ternary_matmul`: plain numpy on unpacked weights."""

import numpy as np

from trix_kernels.tile_matmul import reference


def ternary_matmul(x, q, scale):
    """Computes `sum_g (x[:, g] @ q[g]) * scale[g]` in float64."""
    parts = np.split(np.asarray(x, np.float64), scale.shape[-2], axis=-1)
    rows = np.split(np.asarray(q, np.float64), scale.shape[-2], axis=0)
    scales = np.asarray(scale, np.float64)
    return sum(p @ w * s for p, w, s in zip(parts, rows, scales, strict=True))


def ternary_matmul_int8(x, q, scale):
    """Computes `(sum_g (values[:, g] @ q[g]) * scale[g]) * s`: that of one tile."""
    return reference.tile_matmul_int8(x[None], q[None], scale[None], [0])[0]
