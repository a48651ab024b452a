"""`tile_matmul` for Blackwell (sm_100a): planar words decoded into tensor memory for
tcgen05.

As in `hopper`, weights are the left operand; here the decoded planes of a step and the
accumulator live in tensor memory, so what is interpreted in tests is what ships.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Int32, UInt16

from trix_kernels.planar_gpu import (
    STAGES,
    blackwell_multiply,
    load_accumulator,
    scale_rows,
    tiled,
)
from trix_kernels.weights import PLANES, planar_block

FEATURES = 128  # outputs that one program computes, the rows of tensor memory


def tile_matmul(
    x: BFloat16[Array, "M R I"],
    words: UInt16[Array, "N O words"],
    scale: Float[Array, "N G O"],
    block_tile: Int32[Array, " M"],
    used: Int32[Array, "1"],
) -> BFloat16[Array, "M R O"]:
    """Computes `y[m] = sum_g (x[m, :, g] @ q[n, g]) * scale[n, g]`, `n =
    block_tile[m]`.

    Arguments as in `hopper.tile_matmul`; O is a multiple of 128.
    """
    blocks, rows, contraction = x.shape
    outputs, groups = words.shape[1], scale.shape[1]
    block = planar_block(contraction, groups)
    width, steps = block // PLANES, contraction // block
    per_group = steps // groups

    def program(
        tile_ref, used_ref, x_ref, w_ref, s_ref, y_ref, y_smem, acc, planes, done
    ):
        m, f = lax.axis_index("m"), lax.axis_index("f")
        outs = pl.ds(f * FEATURES, FEATURES)

        def multiply(k, w_smem, x_smem):
            part = lambda p: x_smem.at[:, p * width : (p + 1) * width]  # noqa: E731
            blackwell_multiply(acc, w_smem, part, planes, done, k % per_group > 0)

        def scaled(group):
            return scale_rows(load_accumulator(acc), s_ref[tile_ref[m], group, outs])

        def step_of_groups(index, w_smem, x_smem, total):
            (k,) = index
            multiply(k, w_smem, x_smem)
            is_last = (k % per_group == per_group - 1).astype(jnp.float32)
            return total + scaled(k // per_group) * is_last

        def pipeline(step, **carry):
            words = plgpu.BlockSpec(
                (FEATURES, width), lambda k: (f, k), transforms=tiled(width)
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

        @pl.when(m < used_ref[0])
        def _():
            if groups == 1:
                pipeline(lambda k, w_smem, x_smem: multiply(k[0], w_smem, x_smem))
                out = scaled(0)
            else:
                zero = jnp.zeros((FEATURES, rows), jnp.float32)
                zero = plgpu.layout_cast(zero, plgpu.Layout.TCGEN05)
                out = pipeline(step_of_groups, init_carry=zero)
            y_smem.T[...] = out.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(y_smem, y_ref.at[m, :, outs])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    return plgpu.kernel(
        program,
        out_type=jax.ShapeDtypeStruct((blocks, rows, outputs), jnp.bfloat16),
        grid=(blocks, outputs // FEATURES),
        grid_names=("m", "f"),
        scratch_types=[
            plgpu.SMEM((rows, FEATURES), jnp.bfloat16, transforms=tiled(64)),
            plgpu.TMEM((FEATURES, rows), jnp.float32),
            plgpu.TMEM((FEATURES, block), jnp.bfloat16, packed=True),
            plgpu.Barrier(orders_tensor_core=True),
        ],
    )(block_tile, used, x, words, scale)
