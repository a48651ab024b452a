"""`tile_matmul` for Hopper (sm_90a): planar words decoded in registers, straight into
wgmma.

Weights are the left operand: a program computes `y[m].T = W[n] @ x[m].T` for one block
of rows and 64 or 128 outputs. TMA copies the 2-bit words and the rows of `x` in steps
of one planar block, double buffered; a step is eight wgmmas, one a plane.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Float32, Int8, Int32, UInt16

from trix_kernels.planar_gpu import (
    STAGES,
    hopper_multiply,
    result_smem,
    result_type,
    scale_rows,
    store_result,
    tiled,
)
from trix_kernels.weights import PLANES, planar_block

BUSY = 128  # programs that keep most cores of the GPU busy
CORES = 132


def features_of_program(blocks: int, outputs: int) -> int:
    """Outputs of a program: 128, or 64 where 128 does not divide or leaves cores idle."""
    return 64 if outputs % 128 or blocks * outputs // 128 < BUSY else 128


def programs_of(blocks: int, outputs: int) -> int:
    """Programs of a matmul that is not split."""
    return blocks * outputs // features_of_program(blocks, outputs)


def tile_matmul(
    x: BFloat16[Array, "M R I"] | Int8[Array, "M R I"],
    words: UInt16[Array, "N O words"],
    scale: Float[Array, "N G O"],
    block_tile: Int32[Array, " M"],
    used: Int32[Array, "1"],
    token_scale: Float[Array, "M R"] | None = None,
    *,
    splits: int = 1,
    interpreted: bool = False,
) -> BFloat16[Array, "M R O"] | Float32[Array, "splits M O R"]:
    """Computes `y[m] = (sum_g (x[m, :, g] @ q[n, g]) * scale[n, g]) * token_scale[m]`,
    `n = block_tile[m]`.

    Args:
        x: R is one of `weights.ROWS`; with groups at most 64, or registers would spill.
            int8 in the order of `weights.interleave`, in blocks of 256.
        words: planar.
        scale: for every output, with the factor that the planar code asks for, 1/2, or
            1/64 with int8.
        used: blocks from this one on are not computed, and what they hold is undefined.
        token_scale: of int8 activations; None where they are bfloat16.
        splits: parts of the contraction, each summed by programs of its own; only with
            one group. The result is then their float32 sums, `[splits, M, O, R]`, not
            scaled.
        interpreted: sends decoded planes through shared memory. For the interpreter,
            which cannot follow a wgmma whose left operand is in registers.
    """
    blocks, rows, contraction = x.shape
    outputs, groups = words.shape[1], scale.shape[1]
    block = planar_block(contraction, groups)
    width, steps = block // PLANES, contraction // block // splits
    features = features_of_program(blocks, outputs)
    is_int8 = token_scale is not None
    planes = PLANES // 2 if is_int8 else PLANES
    chunk, sums = block // planes, jnp.int32 if is_int8 else jnp.float32

    def program(tile_ref, used_ref, x_ref, w_ref, s_ref, *refs):
        token_ref, (y_ref, y_smem, *plane_smem) = refs[0], refs[is_int8:]
        m, f, s = (lax.axis_index(name) for name in "mfs")
        outs = pl.ds(f * features, features)

        def multiply(acc, w_smem, x_smem):
            def part(p):
                return x_smem.at[:, p * chunk : (p + 1) * chunk]

            staging = plane_smem[0] if interpreted else None
            hopper_multiply(acc, w_smem, part, staging)

        def scaled(product, group):
            product = product.astype(jnp.float32)
            return scale_rows(product, s_ref[tile_ref[m], group, outs])

        def pipeline(step, **carry):
            words = plgpu.BlockSpec(
                (features, width), lambda k: (f, s * steps + k), transforms=tiled(width)
            )
            part = plgpu.BlockSpec(
                (rows, block),
                lambda k: (0, s * steps + k),
                transforms=tiled(chunk, x.dtype.itemsize),
            )
            return plgpu.emit_pipeline(
                step,
                grid=(steps,),
                in_specs=[words, part],
                max_concurrent_steps=min(STAGES, steps),
                **carry,
            )(w_ref.at[tile_ref[m]], x_ref.at[m])

        def one_group(acc):
            pipeline(lambda _, w_smem, x_smem: multiply(acc, w_smem, x_smem))
            return acc[...]

        def step_of_groups(index, w_smem, x_smem, total):
            def product(acc):
                multiply(acc, w_smem, x_smem)
                return acc[...]

            out = pl.run_scoped(product, plgpu.ACC((features, rows), sums))
            return total + scaled(out, index[0] // (steps // groups))

        @pl.when(m < used_ref[0])
        def _():
            if groups == 1:
                acc = plgpu.ACC((features, rows), sums)
                out = pl.run_scoped(one_group, acc).astype(jnp.float32)
            else:
                zero = jnp.zeros((features, rows), jnp.float32)
                zero = plgpu.layout_cast(zero, plgpu.Layout.WGMMA)
                out = pipeline(step_of_groups, init_carry=zero)
            if groups == splits == 1:
                out = scaled(out, 0)
            if is_int8 and splits == 1:
                # A few floats: less than a whole cache line, which is not `optimized`.
                tokens = plgpu.load(token_ref.at[m], optimized=False)
                out = out * lax.broadcast_in_dim(tokens, out.shape, (1,))
            store_result(out, y_smem, y_ref, (m, outs, s), splits)

    scratch = [result_smem(rows, features, splits)]
    if interpreted:
        transforms = tiled(chunk, x.dtype.itemsize)
        scratch.append(plgpu.SMEM((features, chunk), x.dtype, transforms=transforms))
    more = (token_scale,) if is_int8 else ()
    return plgpu.kernel(
        program,
        out_type=result_type(blocks, rows, outputs, splits),
        grid=(blocks, outputs // features, splits),
        grid_names=("m", "f", "s"),
        scratch_types=scratch,
    )(block_tile, used, x, words, scale, *more)
