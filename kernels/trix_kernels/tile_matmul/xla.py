"""`tile_matmul` for XLA: CPU, TPU, any GPU, any dtype, any shape."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Num

from trix_kernels.weights import Packed, unpack


def matmul(
    x: Float[Array, "*B T I"], q: Num[Array, "*N I O"], scale: Float[Array, "*N G S"]
) -> Float[Array, "*B T O"]:
    """Computes `(x @ q) * scale`, batched over leading axes, in the dtype of `x`.

    With several groups it is `sum over g of (x_g @ q_g) * scale_g`, ascending, in
    float32, every product and every sum rounded: without the barrier a compiler may
    fuse the two, as it likes, and the last bit depends on what is around.
    """
    q = q.astype(x.dtype)
    groups = scale.shape[-2]
    rows = q.shape[-2] // groups
    products = []
    for g in range(groups):
        part = slice(g * rows, (g + 1) * rows)
        product = jnp.matmul(
            x[..., part], q[..., part, :], preferred_element_type=jnp.float32
        )
        products.append(product * scale[..., g, None, :])
    if groups > 1:
        products = jax.lax.optimization_barrier(products)
    return functools.reduce(jnp.add, products).astype(x.dtype)


def tile_matmul(
    x: Float[Array, "M R I"],
    weights: Packed,
    block_tile: Integer[Array, " M"],
    features: int,
) -> Float[Array, "M R O"]:
    """Computes `(x_m @ q_n) * scale_n` with `n = block_tile[m]`."""
    return matmul(x, *of_blocks(weights, block_tile, features))


def of_blocks(
    weights: Any, block_tile: Integer[Array, " M"], features: int
) -> tuple[Num[Array, "M I O"], Float[Array, "M G S"]]:
    """The `q` and the scale of every block, of `Packed` weights or a pair `(q,
    scale)`.
    """
    if not isinstance(weights, Packed):
        q, scale = weights
        return q[block_tile], scale[block_tile]
    if (
        block_tile.shape[0] > weights.bits.shape[0]
    ):  # unpack each tile once, not a block
        q, scale = unpack(weights, features)
        return q[block_tile], scale[block_tile]
    return unpack(Packed(*(leaf[block_tile] for leaf in weights)), features)
