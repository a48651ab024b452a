"""`tile_ffn`: both matmuls of a tile, the hidden layer never in device memory."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from trix_kernels import device
from trix_kernels.derivatives import without_derivative
from trix_kernels.quantize import Activations
from trix_kernels.tile_ffn import reference, xla
from trix_kernels.tile_ffn.config import FUSED_BLOCKS, SHARED_BYTES, shared_bytes
from trix_kernels.tile_matmul.api import (
    Implementation,
    block_matmul,
    mosaic_scale,
    split,
)
from trix_kernels.tile_matmul.api import unsupported_reason as matmul_reason
from trix_kernels.weights import ROWS, Packed, unpack


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
        implementation: None takes the fused "mosaic_gpu" where it runs and there is a
            block for most cores of the GPU, `block_matmul` twice where only that runs,
            else "xla"; a name runs exactly that. "reference" is numpy, on concrete
            arrays.

    Raises:
        NotImplementedError: the named implementation does not run on this
            device, and why.
    """
    reason = unsupported_reason(x, up, down, activations)
    if implementation is None and matmul_reason(x, up, activations):
        implementation = "xla"
    if implementation is None and (reason or x.shape[0] < FUSED_BLOCKS):
        common = {"used": used, "activations": activations}
        hidden = act(block_matmul(x, up, block_tile, shape[0], **common))
        return block_matmul(hidden, down, block_tile, shape[1], **common)
    if implementation == "reference":
        pairs = unpack(up, shape[0]), unpack(down, shape[1])
        if activations == "int8":
            y = reference.tile_ffn_int8(np.asarray(x), *pairs, block_tile, act)
        else:
            y = reference.tile_ffn(x.astype(jnp.float32), *pairs, block_tile, act)
        return jnp.asarray(y, x.dtype)
    if implementation == "xla":
        return xla.tile_ffn(x, up, down, block_tile, shape, act, used, activations)
    if reason or device.arch() is None:
        raise NotImplementedError(reason)
    if used is None:
        used = jnp.full((1,), x.shape[0], jnp.int32)
    kernel = without_derivative(partial(_mosaic, shape=shape, act=act), "mosaic_gpu")
    return kernel(x, up, down, block_tile, used)


def _mosaic(x, up, down, block_tile, used, shape, act):
    # Only here: importing Mosaic GPU takes longer than importing jax.
    from trix_kernels.tile_ffn import mosaic_gpu

    arch: Any = device.arch()
    blocks, tile, used = split(x, block_tile, used, _fitting_rows(up, down)[-1])
    y = mosaic_gpu.tile_ffn(
        blocks,
        (up.bits, mosaic_scale(up.scale, shape[0])),
        (down.bits, mosaic_scale(down.scale, shape[1])),
        tile,
        used,
        act,
        arch,
    )
    return y.reshape(*x.shape[:2], -1)


def unsupported_reason(
    x: Float[Array, "M R D"],
    up: Packed,
    down: Packed,
    activations: Activations = "float",
) -> str | None:
    """Why the fused kernel does not run on these arrays; None where it does."""
    if activations == "int8":
        return (
            "The fused FFN takes float activations: a token's largest hidden value, and "
            "with it the int8 scale, is known only after the first matmul."
        )
    for weights in (up, down):
        if reason := matmul_reason(x, weights):
            return reason
        if weights.bits.shape[-2] % 128:
            return f"The fused FFN needs widths that are multiples of 128. Got {weights.bits.shape[-2]}."
    if not _fitting_rows(up, down):
        widths = " + ".join(str(8 * w.bits.shape[-1]) for w in (up, down))
        return f"Eight rows of {widths} activations do not fit the shared memory."
    return None


def _fitting_rows(up: Packed, down: Packed) -> list[int]:
    """The sizes of a block whose activations fit the shared memory, ascending."""
    d_in, hidden = 8 * up.bits.shape[-1], 8 * down.bits.shape[-1]
    return [rows for rows in ROWS if shared_bytes(rows, d_in, hidden) <= SHARED_BYTES]
