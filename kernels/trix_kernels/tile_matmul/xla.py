"""`tile_matmul` for XLA: CPU, TPU, any GPU, any dtype, any shape."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Num

from trix_kernels import device
from trix_kernels.derivatives import with_backward
from trix_kernels.quantize import Activations, quantize, quantize_through
from trix_kernels.varying import vary_alike
from trix_kernels.weights import Packed, unpack


def matmul(
    x: Num[Array, "*B T I"],
    q: Num[Array, "*N I O"],
    scale: Float[Array, "*N G S"],
    token_scale: Float[Array, "*B T 1"] | None = None,
    dtype: Any = None,
) -> Float[Array, "*B T O"]:
    """Computes `(x @ q) * scale`, batched over leading axes, in `dtype` or that of `x`.

    With several groups it is `sum over g of (x_g @ q_g) * scale_g`, ascending, in
    float32, every product and every sum rounded: without the barrier a compiler may
    fuse the two, as it likes, and the last bit depends on what is around.

    Args:
        x: integers are summed as int32.
        token_scale: multiplies the rows, last.
    """
    q = q.astype(x.dtype)
    is_integer = jnp.issubdtype(x.dtype, jnp.integer)
    real = jnp.float32 if is_integer else jnp.promote_types(x.dtype, jnp.float32)
    sums = jnp.int32 if is_integer else real
    groups = scale.shape[-2]
    rows = q.shape[-2] // groups
    products = []
    for g in range(groups):
        part = slice(g * rows, (g + 1) * rows)
        product = _product(x[..., part], q[..., part, :], sums)
        products.append(product.astype(real) * scale[..., g, None, :])
    if groups > 1:
        products = jax.lax.optimization_barrier(products)
    total = functools.reduce(jnp.add, products)
    if token_scale is not None:
        total = total * token_scale
    return total.astype(dtype or x.dtype)


def _narrow_sums(arrays, _):
    return jnp.matmul(*arrays, preferred_element_type=jnp.float32)


def _narrow_backward(primals, dy):
    """Both products in the dtype of `x`, as in the forward pass. JAX's own rule would
    widen `x` and `q` to the float32 of `dy`.
    """
    (x, q), _ = primals
    dy = dy.astype(x.dtype)
    dx = _narrow_product((dy, jnp.swapaxes(q, -1, -2)), ())
    dq = _narrow_product((jnp.swapaxes(x, -1, -2), dy), ())
    return dx.astype(x.dtype), dq.astype(q.dtype)


_narrow_product = with_backward(_narrow_sums, _narrow_backward)


def _product(x, q, sums):
    """Computes `x @ q` in the dtype `sums`."""
    is_narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
    if is_narrow and x.shape[:-2] == q.shape[:-2]:
        return _narrow_product(vary_alike((x, q)), ())
    return jnp.matmul(x, q, preferred_element_type=sums)


def packed_matmul(
    x: Float[Array, "*B T I"],
    q: Num[Array, "*N I O"],
    scale: Float[Array, "*N G S"],
    activations: Activations,
) -> Float[Array, "*B T O"]:
    """`matmul` of activations as they are, or of their eight-bit integers, through whose
    rounding gradients pass straight.
    """
    return matmul(x, q, scale) if activations == "float" else _of_integers(x, q, scale)


@jax.custom_jvp
def _of_integers(x, q, scale):
    values, token_scale = quantize(x)
    return matmul(values, q, scale, token_scale, x.dtype)


@_of_integers.defjvp
def _of_integers_jvp(primals, tangents):
    (x, q, scale), (dx, _, dscale) = primals, tangents

    def of_floats(x, scale):
        return int8_matmul(x, q, scale)

    _, tangent = jax.jvp(of_floats, (x, scale), (dx, dscale))
    return _of_integers(*primals), tangent


def int8_matmul(
    x: Float[Array, "*B T I"], q: Num[Array, "*N I O"], scale: Float[Array, "*N G S"]
) -> Float[Array, "*B T O"]:
    """`matmul` of the eight-bit integers of `x` as floats, with gradients to all three."""
    values, token_scale = quantize_through(x)
    return matmul(values, q, scale, token_scale, x.dtype)


def tile_matmul(
    x: Float[Array, "M R I"],
    weights: Packed,
    block_tile: Integer[Array, " M"],
    features: int,
    activations: Activations = "float",
) -> Float[Array, "M R O"]:
    """Computes `(x_m @ q_n) * scale_n` with `n = block_tile[m]`."""
    dtype = jnp.int8 if activations == "int8" else jnp.float32
    pair = of_blocks(weights, block_tile, features, dtype)
    return packed_matmul(x, *pair, activations)


def of_blocks(
    weights: Any,
    block_tile: Integer[Array, " M"],
    features: int,
    dtype: Any = jnp.float32,
) -> tuple[Num[Array, "M I O"], Float[Array, "M G S"]]:
    """The `q`, unpacked to `dtype`, and the scale of every block, of `Packed` weights or
    a pair `(q, scale)`.
    """
    if not isinstance(weights, Packed):
        q, scale = weights
        return rows_of(q, block_tile), scale[block_tile]
    blocks = block_tile.shape[0]
    is_symbolic = not isinstance(blocks, int)  # `jax.export`: any number of them
    if is_symbolic or blocks > weights.bits.shape[0]:  # unpack a tile once, not a block
        q, scale = unpack(weights, features, dtype)
        return rows_of(q, block_tile), scale[block_tile]
    return unpack(Packed(*(leaf[block_tile] for leaf in weights)), features, dtype)


def rows_of(
    w: Num[Array, "N I O"], block_tile: Integer[Array, " M"]
) -> Num[Array, "M I O"]:
    """The weights of every block. The cores of a CPU share a gather that fills, not one
    that clips.
    """
    if device.platform() != "cpu":
        return w[block_tile]
    return w.at[block_tile].get(mode="fill", fill_value=0)
