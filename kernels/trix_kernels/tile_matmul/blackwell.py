"""`tile_matmul` for Blackwell (sm_100a): planar words decoded into tensor memory for
tcgen05.

As in `hopper`, weights are the left operand; here the decoded planes of a step and the
accumulator live in tensor memory.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Float32, Int32, UInt16

from trix_kernels.planar_gpu import (
    HALVES,
    STAGES,
    blackwell_multiply,
    drain,
    load_accumulator,
    result_smem,
    result_type,
    scale_rows,
    store_result,
    tiled,
)
from trix_kernels.weights import PLANES, planar_block

FEATURES = 128  # outputs that one program computes, the rows of tensor memory
CORES = 148


def programs_of(blocks: int, outputs: int) -> int:
    """Programs of a matmul that is not split."""
    return blocks * outputs // FEATURES


def tile_matmul(
    x: BFloat16[Array, "M R I"],
    words: UInt16[Array, "N O words"],
    scale: Float[Array, "N G O"],
    block_tile: Int32[Array, " M"],
    used: Int32[Array, "1"],
    *,
    splits: int = 1,
    interpreted: bool = False,
) -> BFloat16[Array, "M R O"] | Float32[Array, "splits M O R"]:
    """Computes `y[m] = sum_g (x[m, :, g] @ q[n, g]) * scale[n, g]`, `n =
    block_tile[m]`.

    Arguments as in `hopper.tile_matmul`; O is a multiple of 128. With two programs for
    every core, one multiplies while the other decodes; with fewer, a program's own
    steps overlap, for which it keeps the activations of a third step.
    """
    blocks, rows, contraction = x.shape
    outputs, groups = words.shape[1], scale.shape[1]
    block = planar_block(contraction, groups)
    width, steps = block // PLANES, contraction // block // splits
    per_group = steps // groups
    programs = programs_of(blocks, outputs) * splits
    overlaps = groups == 1 and steps > 1 and programs < 2 * CORES

    def program(
        tile_ref, used_ref, x_ref, w_ref, s_ref, y_ref, y_smem, acc, planes, done
    ):
        m, f, s = (lax.axis_index(name) for name in "mfs")
        outs = pl.ds(f * FEATURES, FEATURES)

        def multiply(k, w_smem, x_smem):
            def part(p):
                return x_smem.at[:, p * width : (p + 1) * width]

            follows = overlaps & (k > 0)
            more = (k % per_group > 0), follows, interpreted
            blackwell_multiply(acc, w_smem, part, planes, done, *more)
            if not overlaps:
                drain(done)

        def scaled(group):
            return scale_rows(load_accumulator(acc), s_ref[tile_ref[m], group, outs])

        def step_of_groups(index, w_smem, x_smem, total):
            (k,) = index
            multiply(k, w_smem, x_smem)
            is_last = (k % per_group == per_group - 1).astype(jnp.float32)
            return total + scaled(k // per_group) * is_last

        def pipeline(step, **carry):
            words = plgpu.BlockSpec(
                (FEATURES, width), lambda k: (f, s * steps + k), transforms=tiled(width)
            )
            part = plgpu.BlockSpec(
                (rows, block),
                lambda k: (0, s * steps + k),
                transforms=tiled(width),
                delay_release=int(overlaps),
            )
            return plgpu.emit_pipeline(
                step,
                grid=(steps,),
                in_specs=[words, part],
                max_concurrent_steps=min(STAGES + overlaps, steps),
                **carry,
            )(w_ref.at[tile_ref[m]], x_ref.at[m])

        @pl.when(m < used_ref[0])
        def _():
            if groups == 1:
                pipeline(lambda k, w_smem, x_smem: multiply(k[0], w_smem, x_smem))
                if overlaps:
                    drain(done)
                out = load_accumulator(acc) if splits > 1 else scaled(0)
            else:
                zero = jnp.zeros((FEATURES, rows), jnp.float32)
                zero = plgpu.layout_cast(zero, plgpu.Layout.TCGEN05)
                out = pipeline(step_of_groups, init_carry=zero)
            store_result(out, y_smem, y_ref, (m, outs, s), splits)

    return plgpu.kernel(
        program,
        out_type=result_type(blocks, rows, outputs, splits),
        grid=(blocks, outputs // FEATURES, splits),
        grid_names=("m", "f", "s"),
        scratch_types=[
            result_smem(rows, FEATURES, splits),
            plgpu.TMEM((FEATURES, rows), jnp.float32),
            plgpu.TMEM((FEATURES, block), jnp.bfloat16, packed=True),
            plgpu.Barrier(num_barriers=HALVES, orders_tensor_core=True),
        ],
    )(block_tile, used, x, words, scale)
