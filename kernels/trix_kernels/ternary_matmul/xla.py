"""`ternary_matmul` for XLA: CPU, TPU, any GPU, any dtype, any shape."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from trix_kernels.quantize import Activations
from trix_kernels.tile_matmul.xla import packed_matmul
from trix_kernels.weights import Packed, unpack


def ternary_matmul(
    x: Float[Array, "*B T I"],
    weights: Packed,
    features: int,
    activations: Activations = "float",
) -> Float[Array, "*B T O"]:
    """Computes `(x @ q) * scale`, batched over leading axes; see `matmul`."""
    dtype = jnp.int8 if activations == "int8" else jnp.float32
    return packed_matmul(x, *unpack(weights, features, dtype), activations)
