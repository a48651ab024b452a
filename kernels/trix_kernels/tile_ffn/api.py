"""`tile_ffn`: both matmuls of a tile.

On GPUs with our kernels these are two calls of `block_matmul`. One kernel for both, the
hidden layer on the chip, was written and measured on an H100: 37.3, 21.4 and 57.2 us
where two calls took 34.7, 22.3 and 32.0 (`experiments/speed/measured/h100.json`). It
won 4 % at one shape, where whole weights through cuBLAS take 21.1, and lost at two.
"""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from trix_kernels.quantize import Activations
from trix_kernels.tile_ffn import reference, xla
from trix_kernels.tile_matmul.api import (
    Implementation,
    block_matmul,
    unsupported_reason,
)
from trix_kernels.weights import Packed, check_contraction, unpack


def block_ffn(
    x: Float[Array, "M R D"],
    up: Packed,
    down: Packed,
    block_tile: Integer[Array, " M"],
    shape: tuple[int, int],
    act: Callable,
    *,
    used: Integer[Array, "1"] | None = None,
    activations: Activations = "float",
    implementation: Implementation | None = None,
) -> Float[Array, "M R O"]:
    """Computes `act((x[m] @ q_up) * s_up) @ q_down * s_down` with tile `block_tile[m]`.

    Args:
        shape: F, the hidden width, and O.
        act: elementwise, of jnp functions.
        used: blocks from this one on need not be computed: what they hold is undefined.
            None computes all.
        activations: "int8" rounds the rows of `x` and of the hidden layer to integers,
            see `quantize`.
        implementation: None takes `block_matmul` twice where its kernel takes the
            up-projection, else "xla"; "mosaic_gpu" takes it twice with this name; a
            name runs exactly that. "reference" is numpy, on concrete arrays.

    Raises:
        ValueError: `x` has other channels than the weights contract.
        NotImplementedError: the named implementation does not run on this
            device, and why.
    """
    check_contraction(x, up)
    if implementation is None and unsupported_reason(x, up, activations):
        implementation = "xla"
    if implementation == "reference":
        pairs = unpack(up, shape[0]), unpack(down, shape[1])
        if activations == "int8":
            y = reference.tile_ffn_int8(np.asarray(x), *pairs, block_tile, act)
        else:
            y = reference.tile_ffn(x.astype(jnp.float32), *pairs, block_tile, act)
        return jnp.asarray(y, x.dtype)
    if implementation == "xla":
        return xla.tile_ffn(x, up, down, block_tile, shape, act, used, activations)
    how = {"used": used, "activations": activations, "implementation": implementation}
    matmul = partial(block_matmul, **how)
    hidden = act(matmul(x, up, block_tile, shape[0]))
    return matmul(hidden, down, block_tile, shape[1])
