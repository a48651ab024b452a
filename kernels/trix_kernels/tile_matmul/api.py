"""`tile_matmul`: every row meets only its own tile's weights, which stay in two bits."""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Num

from trix_kernels import choice, device
from trix_kernels.blocks import block_rows, make_blocks
from trix_kernels.derivatives import without_derivative
from trix_kernels.quantize import Activations, quantize
from trix_kernels.tile_matmul import reference, xla
from trix_kernels.weights import (
    BLOCKS,
    PLANES,
    ROWS,
    Packed,
    check_contraction,
    interleave,
    layout_of,
    planar_block,
    unpack,
)

Implementation = Literal["xla", "mosaic_gpu", "reference"]


def tile_matmul(
    x: Float[Array, "A I"],
    weights: Packed,
    group_sizes: Integer[Array, " N"],
    features: int,
    *,
    activations: Activations = "float",
    implementation: Implementation | None = None,
) -> Float[Array, "A O"]:
    """Computes `y[a] = (x[a] @ q[n]) * scale[n]`, n the tile whose group row `a` is in.

    Args:
        x: rows sorted by tile.
        weights: of N tiles.
        group_sizes: rows of each tile; they add up to A.
        features: O.
        activations, implementation: as for `block_matmul`.
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
        activations=activations,
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
    activations: Activations = "float",
    implementation: Implementation | None = None,
) -> Float[Array, "M R O"]:
    """Computes `y[m] = (x[m] @ q[n]) * scale[n]`, `n = block_tile[m]`, in the dtype of
    `x`.

    Products are accumulated in float32; with several groups of the contraction their
    scaled sums are added in ascending order.

    Args:
        used: blocks from this one on need not be computed: what they hold is undefined.
            None computes all.
        activations: "float" multiplies `x` as it is; "int8" rounds every row to
            integers first, see `quantize`.
        implementation: None takes what `trix_kernels.choice` says of those that run; a
            name runs exactly that. "reference" is numpy, on concrete arrays.

    Raises:
        ValueError: `x` has other channels than the weights contract.
        NotImplementedError: the named implementation does not run on this
            device, and why.
    """
    check_contraction(x, weights)
    reason = unsupported_reason(x, weights, activations)
    if implementation is None:
        implementation = "xla" if reason else chosen(x.shape[1], activations)
    if implementation == "reference":
        oracle = reference.tile_matmul
        if activations == "int8":
            oracle = reference.tile_matmul_int8
        y = oracle(x.astype(jnp.float32), *unpack(weights, features), block_tile)
        return jnp.asarray(y, x.dtype)
    if implementation == "xla":
        return xla.tile_matmul(x, weights, block_tile, features, activations)
    if reason or device.arch() is None:
        raise NotImplementedError(reason)
    if used is None:
        used = jnp.full((1,), x.shape[0], jnp.int32)
    kernel = partial(_mosaic, features=features, activations=activations)
    return without_derivative(kernel, "mosaic_gpu")(x, weights, block_tile, used)


def _mosaic(x, weights, block_tile, used, features, activations):
    # Only here: importing Mosaic GPU takes longer than importing jax.
    from trix_kernels.tile_matmul import blackwell, hopper

    scale = mosaic_scale(weights.scale, features)
    values, token_scale = x, None
    if activations == "int8":
        values, token_scale = quantize(x)
        values, scale = interleave(values), scale / 32
    rows = most_rows(weights.scale.shape[-2], activations)
    blocks, tile, used = split(values, block_tile, used, rows)
    if token_scale is not None:
        token_scale = token_scale.reshape(blocks.shape[:2])
    arch = device.arch()
    kernel = hopper if arch == "sm_90a" else blackwell
    programs = kernel.programs_of(blocks.shape[0], features)
    splits = splits_of(programs, kernel.CORES, x.shape[-1], scale.shape[1])
    args = blocks, weights.bits, scale, tile, used
    if arch == "sm_90a":
        y = hopper.tile_matmul(*args, token_scale, splits=splits)
    else:
        y = blackwell.tile_matmul(*args, splits=splits)
    if splits > 1:
        y = join(y, scale, tile, token_scale, x.dtype)
    return y.reshape(*x.shape[:2], -1)


def splits_of(programs: int, cores: int, contraction: int, groups: int) -> int:
    """Parts of the contraction that give most cores a program: a power of two.

    Groups are not split, and a part has at least two steps.
    """
    if groups > 1:
        return 1
    steps, splits = contraction // planar_block(contraction), 1
    while steps % (2 * splits) == 0 and steps >= 4 * splits:
        if 2 * splits * programs > cores:
            break
        splits *= 2
    return splits


def join(
    sums: Float[Array, "splits M O R"],
    scale: Float[Array, "N 1 O"],
    block_tile: Integer[Array, " M"],
    token_scale: Float[Array, "M R"] | None,
    dtype: Any,
) -> Float[Array, "M R O"]:
    """Adds the parts of a split contraction and scales them: what a kernel that is not
    split does.
    """
    y = sums.sum(axis=0) * scale[block_tile, 0][..., None]
    if token_scale is not None:
        y = y * token_scale[:, None]
    return jnp.swapaxes(y, 1, 2).astype(dtype)


def unsupported_reason(
    x: Float[Array, "M R I"], weights: Packed, activations: Activations = "float"
) -> str | None:
    """Why the Mosaic GPU kernel does not run on these arrays; None where it does."""
    if layout_of(weights) != "planar":
        layout = layout_of(weights)
        return f"The Mosaic GPU kernels take planar weights. These are in the layout {layout!r}."
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
    if activations == "int8":
        return int8_reason() or _int8_groups_reason(weights)
    return None


def chosen(rows: int, activations: Activations) -> Implementation:
    """What `None` is where the Mosaic GPU kernel runs."""
    arch: Any = device.arch()
    return choice.choose(arch, rows, activations).implementation


def int8_reason() -> str | None:
    """Why the default device's Mosaic GPU kernel takes no int8 activations."""
    if device.arch() != "sm_90a":
        return f"The int8 kernel is for Hopper (sm_90a). This is {device.arch()}."
    return None


def _int8_groups_reason(weights: Packed) -> str | None:
    groups = weights.scale.shape[-2]
    contraction = weights.bits.shape[-1] * PLANES
    if planar_block(contraction, groups) != max(BLOCKS):
        return (
            f"The int8 kernel needs groups of a multiple of {max(BLOCKS)} weights: "
            "Mosaic GPU refuses s8 wgmmas on less, for a fault of ptxas. "
            f"Got {contraction // groups}."
        )
    return None


def most_rows(groups: int, activations: Activations) -> int:
    """Rows of a block that suit a kernel.

    64 leave shared memory and registers for a second program on the core, whose matrix
    instructions run while the first decodes. With 128 bfloat16 rows ptxas runs Hopper's
    wgmmas one after the other, for want of registers: 1.6 to 1.7 times slower on an
    H100. Int8 activations are half as long and take 128, but not with groups, whose
    running sum would not fit the registers.
    """
    return max(ROWS) if activations == "int8" and groups == 1 else 64


def mosaic_scale(scale: Float[Array, "N G S"], features: int) -> Float[Array, "N G O"]:
    """A scale for every output, with the 1/2 that undoes the planar code's 2."""
    scale = scale.astype(jnp.float32) / 2
    return jnp.broadcast_to(scale, (*scale.shape[:-1], features))


def split(
    x: Num[Array, "M R I"],
    block_tile: Integer[Array, " M"],
    used: Integer[Array, "1"],
    most: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cuts blocks of more than `most` rows into equal ones."""
    parts = max(x.shape[1] // most, 1)
    blocks = x.reshape(x.shape[0] * parts, x.shape[1] // parts, x.shape[2])
    tile = jnp.repeat(block_tile.astype(jnp.int32), parts)
    return blocks, tile, used.astype(jnp.int32) * parts
