"""Grouped products of rows that are read by number where they lie, on Hopper alone.

What `x[rows]` in blocks would give, without the blocks: no copy of the tokens is written
and read again. They have no derivative; `grouped_matmul` of the blocks has.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
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


def numbered_matmul_and_act(
    x: Float[Array, "T I"],
    w: Float[Array, "N I O"],
    groups: Groups,
    rows: Integer[Array, "M R"],
    act: Callable,
) -> tuple[Float[Array, "M R O"], Float[Array, "M R O"]]:
    """Computes `h = numbered_matmul(x, w, ...)` and `act(h)` in one kernel.

    Args:
        act: one that `knows`.
    """
    from trix_kernels.grouped_matmul import gathered

    x, w, groups, rows = vary_alike((x, w, groups, rows))
    how = groups.tile, used(groups), rows, act
    h, a = gathered.matmul_and_act(x, w.astype(x.dtype), *how)
    return vary_like(h, x), vary_like(a, x)


def numbered_hidden_gradient(
    dy: Float[Array, "T O"],
    w: Float[Array, "N I O"],
    groups: Groups,
    rows: Integer[Array, "M R"],
    h: Float[Array, "M R I"],
    gate: Float[Array, "M R"],
    act: Callable,
) -> tuple[Float[Array, "M R I"], Float[Array, "M R I"], Float[Array, "M R"]]:
    """Computes `dh = act'(h) * gate * p`, `gate * a` and `sum(p * a)` of each row in one
    kernel, `p = numbered_matmul(dy, w, ..., transposed=True)` and `a = act(h)`.

    Args:
        act: one that `knows`.
    """
    from trix_kernels.grouped_matmul import gathered

    given = vary_alike((dy, w, groups, rows, h, gate.astype(jnp.float32)))
    dy, w, groups, rows, h, gate = given
    how = groups.tile, used(groups), rows, h, gate, act
    dh, ga, parts = gathered.hidden_gradient(dy, w.astype(dy.dtype), *how)
    return vary_like(dh, dy), vary_like(ga, dy), vary_like(parts.sum(axis=0), dy)


def knows(act: Callable) -> bool:
    """Whether kernels compute an activation: it and its derivative are products, squares
    and comparisons, which need no registers beside the sums.
    """

    def both(h, da):
        a, pull = jax.vjp(act, h)
        return a, pull(da)

    h = jax.ShapeDtypeStruct((8,), jnp.bfloat16)
    return _is_simple(jax.make_jaxpr(both)(h, h).jaxpr)


SIMPLE = frozenset(
    "add broadcast_in_dim copy gt integer_pow max mul select_n square".split()
)


def _is_simple(jaxpr):
    for one in jaxpr.eqns:
        inner = [p for p in one.params.values() if hasattr(p, "jaxpr")]
        if not inner and one.primitive.name not in SIMPLE:
            return False
        if not all(_is_simple(p.jaxpr) for p in inner):
            return False
    return True


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
