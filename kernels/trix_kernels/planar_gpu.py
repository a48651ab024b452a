"""What the Mosaic GPU kernels share: planar words decoded next to the tensor cores.

Weights are the left operand: `acc += (2 q) @ x.T` for one planar block of the
contraction, eight matrix instructions, one a plane.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, UInt16

from trix_kernels.weights import PLANES

STAGES = 2  # steps whose copies are in flight

Ref = Any


def decode(words: UInt16[Array, "O width"], plane: int) -> BFloat16[Array, "O width"]:
    """Computes `2 q` of one plane of planar words: a shift and a mask."""
    bits = (words << jnp.uint16(2 * plane)) & jnp.uint16(0xC000)
    return lax.bitcast_convert_type(bits, jnp.bfloat16)


def tiled(width: int) -> tuple:
    """Shared memory in tiles of 8 rows of `width` 16-bit numbers, swizzled inside a
    row.
    """
    return plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(2 * width)


def hopper_multiply(
    acc: Ref, w_smem: Ref, part: Callable[[int], Ref], plane_smem: Ref | None = None
) -> None:
    """Adds one planar block to a wgmma accumulator, planes decoded in registers.

    Args:
        part: the activations `[R, b/8]` of a plane.
        plane_smem: sends decoded planes through shared memory instead. For the
            interpreter, which cannot follow a wgmma whose left operand is in registers.
    """
    words = w_smem[...]
    plgpu.commit_smem()  # they are read before the next copy overwrites them
    for p in range(PLANES):
        plane = decode(words, p)
        if plane_smem is None:
            plgpu.wgmma(acc, plane, part(p).transpose((1, 0)))
        else:
            plane_smem[...] = plane
            plgpu.commit_smem()
            plgpu.wgmma(acc, plane_smem, part(p).transpose((1, 0)))
            plgpu.wgmma_wait(0)
    plgpu.wgmma_wait(0)


def blackwell_multiply(
    acc: Ref,
    w_smem: Ref,
    part: Callable[[int], Ref],
    planes: Ref,
    done: Ref,
    accumulate: Any,
) -> None:
    """Adds one planar block to an accumulator in tensor memory, or starts it anew.

    Args:
        part: the activations `[R, b/8]` of a plane.
        planes: tensor memory for the decoded block.
        done: a barrier that orders the tensor core.
    """
    words = plgpu.load(w_smem, layout=plgpu.Layout.TCGEN05)
    plgpu.commit_smem()  # they are read before the next copy overwrites them
    width = words.shape[-1]
    for p in range(PLANES):
        plane = planes.at[:, p * width : (p + 1) * width]
        plgpu.async_store_tmem(plane, decode(words, p))
    plgpu.commit_tmem()
    for p in range(PLANES):
        plane = planes.at[:, p * width : (p + 1) * width]
        right = part(p).transpose((1, 0))
        plgpu.tcgen05_mma(acc, plane, right, accumulate=True if p else accumulate)
    plgpu.tcgen05_commit_arrive(done)
    plgpu.barrier_wait(done)


def load_accumulator(acc: Ref) -> Array:
    """Reads an accumulator from tensor memory."""
    product = plgpu.async_load_tmem(acc, layout=plgpu.Layout.TCGEN05)
    plgpu.wait_load_tmem()
    return product


def scale_rows(product: Array, scale: Array) -> Array:
    """Computes `product * scale[:, None]`."""
    return product * lax.broadcast_in_dim(scale, product.shape, (0,))
