"""The one seam between the layers and `trix_kernels`: matmuls on ternary weights,
packed or not.

Whatever holds the weights, the numbers are the same: `(x @ q) * scale` in this order,
accumulated in float32, the sum over groups of the contraction in ascending order. On
the XLA path a frozen layer therefore equals its fake-quantized forward bit for bit.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import trix_kernels
from trix_jax.ternary import Activations, Ternary
from trix_jax.typing import Array, Float, Integer, Variables
from trix_kernels import Packed as Packed
from trix_kernels import choice
from trix_kernels.derivatives import linear_map as linear_map
from trix_kernels.derivatives import with_backward as with_backward
from trix_kernels.derivatives import with_kept as with_kept
from trix_kernels.device import default_device as default_device
from trix_kernels.device import platform as platform
from trix_kernels.grouped_matmul import api as grouped
from trix_kernels.grouped_matmul import grouped_matmul as grouped_matmul
from trix_kernels.grouped_matmul import grouped_outer as grouped_outer
from trix_kernels.grouped_matmul import transposed_matmul as transposed_matmul
from trix_kernels.grouped_matmul.api import Implementation as Implementation
from trix_kernels.grouped_matmul.numbered import knows as knows
from trix_kernels.grouped_matmul.numbered import (
    numbered_hidden_gradient as numbered_hidden_gradient,
)
from trix_kernels.grouped_matmul.numbered import numbered_matmul as numbered_matmul
from trix_kernels.grouped_matmul.numbered import (
    numbered_matmul_and_act as numbered_matmul_and_act,
)
from trix_kernels.grouped_matmul.numbered import numbered_outer as numbered_outer
from trix_kernels.grouped_matmul.products import Groups as Groups
from trix_kernels.tile_ffn import xla as ffn_xla
from trix_kernels.tile_ffn.blockwise import Rows as Rows
from trix_kernels.tile_ffn.sets import Members as Members
from trix_kernels.tile_ffn.sets import join as join
from trix_kernels.tile_ffn.sets import sets_ffn as sets_ffn
from trix_kernels.tile_ffn.xla import suits_batches as suits_batches
from trix_kernels.tile_matmul import xla
from trix_kernels.tile_matmul.api import int8_reason
from trix_kernels.varying import vary_alike as vary_alike
from trix_kernels.varying import vary_like as vary_like
from trix_kernels.weights import (
    ROWS,
    layout_of,
    planar_unsupported_reason,
)
from trix_kernels.weights import in_bytes as in_bytes
from trix_kernels.weights import packed_shape as packed_shape

PACKED = "packed"  # the Flax collection that holds packed weights

GROUPED_ROWS = grouped.ROWS  # of a block that the kernels of grouped products take

Weights = Ternary | Packed


def pack(weights: Ternary, by_row: bool = False) -> Packed:
    """Ternary weights to two bits each; exact.

    In the layout of the Mosaic GPU kernels where the default device runs them and the
    shape has it, else in that of the XLA path.

    Args:
        by_row: takes the XLA path's layout everywhere, of which rows can be taken.
    """
    rows, features = weights.q.shape[-2:]
    has_planar = planar_unsupported_reason(rows, features, weights.scale.shape[-2])
    on_gpu = trix_kernels.device.arch() is not None
    is_planar = on_gpu and has_planar is None and not by_row
    layout = "planar" if is_planar else "rows"
    return trix_kernels.pack(weights.q, weights.scale, layout)


def unpack(weights: Weights, features: int) -> Ternary:
    """The inverse of `pack` for weights of `features` outputs; ternary weights pass
    through.
    """
    if isinstance(weights, Ternary):
        return weights
    q, scale = trix_kernels.unpack(weights, features)
    return Ternary(q, scale)


def implementation(
    variables: Variables,
    activations: Activations = "float",
    dtype: Any = jnp.bfloat16,
    asked: Implementation | None = None,
) -> str:
    """Which ternary matmuls a model with these variables runs on the default device.

    Args:
        dtype: of the computation.
        asked: the model's `implementation`, which says what computes whole weights.
    """
    packed = "packed" if activations == "float" else "packed, int8 activations"
    if PACKED not in variables:
        is_taken = asked == "mosaic_gpu" or (asked is None and not whole_reason())
        is_taken = is_taken and jnp.dtype(dtype) == jnp.bfloat16
        runs_whole = activations == "float" and is_taken and not grouped.device_reason()
        where = "mosaic_gpu where shapes allow" if runs_whole else "xla"
        return f"{where}, weights not {packed}"
    reason = trix_kernels.device.unsupported_reason()
    if reason is None and activations == "int8":
        reason = int8_reason()
    reason = reason or (None if asked == "mosaic_gpu" else _default_reason(activations))
    if reason:
        return f"xla, {packed}. {reason}"
    return f"mosaic_gpu where shapes allow, {packed}"


def _default_reason(activations: Activations) -> str | None:
    """Why packed weights meet XLA by default in blocks of any size."""
    arch = trix_kernels.device.arch()
    if arch is None:
        return None
    found = [choice.choose(arch, rows, activations) for rows in choice.SIZES]
    if any(each.implementation == "mosaic_gpu" for each in found):
        return None
    return f"The GPU kernels of packed weights: {found[0].reason}."


def whole_reason() -> str | None:
    """Why whole weights meet XLA by default where the default device has kernels for
    them, and how to get these; None where the default is the kernels.
    """
    if reason := grouped.default_reason():
        return (
            f"The GPU kernels of this FFN: {reason}; --model.implementation mosaic_gpu "
            "takes them."
        )
    return None


def grouped_reason(dtype: Any, inputs: int, outputs: int) -> str | None:
    """Why the GPU kernels of grouped products do not run on rows of `dtype` and weights of
    `inputs` and `outputs`, in blocks of `GROUPED_ROWS`; None where they do.
    """
    block = jax.ShapeDtypeStruct((1, GROUPED_ROWS, inputs), dtype)
    return grouped.unsupported_reason(block, inputs, outputs)


def least_rows(weights: Weights) -> int:
    """Rows that a block must have at least for the kernels that these weights are
    packed for.
    """
    is_planar = isinstance(weights, Packed) and layout_of(weights) == "planar"
    return min(ROWS) if is_planar else 1


def matmul(
    x: Float[Array, "T I"],
    weights: Weights,
    features: int,
    activations: Activations = "float",
) -> Float[Array, "T N O"]:
    """Computes `(x @ q_n) * scale_n` for every tile n, in the dtype of `x`.

    Args:
        activations: "int8" rounds every token to integers, see `trix_kernels.quantize`.
    """
    # All tiles are one wider matrix: they read the same tokens.
    if isinstance(weights, Packed) and layout_of(weights) == "planar":
        n, width, words = weights.bits.shape  # outputs are rows of the words
        scale = _side_by_side(weights.scale, width)
        joined = Packed(weights.bits.reshape(n * width, words), scale)
        y = trix_kernels.ternary_matmul(x, joined, n * width, activations=activations)
        return y.reshape(-1, n, width)
    product = _matmul
    if isinstance(weights, Packed):
        dtype = jnp.int8 if activations == "int8" else jnp.float32
        weights = Ternary(*trix_kernels.unpack(weights, features, dtype))
        product = xla.packed_matmul
    q, scale = (_side_by_side(leaf, features) for leaf in weights)
    y = product(x, q, scale, activations)
    return y.reshape(x.shape[0], weights[0].shape[0], features)


def _side_by_side(tiles: Array, features: int) -> Array:
    """`[N, I, 1 or O]` as `[I, N * O]`."""
    wide = jnp.broadcast_to(tiles, (*tiles.shape[:2], features))
    return jnp.moveaxis(wide, 0, 1).reshape(tiles.shape[1], len(tiles) * features)


def read_rows(
    x: Float[Array, "T I"], weights: Weights, rows: Integer[Array, "T K"], dtype: Any
) -> Float[Array, "T K"]:
    """Computes `<x_t, q_n> * scale`, n = `rows[t, k]`, of weights `[N, I]` with one
    scale: products in `dtype`, their sums and the result in float32.

    Only the rows asked for are unpacked; nothing is computed of the others.
    """
    q_TKI, scale = _rows(weights, rows, x.shape[-1], dtype)
    found = jnp.einsum(
        "tki,ti->tk", q_TKI, x.astype(dtype), preferred_element_type=jnp.float32
    )
    return found * scale


def write_rows(
    a: Float[Array, "T K"],
    weights: Weights,
    rows: Integer[Array, "T K"],
    features: int,
    dtype: Any,
) -> Float[Array, "T O"]:
    """Computes `sum_k a_tk * q_n * scale`, n = `rows[t, k]`, of weights `[N, O]` with
    one scale, as `read_rows` does.
    """
    q_TKO, scale = _rows(weights, rows, features, dtype)
    y = jnp.einsum(
        "tk,tko->to", a.astype(dtype), q_TKO, preferred_element_type=jnp.float32
    )
    return y * scale


def _rows(weights, rows, features, dtype):
    """Rows of ternary weights `[T, K, O]`, and the scale of all."""
    scale = weights.scale.astype(jnp.float32)
    if isinstance(weights, Ternary):
        return weights.q[rows].astype(dtype), scale
    if layout_of(weights) == "planar":
        return unpack(weights, features).q[rows].astype(dtype), scale
    each = jnp.broadcast_to(scale, (rows.shape[0], *scale.shape))
    taken = Packed(weights.bits[rows], each)
    return trix_kernels.unpack(taken, features, dtype)[0], scale


def tile_ffn(
    x: Float[Array, "M R D"],
    up: Weights,
    down: Weights,
    block_tile: Integer[Array, " M"],
    shape: tuple[int, int],
    act: Callable,
    used: Integer[Array, "1"] | None = None,
    activations: Activations = "float",
    implementation: Implementation | None = None,
) -> Float[Array, "M R O"]:
    """Computes `act(x_m @ up_n) @ down_n`, `n = block_tile[m]`, in one kernel where
    there is one.

    Args:
        shape: F, the hidden width, and O.
        used: blocks from this one on need not be computed; None computes all.
        activations: as for `matmul`.
        implementation: of packed weights, see `trix_kernels.block_ffn`; others run XLA.
    """
    if isinstance(up, Packed) and isinstance(down, Packed):
        mode: dict[str, Any] = {"used": used, "activations": activations}
        mode["implementation"] = implementation
        return trix_kernels.block_ffn(x, up, down, block_tile, shape, act, **mode)
    if activations == "float":
        return ffn_xla.tile_ffn(x, up, down, block_tile, shape, act, used)

    def product(x, w):
        return _matmul(x, w[0][block_tile], w[1][block_tile], activations)

    return product(act(product(x, up)), down)


def blocks_matmul(
    x: Float[Array, "M R I"], weights: Ternary, block_tile: Integer[Array, " M"]
) -> Float[Array, "M R O"]:
    """Computes `(x_m @ q_n) * scale_n`, `n = block_tile[m]`: what a block meets of packed
    weights, by XLA.
    """
    pair = xla.of_blocks(tuple(weights), block_tile, weights.q.shape[-1])
    return xla.matmul(x, *pair)


def _matmul(x, q, scale, activations: Activations):
    """Computes `(x @ q) * scale` of weights in training, with gradients; that of `x`
    passes straight through the rounding to integers.
    """
    if activations == "float":
        return xla.matmul(x, q, scale)
    return xla.int8_matmul(x, q, scale)
