"""The three products for Hopper (sm_90a), in bfloat16, summed in float32.

A program stays on its core and takes one output after the other: 128 rows by up to 256
columns, half of the rows to each of two warpgroups of wgmmas, while a third has TMA copy
what they multiply next. Blocks of one tile need no mask; only the outer product meets rows
that do not count, in the last step of a tile, and zeroes them in shared memory.

What a program reads again (a tile's weights, the blocks of a tile) is read by programs at
about the same time, from the L2 cache.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float32, Int32

from trix_kernels.planar_gpu import tiled

ROWS = 128  # of a block, and of a program's output
STEP = 64  # of the contraction: 128 bytes, the widest swizzle
COLUMNS = (256, 128, 64)  # of a program's output, best first
STAGES = 3  # steps in shared memory
CORES = 132  # programs at work; a GPU of fewer cores runs them in turns
WARPGROUPS = 2  # that multiply
HALF = ROWS // WARPGROUPS
COPIER_REGISTERS = 40  # of the warpgroup that copies; what it leaves, the others get

Ref = Any


def grouped_matmul(
    x: BFloat16[Array, "M R I"],
    w: BFloat16[Array, "N _ _"],
    block_tile: Int32[Array, " M"],
    used: Int32[Array, "1"],
    *,
    transposed: bool = False,
) -> BFloat16[Array, "M R O"]:
    """Computes `y[m] = x[m] @ w[n]`, or `x[m] @ w[n].T`, `n = block_tile[m]`.

    Args:
        x: R is `ROWS`.
        w: `[N, I, O]`, or `[N, O, I]` if it is to be transposed.
        used: blocks from this one on are neither read nor written.
    """
    blocks, _, contraction = x.shape
    outputs = w.shape[1 if transposed else 2]
    width = columns_of(outputs)
    across = outputs // width

    def program(tile_ref, used_ref, x_ref, w_ref, y_ref, staging):
        left = plgpu.BlockSpec((ROWS, STEP), lambda k: (0, k), transforms=tiled(STEP))
        if transposed:
            shape, index = (width, STEP), lambda k: (0, k)
        else:
            shape, index = (STEP, width), lambda k: (k, 0)
        right = plgpu.BlockSpec(shape, index, transforms=tiled(STEP))
        warpgroup = lax.axis_index("wg")
        own = pl.ds(warpgroup * HALF, HALF)

        def multiply(_, x_smem, w_smem, acc):
            w_step = w_smem.transpose((1, 0)) if transposed else w_smem
            plgpu.wgmma(acc, x_smem.at[own], w_step)
            plgpu.wgmma_wait(0)
            return acc

        def output(number, run):
            m, columns = lax.div(number, across), lax.rem(number, across) * width
            of_tile, columns = w_ref.at[tile_ref[m]], pl.ds(columns, width)
            part = of_tile.at[columns, :] if transposed else of_tile.at[:, columns]
            store = into(y_ref.at[m].at[own, columns])
            run(contraction // STEP, multiply, (x_ref.at[m], part), store)

        persistent(
            output, used_ref[0] * across, (left, right), (x_ref, w_ref), staging, width
        )

    y = jax.ShapeDtypeStruct((blocks, ROWS, outputs), jnp.bfloat16)
    return kernel(program, y)(block_tile, used, x, w)


def grouped_outer(
    x: BFloat16[Array, "M R I"],
    dy: BFloat16[Array, "M R O"],
    first: Int32[Array, " N"],
    rows: Int32[Array, " N"],
) -> Float32[Array, "N I O"]:
    """Computes `dw[n] = x_n.T @ dy_n`, of rows `R first[n]` to `R first[n] + rows[n]`.

    Args:
        x: I is a multiple of `ROWS`, R of `STEP`.
        first: block of each tile.
        rows: of each tile, from its first block on.
    """
    tiles, total = first.shape[0], x.shape[0] * x.shape[1]
    inputs, outputs = x.shape[2], dy.shape[2]
    width = columns_of(outputs)
    down, across = inputs // ROWS, outputs // width

    def program(first_ref, rows_ref, x_ref, dy_ref, dw_ref, staging, masked):
        left, right = (
            plgpu.BlockSpec((STEP, n), lambda k: (k, 0), transforms=tiled(STEP))
            for n in (ROWS, width)
        )
        warpgroup = lax.axis_index("wg")

        def output(number, run):
            n, place = lax.div(number, down * across), lax.rem(number, down * across)
            i, o = lax.div(place, across) * ROWS, lax.rem(place, across) * width

            def multiply(index, x_smem, dy_smem, acc):
                count = rows_ref[n] - index[0] * STEP
                pl.when(count < STEP)(lambda: mask(masked, count, x_smem, dy_smem))
                own = x_smem.at[:, pl.ds(warpgroup * HALF, HALF)]
                plgpu.wgmma(acc, own.transpose((1, 0)), dy_smem)
                plgpu.wgmma_wait(0)
                return acc

            start = pl.multiple_of(first_ref[n] * x.shape[1], STEP)
            of_tile = pl.ds(start, total)  # beyond the end, where no step goes
            parts = (
                x_ref.at[of_tile, pl.ds(i, ROWS)],
                dy_ref.at[of_tile, pl.ds(o, width)],
            )
            own = pl.ds(i + warpgroup * HALF, HALF)
            store = into(dw_ref.at[n].at[own, pl.ds(o, width)])
            steps = lax.div(rows_ref[n] + (STEP - 1), STEP)
            run(steps, multiply, parts, store)

        refs = (x_ref, dy_ref)
        persistent(output, tiles * down * across, (left, right), refs, staging, width)

    dw = jax.ShapeDtypeStruct((tiles, inputs, outputs), jnp.float32)
    masked = plgpu.Barrier(num_arrivals=WARPGROUPS)
    rows_of = x.reshape(total, inputs), dy.reshape(total, outputs)
    return kernel(program, dw, masked=masked)(first, rows, *rows_of)


def columns_of(outputs: int) -> int:
    """Columns of a program's output: the most that divide them."""
    return next(width for width in COLUMNS if outputs % width == 0)


def kernel(program: Callable, out_type: Any, **scratch: Any) -> Callable:
    """The kernel of a persistent program, with shared memory for results on their way
    out.
    """
    dtype = jax.tree.leaves(out_type)[0].dtype
    width = 128 // dtype.itemsize
    staging = plgpu.SMEM(
        (WARPGROUPS, 2, HALF, width), dtype, transforms=tiled(width, dtype.itemsize)
    )
    return plgpu.kernel(
        program,
        out_type=out_type,
        grid=(CORES,),
        grid_names=("core",),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        scratch_types={"staging": staging, **scratch},
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )


def persistent(
    output: Callable, count: Any, specs: tuple, refs: tuple, staging: Ref, width: int
) -> None:
    """Computes outputs 0 to `count - 1`, shared among the cores.

    Args:
        output: `output(number, run)` calls `run(steps, multiply, parts, store, begin)`:
            after `begin()`, which may be left out, each warpgroup calls `store(sums,
            staging)` with its own sums of `multiply` over the steps of the `parts` in
            global memory.
    """

    def pipeline(steps, multiply, results):
        return plgpu.emit_pipeline_warp_specialized(
            multiply,
            grid=(steps,),
            in_specs=list(specs),
            memory_registers=COPIER_REGISTERS,
            wg_axis="wg",
            num_compute_wgs=WARPGROUPS,
            max_concurrent_steps=STAGES,
            compute_context=results,
        )

    def nothing(*_, **__):
        pass

    # As many steps as there are stages: outputs with fewer or more share the memory.
    allocations = pipeline(STAGES, nothing, nothing).get_allocations(*refs)

    @functools.partial(pl.run_scoped, allocations=allocations, collective_axes="wg")
    def _(allocations):
        @plgpu.nd_loop((count,), collective_axes="core")
        def _(loop):
            def run(steps, multiply, parts, store, begin=nothing):
                def results(sums_of):
                    def stored(acc):
                        begin()
                        sums_of(acc)
                        store(acc[...], staging.at[lax.axis_index("wg")])

                    pl.run_scoped(stored, plgpu.ACC((HALF, width), jnp.float32))

                run_all = pipeline(steps, multiply, results)
                run_all(*parts, allocations=allocations)

            output(loop.index[0], run)

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def into(target: Ref) -> Callable:
    """`store(sums, staging)` of a warpgroup, which rounds its sums and sends them to
    global memory.
    """

    def store(sums, staging):
        piece, values = staging.shape[-1], sums.astype(staging.dtype)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for number in range(values.shape[1] // piece):
            columns = slice(number * piece, (number + 1) * piece)
            send(values[:, columns], staging.at[number % 2], target.at[:, columns])

    return store


def send(values: Any, buffer: Ref, target: Ref) -> None:
    """Through one of two buffers that are used in turn."""
    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
    buffer[...] = values
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(buffer, target)


def mask(masked: Ref, count: Any, *refs: Ref) -> None:
    """Zeroes rows from `count` on, in pieces as wide as a swizzle that the warpgroups
    share.
    """
    warpgroup = lax.axis_index("wg")
    for ref in refs:

        @pl.loop(warpgroup, ref.shape[1] // STEP, step=WARPGROUPS)
        def _(piece, ref=ref):
            keep_rows(ref.at[:, pl.ds(piece * STEP, STEP)], count)

    plgpu.commit_smem()
    plgpu.barrier_arrive(masked)
    plgpu.barrier_wait(masked)  # for the other warpgroup's pieces


def keep_rows(smem: Ref, count: Any) -> None:
    """Zeroes all but the first `count` rows, whatever they hold."""
    row = lax.broadcasted_iota(jnp.int32, smem.shape, 0)
    row = plgpu.layout_cast(row, plgpu.Layout.WGMMA)
    smem[...] = jnp.where(row < count, smem[...], 0)
