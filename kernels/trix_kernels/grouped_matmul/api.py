"""`grouped_matmul`: every block of rows meets its own tile's weights, whole ones, as in
training; with the two products of its gradient.

Rows are sorted by tile and every tile's run is padded to whole blocks, so that shapes do
not depend on how many rows a tile has. Each of the three products has derivatives of any
order, forward and reverse, that are these products in the same implementation.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from trix_kernels import choice, device
from trix_kernels.grouped_matmul import reference, xla
from trix_kernels.grouped_matmul.products import (
    Groups,
    Products,
    differentiable,
    summed,
)
from trix_kernels.varying import vary_alike, vary_like

Implementation = Literal["xla", "mosaic_gpu", "reference"]

ROWS = 128  # of a block: what Hopper's kernels take
INPUTS = 128  # I and O are multiples of it there


def grouped_matmul(
    x: Float[Array, "M R I"],
    w: Float[Array, "N I O"],
    block_tile: Integer[Array, " M"],
    filled: Integer[Array, " M"] | None = None,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "M R O"]:
    """Computes `y[m] = x[m] @ w[n]`, `n = block_tile[m]`, in the dtype of `x`.

    Products are of numbers in the dtype of `x` and summed in float32. The gradient of `w`
    is the float32 sum, rounded to the dtype of `w` alone: give float32 weights to keep
    all of it.

    Args:
        w: rounded to the dtype of `x`.
        block_tile: the blocks of a tile come one after the other.
        filled: rows of each block that count, its first ones. Blocks without any come
            last, all blocks of a tile but its last one are full. None counts all rows.
            In rows that do not count `x` may hold anything, NaN too, and `y` and the
            gradient of `x` are undefined; no gradient of `w` comes from them.
        implementation: None takes "mosaic_gpu" where it runs and a committed measurement
            says so (`trix_kernels.choice`), else "xla"; a name runs exactly that.
            "reference" is numpy, on concrete arrays, without derivatives.

    Raises:
        ValueError: shapes or dtypes that do not belong together.
        NotImplementedError: the named implementation does not run on this device or these
            shapes, and why.
    """
    _same("the inputs of `w`", w.shape[1], "of `x`", x.shape[2])
    groups = _groups(x, block_tile, filled, w.shape[0])
    products = _products(implementation, x, w.shape[1:])
    return products.forward(*vary_alike((x, w, groups)))


def transposed_matmul(
    dy: Float[Array, "M R O"],
    w: Float[Array, "N I O"],
    block_tile: Integer[Array, " M"],
    filled: Integer[Array, " M"] | None = None,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "M R I"]:
    """Computes `dx[m] = dy[m] @ w[n].T`, `n = block_tile[m]`, in the dtype of `dy`: the
    gradient of `grouped_matmul` to `x`.

    Arguments and errors are those of `grouped_matmul`.
    """
    _same("the outputs of `w`", w.shape[2], "of `dy`", dy.shape[2])
    groups = _groups(dy, block_tile, filled, w.shape[0])
    products = _products(implementation, dy, w.shape[1:])
    return products.transposed(*vary_alike((dy, w, groups)))


def grouped_outer(
    x: Float[Array, "M R I"],
    dy: Float[Array, "M R O"],
    block_tile: Integer[Array, " M"],
    tiles: int,
    filled: Integer[Array, " M"] | None = None,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "N I O"]:
    """Computes `dw[n]`, the sum of `x[m].T @ dy[m]` over the blocks m of tile n, in
    float32: the gradient of `grouped_matmul` to `w`. A tile without rows has zeros.

    Args:
        tiles: N.
        block_tile, filled, implementation: as for `grouped_matmul`; rows that do not
            count are left out, whatever they hold.

    Raises:
        ValueError, NotImplementedError: as `grouped_matmul`.
    """
    _same("blocks and rows of `dy`", dy.shape[:2], "of `x`", x.shape[:2])
    _same("the dtype of `dy`", dy.dtype, "of `x`", x.dtype)
    groups = _groups(x, block_tile, filled, tiles)
    products = _products(implementation, x, (x.shape[2], dy.shape[2]))
    return products.outer(*vary_alike((x, dy, groups)))


def unsupported_reason(
    x: Float[Array, "M R _"] | jax.ShapeDtypeStruct, inputs: int, outputs: int
) -> str | None:
    """Why the Mosaic GPU kernels do not run on these blocks and weights of `inputs` and
    `outputs`; None where they do.
    """
    if reason := device_reason():
        return reason
    if x.dtype != jnp.bfloat16:
        return f"The Mosaic GPU kernels take bfloat16. Got {x.dtype}."
    if x.shape[1] != ROWS:
        return f"Blocks must have {ROWS} rows. Got {x.shape[1]}."
    if inputs % INPUTS or outputs % INPUTS:
        return (
            f"Inputs and outputs must be multiples of {INPUTS}. "
            f"Got {inputs} and {outputs}."
        )
    return None


def default_reason() -> str | None:
    """Why `implementation=None` is XLA where the kernels run on the default device; None
    where it is the kernels.
    """
    arch = device.arch()
    if arch is None:
        return device_reason()
    chosen = choice.choose_whole(arch)
    return None if chosen.implementation == "mosaic_gpu" else chosen.reason


def device_reason() -> str | None:
    """Why the default device has no kernel for grouped products; None where it has."""
    if reason := device.unsupported_reason():
        return reason
    if device.arch() != "sm_90a":
        return (
            "The kernels of grouped products are for Hopper (sm_90a): they multiply by "
            f"wgmma, which later GPUs lack. This is {device.arch()}."
        )
    return None


def _same(name, found, other, expected):
    if found != expected:
        raise ValueError(f"{name} must be {expected}, as {other}. Got {found}.")


def _groups(x, block_tile, filled, tiles):
    blocks, rows, _ = x.shape
    _same("the size of `block_tile`", block_tile.shape, "the blocks of `x`", (blocks,))
    if filled is None:
        filled = jnp.full(blocks, rows, jnp.int32)
    _same("the size of `filled`", filled.shape, "the blocks of `x`", (blocks,))
    numbers = jnp.arange(tiles, dtype=jnp.int32)
    return Groups(block_tile.astype(jnp.int32), filled.astype(jnp.int32), numbers)


def _products(implementation: Implementation | None, x: Any, weights: Any) -> Products:
    """The three products of an implementation, with derivatives."""
    if implementation == "reference":
        return _REFERENCE
    if implementation == "xla":
        return differentiable(xla.PRODUCTS)
    reason = unsupported_reason(x, *weights)
    if implementation == "mosaic_gpu" and reason:
        raise NotImplementedError(reason)
    if implementation is None and (reason or default_reason()):
        return differentiable(xla.PRODUCTS)
    return differentiable(_MOSAIC)


# Hopper's file is imported when it is needed: Mosaic GPU takes longer than jax itself.
# `jax.shard_map` takes what a kernel returns for the same on all devices: hence the casts.


def _forward(x, w, groups):
    from trix_kernels.grouped_matmul import hopper

    y = hopper.grouped_matmul(x, w.astype(x.dtype), groups.tile, used(groups))
    return vary_like(y, x)


def _transposed(dy, w, groups):
    from trix_kernels.grouped_matmul import hopper

    w, count = w.astype(dy.dtype), used(groups)
    dx = hopper.grouped_matmul(dy, w, groups.tile, count, transposed=True)
    return vary_like(dx, dy)


def _outer(x, dy, groups):
    from trix_kernels.grouped_matmul import hopper

    return vary_like(hopper.grouped_outer(x, dy, *runs(groups)), x)


_MOSAIC = Products(_forward, _transposed, _outer)


def used(groups: Groups) -> Integer[Array, "1"]:
    """How many blocks have rows that count."""
    return (groups.filled > 0).sum(keepdims=True, dtype=jnp.int32)


def runs(groups: Groups) -> tuple[Integer[Array, " N"], Integer[Array, " N"]]:
    """The first block of every tile and the rows of it that count; 0 and 0 where a tile
    has none.
    """
    filled_NM = jnp.where(
        groups.tile[None] == groups.numbers[:, None], groups.filled[None], 0
    )
    first_N = jnp.argmax(filled_NM > 0, axis=1).astype(jnp.int32)
    return first_N, filled_NM.sum(axis=1, dtype=jnp.int32)


def _oracle_forward(x, w, groups):
    y = reference.grouped_matmul(x, w.astype(x.dtype), groups.tile)
    return jnp.asarray(y, x.dtype)


def _oracle_transposed(dy, w, groups):
    dx = reference.transposed_matmul(dy, w.astype(dy.dtype), groups.tile)
    return jnp.asarray(dx, dy.dtype)


def _oracle_outer(x, dy, groups):
    tiles = groups.numbers.size
    dw = reference.grouped_outer(x, dy, groups.tile, groups.filled, tiles)
    return jnp.asarray(dw, summed(x.dtype))


_REFERENCE = Products(_oracle_forward, _oracle_transposed, _oracle_outer)
