"""`tile_ffn` for XLA: the two matmuls one after the other."""

from collections.abc import Callable

from jaxtyping import Array, Float, Integer

from trix_kernels.quantize import Activations
from trix_kernels.tile_matmul.xla import tile_matmul
from trix_kernels.weights import Packed


def tile_ffn(
    x: Float[Array, "M R D"],
    up: Packed,
    down: Packed,
    block_tile: Integer[Array, " M"],
    shape: tuple[int, int],
    act: Callable,
    activations: Activations = "float",
) -> Float[Array, "M R O"]:
    """Computes `act(x[m] @ up[n]) @ down[n]`, `n = block_tile[m]`."""
    hidden, features = shape
    h = act(tile_matmul(x, up, block_tile, hidden, activations))
    return tile_matmul(h, down, block_tile, features, activations)
