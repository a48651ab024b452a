"""`ternary_matmul`: a dense matmul whose weights stay in two bits."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from trix_kernels.quantize import Activations
from trix_kernels.ternary_matmul import reference, xla
from trix_kernels.tile_matmul.api import (
    Implementation,
    block_matmul,
    chosen,
    unsupported_reason,
)
from trix_kernels.weights import ROWS, Packed, check_contraction, unpack


def ternary_matmul(
    x: Float[Array, "T I"],
    weights: Packed,
    features: int,
    *,
    activations: Activations = "float",
    implementation: Implementation | None = None,
) -> Float[Array, "T O"]:
    """Computes `(x @ q) * scale`, summed over groups of the contraction, in the dtype
    of `x`.

    On Hopper and Blackwell it is `tile_matmul` with one tile.

    Args:
        weights: of one matrix: bits `[I, words]`, scale `[G, S]`.
        features: O.
        activations, implementation: as for `block_matmul`.

    Raises:
        ValueError: `x` has other channels than the weights contract.
        NotImplementedError: the named implementation does not run on this
            device, and why.
    """
    check_contraction(x, weights)
    if implementation == "reference":
        oracle = reference.ternary_matmul
        if activations == "int8":
            oracle = reference.ternary_matmul_int8
        y = oracle(x.astype(jnp.float32), *unpack(weights, features))
        return jnp.asarray(y, x.dtype)
    if not isinstance(x.shape[0], int):  # symbolic (`jax.export`): no blocks to cut
        if implementation == "mosaic_gpu":
            raise NotImplementedError(
                f"The Mosaic GPU kernels need a known number of rows. Got {x.shape[0]}."
            )
        return xla.ternary_matmul(x, weights, features, activations)
    if not x.shape[0]:
        return jnp.zeros((0, features), x.dtype)
    rows = next((rows for rows in ROWS if rows >= x.shape[0]), max(ROWS))
    one_tile = Packed(*(leaf[None] for leaf in weights))
    padding = -x.shape[0] % rows
    blocks = jnp.pad(x, ((0, padding), (0, 0))).reshape(-1, rows, x.shape[1])
    reason = unsupported_reason(blocks, one_tile, activations)
    if implementation is None:
        implementation = "xla" if reason else chosen(rows, activations)
    if implementation == "xla":
        return xla.ternary_matmul(x, weights, features, activations)
    tile = jnp.zeros(blocks.shape[0], jnp.int32)
    y = block_matmul(
        blocks,
        one_tile,
        tile,
        features,
        activations=activations,
        implementation="mosaic_gpu",
    )
    return y.reshape(-1, features)[: x.shape[0]]
