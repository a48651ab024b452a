"""`tile_matmul` for Hopper (sm_90a): planar words decoded in registers, straight into
wgmma.

Weights are the left operand: a program computes `y[m].T = W[n] @ x[m].T` for one block
of rows and 64 or 128 outputs. TMA copies the 2-bit words and the rows of `x` in steps
of one planar block, double buffered; a step is eight wgmmas, one a plane.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Int32, UInt16

from trix_kernels.planar_gpu import STAGES, hopper_multiply, scale_rows, tiled
from trix_kernels.weights import PLANES, planar_block

BUSY = 128  # programs that keep most cores of the GPU busy


def features_of_program(blocks: int, outputs: int) -> int:
    """Outputs of a program: 128, or 64 where 128 does not divide or leaves cores idle."""
    return 64 if outputs % 128 or blocks * outputs // 128 < BUSY else 128


def tile_matmul(
    x: BFloat16[Array, "M R I"],
    words: UInt16[Array, "N O words"],
    scale: Float[Array, "N G O"],
    block_tile: Int32[Array, " M"],
    used: Int32[Array, "1"],
    *,
    staged: bool = False,
) -> BFloat16[Array, "M R O"]:
    """Computes `y[m] = sum_g (x[m, :, g] @ q[n, g]) * scale[n, g]`, `n =
    block_tile[m]`.

    Args:
        x: R is one of `weights.ROWS`; with groups at most 64, or registers would spill.
        words: planar.
        scale: for every output, with the factor 1/2 that the planar code asks for.
        used: blocks from this one on are not computed, and what they hold is undefined.
        staged: sends decoded planes through shared memory. For the interpreter, which
            cannot follow a wgmma whose left operand is in registers.
    """
    blocks, rows, contraction = x.shape
    outputs, groups = words.shape[1], scale.shape[1]
    block = planar_block(contraction, groups)
    width, steps = block // PLANES, contraction // block
    features = features_of_program(blocks, outputs)

    def program(tile_ref, used_ref, x_ref, w_ref, s_ref, y_ref, y_smem, *plane_smem):
        m, f = lax.axis_index("m"), lax.axis_index("f")
        outs = pl.ds(f * features, features)

        def multiply(acc, w_smem, x_smem):
            part = lambda p: x_smem.at[:, p * width : (p + 1) * width]  # noqa: E731
            hopper_multiply(acc, w_smem, part, *plane_smem)

        def scaled(product, group):
            return scale_rows(product, s_ref[tile_ref[m], group, outs])

        def pipeline(step, **carry):
            words = plgpu.BlockSpec(
                (features, width), lambda k: (f, k), transforms=tiled(width)
            )
            part = plgpu.BlockSpec(
                (rows, block), lambda k: (0, k), transforms=tiled(width)
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

            out = pl.run_scoped(product, plgpu.ACC((features, rows)))
            return total + scaled(out, index[0] // (steps // groups))

        @pl.when(m < used_ref[0])
        def _():
            if groups == 1:
                out = scaled(pl.run_scoped(one_group, plgpu.ACC((features, rows))), 0)
            else:
                zero = jnp.zeros((features, rows), jnp.float32)
                zero = plgpu.layout_cast(zero, plgpu.Layout.WGMMA)
                out = pipeline(step_of_groups, init_carry=zero)
            y_smem.T[...] = out.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(y_smem, y_ref.at[m, :, outs])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    scratch = [plgpu.SMEM((rows, features), jnp.bfloat16, transforms=tiled(64))]
    if staged:
        plane = plgpu.SMEM((features, width), jnp.bfloat16, transforms=tiled(width))
        scratch.append(plane)
    return plgpu.kernel(
        program,
        out_type=jax.ShapeDtypeStruct((blocks, rows, outputs), jnp.bfloat16),
        grid=(blocks, outputs // features),
        grid_names=("m", "f"),
        scratch_types=scratch,
    )(block_tile, used, x, words, scale)
