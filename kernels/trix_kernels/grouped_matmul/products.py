"""Three products on blocks, each the derivative of the others.

    forward:     y[m]  = x[m] @ w[n],                    n = tile[m]
    transposed:  dx[m] = dy[m] @ w[n].T
    outer:       dw[n] = sum over blocks m of tile n and their rows of x[m].T @ dy[m]

With one of x, dy and w fixed, two of them are linear maps of what is left and transposes
of each other: six maps in three pairs. Whatever computes the three products has
derivatives of any order thereby, forward and reverse, that are these products again.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Integer

from trix_kernels.derivatives import linear_map


class Groups(NamedTuple):
    """Which rows belong together.

    Attributes:
        tile: of each block; any tile for a block without rows.
        filled: rows of each block that count, its first ones.
        numbers: of the tiles, 0 to N-1.
    """

    tile: Integer[Array, " M"]
    filled: Integer[Array, " M"]
    numbers: Integer[Array, " N"]


class Products(NamedTuple):
    """One way to compute the three: functions of two arrays and the groups.

    `forward(x, w, groups)` and `transposed(dy, w, groups)` are of the dtype of `x` and
    `dy`, `outer(x, dy, groups)` is float32 or wider.
    """

    forward: Callable[[Any, Any, Groups], jax.Array]
    transposed: Callable[[Any, Any, Groups], jax.Array]
    outer: Callable[[Any, Any, Groups], jax.Array]


@lru_cache
def differentiable(plain: Products) -> Products:
    """The same products with derivatives. One object for one argument."""

    # Named by what they return, of what, with everything else fixed.
    def y_of_x(fixed, x):
        return products.forward(x, *fixed)

    def x_of_y(fixed, dy):
        return products.transposed(dy, *fixed)

    def y_of_w(fixed, w):
        x, groups = fixed
        return _counted(products.forward(x, w, groups), groups)

    def w_of_y(fixed, dy):
        x, groups = fixed
        return products.outer(x, dy, groups)

    def x_of_w(fixed, w):
        dy, groups = fixed
        return _counted(products.transposed(dy, w, groups), groups)

    def w_of_x(fixed, x):
        dy, groups = fixed
        return products.outer(x, dy, groups)

    products = Products(
        _bilinear(plain.forward, (y_of_x, x_of_y), (y_of_w, w_of_y), summed),
        _bilinear(plain.transposed, (x_of_y, y_of_x), (x_of_w, w_of_x), summed),
        _bilinear(plain.outer, (w_of_x, x_of_w), (w_of_y, y_of_w), jnp.dtype),
    )
    return products


def _counted(rows, groups):
    """Zero in rows that do not count: they have no part in an outer product."""
    row = jnp.arange(rows.shape[1], dtype=jnp.int32)
    is_counted = row[None] < groups.filled[:, None]
    return jnp.where(is_counted[..., None], rows, 0)


def summed(dtype: Any) -> Any:
    """The dtype that products of numbers of `dtype` are summed in."""
    return jnp.promote_types(dtype, jnp.float32)


def _bilinear(product, of_left, of_right, right_dtype):
    """`product(left, right, groups)` with its derivatives.

    Args:
        of_left, of_right: a linear map of that argument, `map((other, groups), argument)`,
            and its transpose.
        right_dtype: what the transpose of `of_right` returns, from the dtype of `left`. A
            tangent is brought to it, so that the gradient of float32 weights is the
            float32 sum even where products are of bfloat16.
    """

    @jax.custom_jvp
    def call(left, right, groups):
        return product(left, right, groups)

    left_map, left_transpose = of_left
    right_map, right_transpose = of_right

    def derivative(primals, tangents):
        left, right, groups = primals
        dleft, dright, _ = tangents
        y, parts = call(left, right, groups), []
        if not _is_zero(dleft):
            fixed = right, groups
            parts.append(linear_map(left_map, left_transpose, fixed, dleft))
        if not _is_zero(dright):
            dright = dright.astype(right_dtype(left.dtype))
            fixed = left, groups
            parts.append(linear_map(right_map, right_transpose, fixed, dright))
        return y, sum(parts[1:], start=parts[0]) if parts else jnp.zeros_like(y)

    call.defjvp(derivative, symbolic_zeros=True)
    return call


def _is_zero(tangent):
    return isinstance(tangent, jax.custom_derivatives.SymbolicZero)
