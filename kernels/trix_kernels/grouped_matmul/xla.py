"""The three products for XLA: CPU, TPU, any GPU, any dtype, any shape.

Weights are gathered, a matrix a block, for one batched product. `jax.lax.ragged_dot` is
no rival: it multiplies every row by every tile. On two CPU cores (AMD EPYC, jax 0.12.0.1,
`A=4096, I=256, O=64`, processor time of a forward product in float32) it takes 99 ms where
this takes 3 with 16 tiles, 391 and 4 with 64.

On CPUs the outer product is one of a matrix that was transposed before, or XLA computes it
on one core (3.4 and 1.6 ms for `M=446, R=64, I=32, O=128` on two).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from trix_kernels.grouped_matmul.products import Groups, Products, summed
from trix_kernels.tile_matmul.xla import rows_of


def forward(
    x: Float[Array, "M R I"], w: Float[Array, "N I O"], groups: Groups
) -> Float[Array, "M R O"]:
    """Computes `y[m] = x[m] @ w[n]`, `n = groups.tile[m]`."""
    w_MIO = rows_of(w.astype(x.dtype), groups.tile)
    y = jnp.matmul(x, w_MIO, preferred_element_type=summed(x.dtype))
    return y.astype(x.dtype)


def transposed(
    dy: Float[Array, "M R O"], w: Float[Array, "N I O"], groups: Groups
) -> Float[Array, "M R I"]:
    """Computes `dx[m] = dy[m] @ w[n].T`, `n = groups.tile[m]`."""
    return forward(dy, jnp.swapaxes(w, 1, 2), groups)


def outer(
    x: Float[Array, "M R I"], dy: Float[Array, "M R O"], groups: Groups
) -> Float[Array, "N I O"]:
    """Computes `dw[n] = sum of x[m, :f].T @ dy[m, :f]` over the blocks m of tile n, `f =
    groups.filled[m]`.
    """
    if x.shape[2] > dy.shape[2]:
        return jnp.swapaxes(_outer(dy, x, groups), 1, 2)
    return _outer(x, dy, groups)


def _outer(x, dy, groups):
    """`outer` where `x` is the narrower."""
    row = jnp.arange(x.shape[1], dtype=jnp.int32)
    counts = row[None] < groups.filled[:, None]
    x_MIR = jnp.where(counts[:, None], jnp.swapaxes(x, 1, 2), 0)
    x_MIR = jax.lax.platform_dependent(
        x_MIR, cpu=jax.lax.optimization_barrier, default=_unchanged
    )
    dy = jnp.where(counts[..., None], dy, 0)
    dw_MIO = jnp.matmul(x_MIR, dy, preferred_element_type=summed(x.dtype))
    shape = groups.numbers.shape[0], *dw_MIO.shape[1:]
    return jnp.zeros(shape, dw_MIO.dtype).at[groups.tile].add(dw_MIO)


def _unchanged(x):
    return x


PRODUCTS = Products(forward, transposed, outer)
