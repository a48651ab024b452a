"""What the Mosaic GPU kernels share: planar words decoded next to the tensor cores.

Weights are the left operand: `acc += (2 q) @ x.T` for one planar block of the
contraction, eight matrix instructions, one a plane. With int8 activations it is
`acc += (64 q) @ x.T` in four: the top two bits of both bytes of a word are, bit for
bit, the int8 0, +64 or -64.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith
from jax.extend.mlir.dialects import vector as mlir_vector
from jaxtyping import Array, BFloat16, Int8, UInt16

from trix_kernels.weights import PLANES

STAGES = 2  # steps whose copies are in flight
HALVES = 2  # of a block's planes on Blackwell, in turn

Ref = Any


def decode(words: UInt16[Array, "O width"], plane: int) -> BFloat16[Array, "O width"]:
    """Computes `2 q` of one plane of planar words: a shift and a mask."""
    bits = (words << jnp.uint16(2 * plane)) & jnp.uint16(0xC000)
    return lax.bitcast_convert_type(bits, jnp.bfloat16)


def decode_int8(words: UInt16[Array, "O width"], plane: int) -> Int8[Array, "O twice"]:
    """Computes `64 q` of planes `plane + 4` and `plane`, a byte of each in turn."""
    bits = (words << jnp.uint16(2 * plane)) & jnp.uint16(0xC0C0)
    return lax.bitcast_convert_type(bits, jnp.int8).reshape(words.shape[0], -1)


def decode_registers(
    words: UInt16[Array, "O width"],
    plane: int,
    dtype: Any = jnp.bfloat16,
    layout: plgpu.Layout = plgpu.Layout.WGMMA,
) -> Array:
    """Computes `decode` or, for int8, `decode_int8`, two words at a time.

    A thread holds the same 32 bits of a row in wgmma's layouts for 16-bit numbers and,
    twice as wide, for bytes; so bytes are a new name for registers that stay. Shifts
    cross from one word into the next only where the mask is zero.
    """
    is_int8 = dtype == jnp.int8
    shape = words.shape[0], words.shape[1] * (2 if is_int8 else 1)
    becomes = plgpu.Layout.WGMMA_8BIT if is_int8 else layout
    mask = 0xC0C0C0C0 if is_int8 else 0xC000C000

    @plgpu.inline_mgpu(
        arg_types=(layout,),
        return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout=becomes),
    )
    def run(_, words):
        pair = ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
        if is_int8:
            decoded = ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
        else:
            decoded = ir.VectorType.get((2,), ir.BF16Type.get())

        def constant(value):
            value = value - (value >> 31 << 32)  # as a signed number
            attribute = ir.IntegerAttr.get(pair.element_type, value)
            splat = ir.DenseElementsAttr.get_splat(pair, attribute)
            return arith.constant(pair, splat)

        registers = np.empty_like(words.registers)
        for i, register in np.ndenumerate(words.registers):
            bits = mlir_vector.bitcast(pair, register)
            bits = arith.shli(bits, constant(2 * plane)) if plane else bits
            bits = arith.andi(bits, constant(mask))
            registers[i] = mlir_vector.bitcast(decoded, bits)
        return mgpu.FragmentedArray(
            _registers=registers,
            _layout=becomes.to_mgpu(),
            _is_signed=True if is_int8 else None,
        )

    return run(words)


def tiled(width: int, bytes_each: int = 2) -> tuple:
    """Shared memory in tiles of 8 rows of `width` numbers, swizzled inside a row."""
    swizzle = plgpu.SwizzleTransform(bytes_each * width)
    return plgpu.TilingTransform((8, width)), swizzle


def hopper_multiply(
    acc: Ref, w_smem: Ref, part: Callable[[int], Ref], plane_smem: Ref | None = None
) -> None:
    """Adds one planar block to a wgmma accumulator, planes decoded in registers.

    Args:
        acc: float32, or int32 where activations are int8.
        part: the activations `[R, b/8]` of a plane, or int8 `[R, b/4]` of two.
        plane_smem: sends decoded planes through shared memory instead. For the
            interpreter, which cannot follow a wgmma whose left operand is in registers.
    """
    words = w_smem[...]
    plgpu.commit_smem()  # they are read before the next copy overwrites them
    is_int8 = acc.dtype == jnp.int32
    for p in range(PLANES // 2 if is_int8 else PLANES):
        right = part(p).transpose((1, 0))
        if plane_smem is None:
            plane = decode_registers(words, p, jnp.int8 if is_int8 else jnp.bfloat16)
            plgpu.wgmma(acc, plane, right)
        else:
            plane_smem[...] = (decode_int8 if is_int8 else decode)(words, p)
            plgpu.commit_smem()
            plgpu.wgmma(acc, plane_smem, right)
            plgpu.wgmma_wait(0)
    plgpu.wgmma_wait(0)


def blackwell_multiply(
    acc: Ref,
    w_smem: Ref,
    part: Callable[[int], Ref],
    planes: Ref,
    done: Ref,
    accumulate: Any,
    follows: Any,
    interpreted: bool = False,
) -> None:
    """Adds one planar block to an accumulator in tensor memory, or starts it anew.

    The block goes in halves of four planes: while the tensor core multiplies one, the
    other is decoded. Both may still be at work when this returns; `drain` waits.

    Args:
        part: the activations `[R, b/8]` of a plane.
        planes: tensor memory for the decoded block.
        done: two barriers that order the tensor core, one a half.
        accumulate: False starts anew.
        follows: whether the halves of a step before may be at work.
        interpreted: decodes by operations that the interpreter knows.
    """
    words = plgpu.load(w_smem, layout=plgpu.Layout.TCGEN05)
    plgpu.commit_smem()  # they are read before the next copy overwrites them
    width = words.shape[-1]

    def plane_of(p):
        return planes.at[:, p * width : (p + 1) * width]

    for half in range(HALVES):
        of_half = range(half * PLANES // HALVES, (half + 1) * PLANES // HALVES)
        pl.when(follows)(lambda half=half: plgpu.barrier_wait(done.at[half]))
        for p in of_half:
            if interpreted:
                decoded = decode(words, p)
            else:
                decoded = decode_registers(words, p, layout=plgpu.Layout.TCGEN05)
            plgpu.async_store_tmem(plane_of(p), decoded)
        plgpu.commit_tmem()
        for p in of_half:
            right = part(p).transpose((1, 0))
            plgpu.tcgen05_mma(
                acc, plane_of(p), right, accumulate=True if p else accumulate
            )
        plgpu.tcgen05_commit_arrive(done.at[half])


def drain(done: Ref) -> None:
    """Waits for both halves of a `blackwell_multiply`."""
    for half in range(HALVES):
        plgpu.barrier_wait(done.at[half])


def load_accumulator(acc: Ref) -> Array:
    """Reads an accumulator from tensor memory."""
    product = plgpu.async_load_tmem(acc, layout=plgpu.Layout.TCGEN05)
    plgpu.wait_load_tmem()
    return product


def scale_rows(product: Array, scale: Array) -> Array:
    """Computes `product * scale[:, None]`."""
    return product * lax.broadcast_in_dim(scale, product.shape, (0,))


def result_type(blocks: int, rows: int, outputs: int, splits: int) -> Any:
    """What a matmul kernel returns: `[M, R, O]`, or with splits of the contraction the
    float32 sums `[splits, M, O, R]`, not scaled.
    """
    if splits > 1:
        return jax.ShapeDtypeStruct((splits, blocks, outputs, rows), jnp.float32)
    return jax.ShapeDtypeStruct((blocks, rows, outputs), jnp.bfloat16)


def result_smem(rows: int, features: int, splits: int) -> Any:
    """Shared memory on a result's way out."""
    if splits > 1:
        width = min(rows, 32)
        return plgpu.SMEM((features, rows), jnp.float32, transforms=tiled(width, 4))
    return plgpu.SMEM((rows, features), jnp.bfloat16, transforms=tiled(64))


def store_result(out: Array, y_smem: Ref, y_ref: Ref, at: tuple, splits: int) -> None:
    """Stores `out.T` at block, outputs; or with splits `out` at split, block, outputs."""
    block, outs, split = at
    if splits > 1:
        y_smem[...], target = out, y_ref.at[split, block, outs, :]
    else:
        y_smem.T[...], target = out.astype(jnp.bfloat16), y_ref.at[block, :, outs]
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(y_smem, target)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
