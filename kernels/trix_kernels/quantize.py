"""Activations as eight-bit integers, a scale a token: the second mode of the matmuls.

    values = round(x * (127 / max|x|)), ties to even        scale = max|x| * (1/127)
    (x @ q) * s  becomes  ((values @ q) * s) * scale, the inner sum an exact integer

Written as products, because compilers make products of most of the divisions here, but
not of all. On a GPU XLA's division is off by up to two units in the last place, so a
value next to a half may be rounded otherwise than on a CPU (0.02% of normal numbers on
an H100). A token whose largest magnitude is below 2^-119 (its scale would not be a
normal number) counts as zero: values 0, scale 1. One that holds NaN or infinity gives a
row of NaN, alone.

References:
    Ma et al., 2024, "The Era of 1-bit LLMs: All Large Language Models are in 1.58
    Bits", https://arxiv.org/abs/2402.17764 (absmax per token).
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

Activations = Literal["float", "int8"]

# 127 * 132,104 < 2^24: up to here a sum is exact in float32 too, so that a model in
# training, which needs gradients, sums floats and gets the same. Int32 would hold 128
# times as much, Hopper's planes of 64 q twice as much.
LONGEST = 132_104
SMALLEST = 2.0**-119  # 127 times the smallest normal float32, rounded up to a power


class Quantized(NamedTuple):
    """Activations `values * scale`."""

    values: Int8[Array, "*B I"]
    scale: Float[Array, "*B 1"]


def quantize(x: Float[Array, "*B I"]) -> Quantized:
    """Computes `values = round(x * (127 / max|x|))` and `scale = max|x| / 127`, a token.

    Raises:
        ValueError: a token is too long for its sums to be exact.
    """
    if x.shape[-1] > LONGEST:
        raise ValueError(
            f"int8 activations take contractions of at most {LONGEST}. Got {x.shape[-1]}."
        )
    x = x.astype(jnp.float32)
    largest = jnp.abs(x).max(axis=-1, keepdims=True)
    largest = jnp.where(largest < SMALLEST, 127, largest)
    values = jnp.round(x * (127 / largest))
    # int8 has no NaN; the scale has. (A comparison with NaN is false.)
    values = jnp.where(jnp.abs(values) <= 127, values, 0).astype(jnp.int8)
    return Quantized(values, largest * np.float32(1 / 127))


@jax.custom_jvp
def quantize_through(
    x: Float[Array, "*B I"],
) -> tuple[Float[Array, "*B I"], Float[Array, "*B 1"]]:
    """`quantize` for gradients: the integers as floats, which hold them and their sums
    exactly, with the gradient of `x / scale`; the scale has none.
    """
    values, scale = quantize(x)
    return values.astype(_wide(x).dtype), scale


@quantize_through.defjvp
def _quantize_through_jvp(primals, tangents):
    values, scale = quantize_through(*primals)  # itself, for second derivatives
    real = _wide(tangents[0]) / scale.astype(values.dtype)
    return (values, scale), (real, jnp.zeros_like(scale))


def _wide(x):
    # A token's scale, and what it multiplies, underflow in float16.
    return x.astype(jnp.float32) if x.dtype == jnp.float16 else x
