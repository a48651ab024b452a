"""Grouped products of rows that are read by number where they lie, on Hopper alone.

What `x[rows]` in blocks would give, without the blocks: no copy of the tokens is written
and read again. They have no derivative; `grouped_matmul` of the blocks has.
"""

import jax
from jaxtyping import Array, Float, Integer

from trix_kernels.grouped_matmul.api import runs, used
from trix_kernels.grouped_matmul.products import Groups
from trix_kernels.varying import vary_alike, vary_like


def numbered_matmul(
    x: Float[Array, "T I"],
    w: Float[Array, "N _ _"],
    groups: Groups,
    rows: Integer[Array, "M R"],
    *,
    transposed: bool = False,
) -> Float[Array, "M R O"]:
    """Computes `y[m] = x[rows[m]] @ w[n]`, or with `w[n].T`, in the dtype of `x`.

    Args:
        rows: in 0..T-1, or -1 for a row of zeros.
        groups: of the blocks, see `grouped_matmul`.
    """
    from trix_kernels.grouped_matmul import gathered

    x, w, groups, rows = vary_alike((x, w, groups, rows))
    how = groups.tile, used(groups), rows
    y = gathered.gathered_matmul(x, w.astype(x.dtype), *how, transposed=transposed)
    return vary_like(y, x)


def numbered_outer(
    x: jax.Array, dy: jax.Array, groups: Groups, rows: Integer[Array, "M R"]
) -> Float[Array, "N I O"]:
    """Computes `dw[n]`, the sum of `x[m].T @ dy[m]` over the blocks m of tile n, in
    float32, where one of the two is read by number.

    Args:
        x, dy: one `[T, _]`, whose `x[rows]` it is, the other `[M, R, _]`.
        groups, rows: as for `numbered_matmul`; -1 where a row does not count.
    """
    from trix_kernels.grouped_matmul import gathered

    x, dy, groups, rows = vary_alike((x, dy, groups, rows))
    outer = gathered.outer_of_left if x.ndim == 2 else gathered.outer_of_right
    return vary_like(outer(x, dy, *runs(groups), rows), x)
