"""Ternary weights at rest in a kernel's own layout: two bits each, or a byte, and
bfloat16 scales beside.

    "rows"    uint8  [*N, I, O / 4]   what XLA decodes, vectorized on CPUs
    "planar"  uint16 [*N, O, I / 8]   what the Mosaic GPU kernels decode
    "bytes"   int8   [*N, I, O]       nothing to decode, four times the memory

Byte j of a row holds the weights to outputs j, j + W, j + 2 W, j + 3 W, `W = ceil(O /
4)`, the first in its lowest bits, so that four shifts of a row are its four quarters
and nothing is interleaved; -1 is 11, two bits of a signed number.

Planar words cut the contraction into blocks of b weights; word j of a block holds the
eight weights j, j + b/8, j + 2b/8, ..., the first in its highest two bits:

    word[o, k b/8 + j] = sum over p of code(q[k b + p b/8 + j, o]) << (14 - 2 p)
    code(0) = 00,  code(+1) = 01,  code(-1) = 11

so that `(word << 2 p) & 0xC000` is, bit for bit, the bfloat16 0, +2 or -2, and plane p
meets the p-th eighth of the block's activations: no shuffle and no conversion. The 2 is
taken out of the scale. Layouts are private: files hold `packing`'s format.
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8, Integer, Num, UInt

Layout = Literal["rows", "planar", "bytes"]

PLANES = 8
BLOCKS = (256, 128)  # weights of the contraction in a planar block, best first
ROWS = (8, 16, 32, 64, 128)  # rows of a block that the Mosaic GPU kernels take


class Packed(NamedTuple):
    """Weights `q * scale` in two bits each, or in a byte.

    Attributes:
        bits: uint8 in the layout "rows", uint16 in "planar", int8 in "bytes".
        scale: one per group of the contraction and output, or broadcast over outputs.
    """

    bits: Integer[Array, "*N rows words"]
    scale: Float[Array, "*N G S"]


def check_contraction(x: Num[Array, "*B I"], weights: Packed) -> None:
    """Raises a ValueError unless `x` has as many channels as the weights contract."""
    *_, rows, words = weights.bits.shape
    inputs = words * PLANES if layout_of(weights) == "planar" else rows
    if x.shape[-1] != inputs:
        raise ValueError(
            f"x must have {inputs} channels, as the weights. Got {x.shape[-1]}."
        )


def layout_of(weights: Packed) -> Layout:
    """The layout, which the type of the words tells."""
    layouts: dict[str, Layout] = {"uint8": "rows", "uint16": "planar", "int8": "bytes"}
    return layouts[weights.bits.dtype.name]


def pack(
    q: Num[Array, "*N I O"], scale: Float[Array, "*N G S"], layout: Layout = "rows"
) -> Packed:
    """Ternary weights to two bits each, or a byte; exact.

    Raises:
        ValueError: the shape has no planar layout (`planar_unsupported_reason`), or the
            contraction is not cut into as many groups as there are scales.
    """
    if q.shape[-2] % scale.shape[-2]:
        raise ValueError(
            f"scale must have a number of groups that divides {q.shape[-2]}, the "
            f"contraction. Got {scale.shape[-2]}."
        )
    scale = scale.astype(jnp.bfloat16)
    if layout == "bytes":
        return Packed(jnp.sign(q).astype(jnp.int8), scale)
    if layout == "rows":
        return Packed(_pack_rows(q), scale)
    *lead, rows, features = q.shape
    if reason := planar_unsupported_reason(rows, features, scale.shape[-2]):
        raise ValueError(reason)
    block = planar_block(rows, scale.shape[-2])
    cut = jnp.swapaxes(q, -1, -2).reshape(*lead, features, -1, PLANES, block // PLANES)
    code = jnp.where(cut > 0, 1, jnp.where(cut < 0, 3, 0)).astype(jnp.uint16)
    shifted = code << _shifts(code.ndim)
    words = shifted.sum(axis=-2, dtype=jnp.uint16)
    return Packed(words.reshape(*lead, features, rows // PLANES), scale)


def unpack(
    weights: Packed, features: int, dtype=jnp.float32
) -> tuple[Num[Array, "*N I O"], Float[Array, "*N G S"]]:
    """`q` in `dtype` and the scale in float32: the inverse of `pack` in any layout."""
    bits, scale = weights.bits, weights.scale.astype(jnp.float32)
    if layout_of(weights) == "bytes":
        return bits[..., :features].astype(dtype), scale
    if layout_of(weights) == "rows":
        # To the top of 32 bits and down again. Products, as XLA adds a check to shifts
        # to the left: 57 instead of 77 us for 65,536 weights on an AMD EPYC core.
        up = np.int32(1) << np.arange(30, 22, -2, dtype=np.int32)
        up = up.reshape(*[1] * (bits.ndim - 1), 4, 1)
        code = (bits[..., None, :].astype(jnp.int32) * up) >> np.int32(30)
        q = code.astype(dtype)
        return q.reshape(*bits.shape[:-1], 4 * bits.shape[-1])[..., :features], scale
    *lead, _, words = bits.shape
    width = planar_block(words * PLANES, scale.shape[-2]) // PLANES
    cut = bits.reshape(*lead, features, -1, 1, width)
    code = (cut >> _shifts(cut.ndim)) & jnp.uint16(3)
    q = jnp.where(code == 3, -1, code.astype(jnp.int8)).astype(dtype)
    return jnp.swapaxes(q.reshape(*lead, features, words * PLANES), -1, -2), scale


def packed_shape(shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    """The shape of the words of weights `[*N, I, O]`."""
    *lead, rows, features = shape
    if layout == "planar":
        return (*lead, features, rows // PLANES)
    return (*lead, rows, -(-features // 4) if layout == "rows" else features)


def in_bytes(bits: Integer[Array, "*N rows words"]) -> Int8[Array, "*N I O"]:
    """Words of the layout "rows" or "bytes" in the layout "bytes", four columns a word:
    where O is no multiple of 4 the last ones are zeros, as in the words.

    Raises:
        ValueError: words of the layout "planar", which a GPU's kernels take.
    """
    if bits.dtype == jnp.uint16:
        raise ValueError(
            "weights packed for a GPU's kernels stay as they are: those take no bytes."
        )
    if bits.dtype == jnp.int8:
        return bits
    one = jnp.ones((*bits.shape[:-2], 1, 1))
    return unpack(Packed(bits, one), 4 * bits.shape[-1], jnp.int8)[0]


def _pack_rows(q: Num[Array, "*N I O"]) -> UInt[Array, "*N I words"]:
    words = -(-q.shape[-1] // 4)
    padding = [(0, 0)] * (q.ndim - 1) + [(0, 4 * words - q.shape[-1])]
    code = jnp.pad(jnp.sign(q).astype(jnp.int8), padding) & np.int8(3)
    code = code.astype(jnp.uint8).reshape(*q.shape[:-1], 4, words)
    shifts = np.arange(0, 8, 2, dtype=np.uint8).reshape(*[1] * (q.ndim - 1), 4, 1)
    return (code << shifts).sum(axis=-2, dtype=jnp.uint8)


def planar_unsupported_reason(rows: int, features: int, groups: int = 1) -> str | None:
    """Why weights of this shape have no planar layout; None where they have."""
    group = rows // groups
    if group % min(BLOCKS):
        return (
            f"The contraction, in {groups} group(s) of {group} weights, must be a "
            f"multiple of {min(BLOCKS)}."
        )
    if features % 64:
        return f"features={features} must be a multiple of 64."
    return None


def planar_block(rows: int, groups: int = 1) -> int:
    """Weights of the contraction in a block: the largest that divides a group."""
    return next(block for block in BLOCKS if rows // groups % block == 0)


def _shifts(ndim: int) -> np.ndarray:
    shifts = np.arange(14, -2, -2, dtype=np.uint16)
    return shifts.reshape(*[1] * (ndim - 2), PLANES, 1)


def interleave(values: Int8[Array, "*B I"]) -> Int8[Array, "*B I"]:
    """Reorders int8 activations as Hopper's kernel meets them: plane p of a block of
    256 takes the low bytes' weights (plane p + 4) and the high bytes' (plane p) in turn.
    """
    *lead, rows = values.shape
    cut = values.reshape(*lead, -1, 2, PLANES // 2, BLOCKS[0] // PLANES)
    low_first = jnp.moveaxis(cut[..., ::-1, :, :], -3, -1)
    return low_first.reshape(*lead, rows)
