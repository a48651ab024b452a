"""The one seam between the layers and `trix_kernels`: matmuls on ternary weights, packed or not.

Whatever holds the weights, the numbers are the same: `(x @ q) * scale` in this order, accumulated in float32, the sum
over groups of the contraction in ascending order. A frozen layer therefore equals its fake-quantized forward bit for bit.
"""

from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp

from trix_jax.ternary import Ternary
from trix_jax.typing import Array, Float, Integer, UInt8
from trix_kernels import packing

PACKED = "packed"  # the Flax collection that holds packed weights


class Packed(NamedTuple):
    """Ternary weights at rest.

    Attributes:
        bits: four weights a byte along the outputs (`trix_kernels.packing.pack` of `q`), the layout of the XLA path.
        scale: as in `Ternary`, bfloat16.
    """

    bits: UInt8[Array, "*N I bytes"]
    scale: Float[Array, "*N G S"]


Weights = Ternary | Packed


def pack(weights: Ternary) -> Packed:
    """Ternary weights to two bits each; exact."""
    bits = jnp.asarray(packing.pack(weights.q))
    return Packed(bits, weights.scale.astype(jnp.bfloat16))


def unpack(weights: Weights, features: int) -> Ternary:
    """The inverse of `pack` for weights of `features` outputs; ternary weights pass through."""
    if isinstance(weights, Ternary):
        return weights
    q = jnp.asarray(packing.unpack(weights.bits, features, jnp.float32))
    return Ternary(q, weights.scale.astype(jnp.float32))


def matmul(
    x: Float[Array, "*B T I"], weights: Weights, features: int
) -> Float[Array, "*B T O"]:
    """Computes `(x @ q) * scale`, batched over leading axes, in the dtype of `x`.

    With several groups it is `sum over g of (x_g @ q_g) * scale_g`, ascending, in float32, every product and every sum
    rounded: without the barrier a compiler may fuse the two, as it likes, and the last bit depends on what is around.
    """
    q, scale = unpack(weights, features)
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
    return reduce(jnp.add, products).astype(x.dtype)


def tile_matmul(
    x: Float[Array, "M R I"],
    weights: Weights,
    block_tile: Integer[Array, " M"],
    features: int,
) -> Float[Array, "M R O"]:
    """Computes `(x_m @ q_n) * scale_n` with `n = block_tile[m]`: every block meets only its own tile's weights."""
    if isinstance(weights, Packed) and block_tile.shape[0] > weights.bits.shape[0]:
        weights = unpack(weights, features)
    return matmul(x, type(weights)(*(leaf[block_tile] for leaf in weights)), features)
