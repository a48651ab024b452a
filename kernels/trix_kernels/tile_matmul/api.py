"""`tile_matmul`: every row meets only its own tile's weights, which stay in two bits."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from trix_kernels import device
from trix_kernels.blocks import block_rows, make_blocks
from trix_kernels.tile_matmul import reference, xla
from trix_kernels.weights import ROWS, Packed, layout_of, unpack

Implementation = Literal["xla", "mosaic_gpu", "reference"]


def tile_matmul(
    x: Float[Array, "A I"],
    weights: Packed,
    group_sizes: Integer[Array, " N"],
    features: int,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "A O"]:
    """Computes `y[a] = (x[a] @ q[n]) * scale[n]`, n the tile whose group row `a` is in.

    Args:
        x: rows sorted by tile.
        weights: of N tiles.
        group_sizes: rows of each tile; they add up to A.
        features: O.
        implementation: as for `block_matmul`.
    """
    rows = block_rows(x.shape[0], weights.bits.shape[0])
    blocks = make_blocks(group_sizes, x.shape[0], rows)
    x_blocks = jnp.where(blocks.is_row[..., None], x[blocks.row], 0)
    y = block_matmul(
        x_blocks,
        weights,
        blocks.tile,
        features,
        used=blocks.used,
        implementation=implementation,
    )
    target = jnp.where(blocks.is_row, blocks.row, x.shape[0])
    return jnp.zeros((x.shape[0], features), x.dtype).at[target].set(y, mode="drop")


def block_matmul(
    x: Float[Array, "M R I"],
    weights: Packed,
    block_tile: Integer[Array, " M"],
    features: int,
    *,
    used: Integer[Array, "1"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "M R O"]:
    """Computes `y[m] = (x[m] @ q[n]) * scale[n]`, `n = block_tile[m]`, in the dtype of
    `x`.

    Products are accumulated in float32; with several groups of the contraction their
    scaled sums are added in ascending order.

    Args:
        used: blocks from this one on need not be computed: what they hold is undefined.
            None computes all.
        implementation: None takes "mosaic_gpu" where it runs and "xla" elsewhere; a
            name runs exactly that. "reference" is numpy in float64, on concrete arrays.

    Raises:
        NotImplementedError: the named implementation does not run here, and why.
    """
    reason = unsupported_reason(x, weights)
    if implementation is None:
        implementation = "xla" if reason else "mosaic_gpu"
    if implementation == "reference":
        q, scale = unpack(weights, features)
        y = reference.tile_matmul(x.astype(jnp.float32), q, scale, block_tile)
        return jnp.asarray(y, x.dtype)
    if implementation == "xla":
        return xla.tile_matmul(x, weights, block_tile, features)
    arch = device.arch()
    if reason or arch is None:
        raise NotImplementedError(reason)
    # Only here: importing Mosaic GPU takes longer than importing jax.
    from trix_kernels.tile_matmul import blackwell, hopper

    scale = mosaic_scale(weights.scale, features)
    if used is None:
        used = jnp.full((1,), x.shape[0], jnp.int32)
    rows = most_rows(arch, weights.scale.shape[-2])
    blocks, tile, used = split(x, block_tile, used, rows)
    kernel = hopper.tile_matmul if arch == "sm_90a" else blackwell.tile_matmul
    return kernel(blocks, weights.bits, scale, tile, used).reshape(*x.shape[:2], -1)


def unsupported_reason(x: Float[Array, "M R I"], weights: Packed) -> str | None:
    """Why the Mosaic GPU kernel does not run on these arrays here; None where it does."""
    if layout_of(weights) != "planar":
        return "The Mosaic GPU kernels take planar weights. These are in the layout 'rows'."
    if reason := device.unsupported_reason():
        return reason
    if x.dtype != jnp.bfloat16:
        return f"The Mosaic GPU kernels take bfloat16 activations. Got {x.dtype}."
    if x.shape[1] not in ROWS:
        return f"Blocks must have {', '.join(map(str, ROWS))} rows. Got {x.shape[1]}."
    if device.arch() == "sm_100a" and weights.bits.shape[-2] % 128:
        return (
            "On Blackwell features must be a multiple of 128. "
            f"Got {weights.bits.shape[-2]}."
        )
    return None


def most_rows(arch: device.Arch, groups: int) -> int:
    """Rows of a block that suit a kernel.

    With groups, an accumulator of 128 rows and the running sum do not fit the
    registers. On Blackwell 64 rows leave room for a second program on the core, whose
    matrix instructions run while the first decodes.
    """
    return 64 if groups > 1 or arch == "sm_100a" else max(ROWS)


def mosaic_scale(scale: Float[Array, "N G S"], features: int) -> Float[Array, "N G O"]:
    """A scale for every output, with the 1/2 that undoes the planar code's 2."""
    scale = scale.astype(jnp.float32) / 2
    return jnp.broadcast_to(scale, (*scale.shape[:-1], features))


def split(
    x: Float[Array, "M R I"],
    block_tile: Integer[Array, " M"],
    used: Integer[Array, "1"],
    most: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cuts blocks of more than `most` rows into equal ones."""
    parts = max(x.shape[1] // most, 1)
    blocks = x.reshape(x.shape[0] * parts, x.shape[1] // parts, x.shape[2])
    tile = jnp.repeat(block_tile.astype(jnp.int32), parts)
    return blocks, tile, used.astype(jnp.int32) * parts
