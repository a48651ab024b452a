"""`tile_ffn` for Hopper (sm_90a) and Blackwell (sm_100a): the hidden layer stays on the
chip.

One program computes one block of rows. Its rows of `x` and its whole hidden layer lie
in shared memory; the 2-bit words of both matrices stream past, some outputs and one
planar block a step. On Hopper, and with groups, every step's product is scaled into a
running sum in registers.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Int32, UInt16

from trix_kernels.device import Arch
from trix_kernels.planar_gpu import (
    HALVES,
    STAGES,
    blackwell_multiply,
    drain,
    hopper_multiply,
    load_accumulator,
    scale_rows,
    tiled,
)
from trix_kernels.weights import PLANES, planar_block


def tile_ffn(
    x: BFloat16[Array, "M R D"],
    up: tuple[UInt16[Array, "N F words_up"], Float[Array, "N G F"]],
    down: tuple[UInt16[Array, "N O words_down"], Float[Array, "N H O"]],
    block_tile: Int32[Array, " M"],
    used: Int32[Array, "1"],
    act: Callable,
    arch: Arch,
    *,
    interpreted: bool = False,
) -> BFloat16[Array, "M R O"]:
    """Computes `act(x[m] @ up[n]) @ down[n]`, `n = block_tile[m]`, each product scaled.

    Args:
        x: R is one of `weights.ROWS`.
        up: planar words, and a scale for every output, with the factor 1/2 of the code.
        down: the same; D, F and O are multiples of 128.
        used: blocks from this one on are not computed, and what they hold is undefined.
        act: of jnp functions that Mosaic lowers.
        interpreted: by operations that the interpreter knows, see `planar_gpu`.
    """
    blocks, rows, d_in = x.shape
    hidden, outputs = up[0].shape[1], down[0].shape[1]
    widths = [
        planar_block(i, s.shape[1]) // PLANES
        for i, (_, s) in ((d_in, up), (hidden, down))
    ]
    # Sum, product and decoded planes share the registers: 128 x 64 of each would spill.
    features = 64 if arch == "sm_90a" and rows > 32 else 128

    def program(*refs, **scratch):
        tile_ref, used_ref, x_ref, wu_ref, su_ref, wd_ref, sd_ref, y_ref = refs
        m = lax.axis_index("m")

        def part_of(k, width, source_smem):
            def part(p):
                at = p * width
                chunk = k * (PLANES * width // features) + at // features
                return source_smem.at[chunk, :, at % features : at % features + width]

            return part

        def hopper_product(w_smem, part):
            def run(acc):
                hopper_multiply(acc, w_smem, part, scratch.get("plane"))
                return acc[...]

            return pl.run_scoped(run, plgpu.ACC((features, rows)))

        def blackwell_sum(w_smem, part, follows):
            planes = scratch["planes"].at[:, : PLANES * w_smem.shape[-1]]
            acc, done = scratch["acc"], scratch["done"]
            more = follows, follows, interpreted
            blackwell_multiply(acc, w_smem, part, planes, done, *more)

        def blackwell_product():
            drain(scratch["done"])
            return load_accumulator(scratch["acc"])

        def sweep(words_ref, s_ref, source_smem, sink):
            """Hands `sink(j, out)` every `features` outputs of `source @ words.T`,
            scaled.
            """
            outputs, groups = words_ref.shape[1], s_ref.shape[1]
            block = planar_block(words_ref.shape[2] * PLANES, groups)
            steps = words_ref.shape[2] * PLANES // block

            def scaled(product, j, k):
                group, outs = k // (steps // groups), pl.ds(j * features, features)
                return scale_rows(product, s_ref[tile_ref[m], group, outs])

            def step(index, w_smem, total):
                j, k = index
                part, is_last = part_of(k, block // PLANES, source_smem), k == steps - 1
                if arch == "sm_90a":
                    out = hopper_product(w_smem, part)
                elif groups == 1:  # the accumulator holds the running sum
                    blackwell_sum(w_smem, part, k > 0)

                    @pl.when(is_last)
                    def _():
                        sink(j, scaled(blackwell_product(), j, k))

                    return total
                else:
                    blackwell_sum(w_smem, part, False)
                    out = blackwell_product()
                total = scaled(out, j, k) + total * (k > 0).astype(jnp.float32)
                pl.when(is_last)(lambda: sink(j, total))
                return total

            layout = plgpu.Layout.WGMMA if arch == "sm_90a" else plgpu.Layout.TCGEN05
            zero = plgpu.layout_cast(jnp.zeros((features, rows), jnp.float32), layout)
            width = block // PLANES
            plgpu.emit_pipeline(
                step,
                grid=(outputs // features, steps),
                in_specs=[
                    plgpu.BlockSpec(
                        (features, width), lambda j, k: (j, k), transforms=tiled(width)
                    )
                ],
                max_concurrent_steps=min(STAGES, steps * outputs // features),
                init_carry=zero,
            )(words_ref.at[tile_ref[m]])

        def to_hidden(j, out):
            scratch["hidden"].at[j].T[...] = act(out).astype(jnp.bfloat16)
            plgpu.commit_smem()

        def to_output(j, out):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            scratch["y"].T[...] = out.astype(jnp.bfloat16)
            plgpu.commit_smem()
            outs = pl.ds(j * features, features)
            plgpu.copy_smem_to_gmem(scratch["y"], y_ref.at[m, :, outs])

        @pl.when(m < used_ref[0])
        def _():
            for chunk in range(d_in // features):
                part = x_ref.at[m, :, pl.ds(chunk * features, features)]
                plgpu.copy_gmem_to_smem(part, scratch["x"].at[chunk], scratch["here"])
            plgpu.barrier_wait(scratch["here"])
            sweep(wu_ref, su_ref, scratch["x"], to_hidden)
            sweep(wd_ref, sd_ref, scratch["hidden"], to_output)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def smem(count, width):
        return plgpu.SMEM(
            (count, rows, features), jnp.bfloat16, transforms=tiled(width)
        )

    scratch = {
        "x": smem(d_in // features, widths[0]),
        "hidden": smem(hidden // features, widths[1]),
        "y": plgpu.SMEM((rows, features), jnp.bfloat16, transforms=tiled(64)),
        "here": plgpu.Barrier(num_arrivals=d_in // features),
    }
    if arch == "sm_100a":
        scratch |= {
            "acc": plgpu.TMEM((features, rows), jnp.float32),
            "planes": plgpu.TMEM((features, 256), jnp.bfloat16, packed=True),
            "done": plgpu.Barrier(num_barriers=HALVES, orders_tensor_core=True),
        }
    elif interpreted:
        if widths[0] != widths[1]:
            raise NotImplementedError(
                "interpreted needs the same planar block in both matrices. "
                f"Got {PLANES * widths[0]} and {PLANES * widths[1]}."
            )
        scratch["plane"] = plgpu.SMEM(
            (features, widths[0]), jnp.bfloat16, transforms=tiled(widths[0])
        )
    return plgpu.kernel(
        program,
        out_type=jax.ShapeDtypeStruct((blocks, rows, outputs), jnp.bfloat16),
        grid=(blocks,),
        grid_names=("m",),
        scratch_types=scratch,
    )(block_tile, used, x, *up, *down)
