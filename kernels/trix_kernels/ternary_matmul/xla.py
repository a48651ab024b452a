"""`ternary_matmul` for XLA: CPU, TPU, any GPU, any dtype, any shape."""

from jaxtyping import Array, Float

from trix_kernels.tile_matmul.xla import matmul
from trix_kernels.weights import Packed, unpack


def ternary_matmul(
    x: Float[Array, "*B T I"], weights: Packed, features: int
) -> Float[Array, "*B T O"]:
    """Computes `(x @ q) * scale`, batched over leading axes; see `matmul`."""
    return matmul(x, *unpack(weights, features))
