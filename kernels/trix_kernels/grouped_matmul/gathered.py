"""Hopper's products of rows that are read where they lie, by number, instead of copied
into blocks first.

    gathered_matmul    y[m] = x[rows[m]] @ w[n]
    outer_of_left      dw[n] = x[rows_n].T @ dy_n
    outer_of_right     dw[n] = x_n.T @ dy[rows_n]

The warpgroups that multiply fetch these rows themselves, with the copies that Hopper has
for single threads (`cp.async`: TMA takes no row numbers there), two steps ahead and while
a wgmma runs. All else is `hopper`'s.

Tokens that several tiles read come again from the L2 cache, as far as it holds them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float32, Int32

from trix_kernels.grouped_matmul import hopper, lanes
from trix_kernels.grouped_matmul.hopper import (
    HALF,
    ROWS,
    STAGES,
    STEP,
    WARPGROUPS,
    Ref,
    columns_of,
)
from trix_kernels.planar_gpu import tiled

AHEAD = STAGES - 1  # steps that rows are asked for before they are multiplied
THREADS = 128  # of a warpgroup
PIECE = 16  # bytes that a thread copies at a time
LINE = 128  # bytes of a row in a tile of shared memory: 8 pieces, swizzled


def gathered_matmul(
    x: BFloat16[Array, "T I"],
    w: BFloat16[Array, "N _ _"],
    block_tile: Int32[Array, " M"],
    used: Int32[Array, "1"],
    rows: Int32[Array, "M R"],
    *,
    transposed: bool = False,
) -> BFloat16[Array, "M R O"]:
    """Computes `y[m] = x[rows[m]] @ w[n]`, or with `w[n].T`, `n = block_tile[m]`.

    Args:
        rows: each in 0..T-1, or -1 for a row of zeros; R is `ROWS`.
        w, block_tile, used, transposed: as for `hopper.grouped_matmul`.
    """
    blocks, contraction = rows.shape[0], x.shape[1]
    outputs = w.shape[1 if transposed else 2]
    width, steps = columns_of(outputs), contraction // STEP
    across = outputs // width

    def program(tile_ref, used_ref, x_ref, w_ref, rows_ref, y_ref, staging, x_smem):
        shape, index = (STEP, width), lambda k: (k, 0)
        if transposed:
            shape, index = (width, STEP), lambda k: (0, k)
        right = plgpu.BlockSpec(shape, index, transforms=tiled(STEP))
        warpgroup = lax.axis_index("wg")
        own = pl.ds(warpgroup * HALF, HALF)

        def output(number, run):
            m, columns = lax.div(number, across), lax.rem(number, across) * width
            of_tile, columns = w_ref.at[tile_ref[m]], pl.ds(columns, width)
            part = of_tile.at[columns, :] if transposed else of_tile.at[:, columns]

            def copy(step, smem):
                of_step = x_ref.at[:, pl.ds(step * STEP, STEP)]
                COPY.rows(of_step, rows_ref.at[m].at[own], smem)

            fetch, smem_of = _ring(copy, x_smem.at[warpgroup], steps)

            def multiply(index, w_smem, acc):
                COPY.wait()
                plgpu.commit_smem()
                w_step = w_smem.transpose((1, 0)) if transposed else w_smem
                plgpu.wgmma(acc, smem_of(index[0]), w_step)
                fetch(index[0] + AHEAD)
                plgpu.wgmma_wait(0)
                return acc

            target = y_ref.at[m].at[own, columns]
            run(steps, multiply, (part,), target, lambda: _start(fetch))

        count, specs = used_ref[0] * across, (right,)
        hopper.persistent(output, count, specs, (w_ref,), staging, width)

    y = jax.ShapeDtypeStruct((blocks, ROWS, outputs), jnp.bfloat16)
    own_smem = _smem((WARPGROUPS, STAGES, HALF, STEP))
    return hopper.kernel(program, y, x_smem=own_smem)(block_tile, used, x, w, rows)


def outer_of_left(
    x: BFloat16[Array, "T I"],
    dy: BFloat16[Array, "M R O"],
    first: Int32[Array, " N"],
    counts: Int32[Array, " N"],
    rows: Int32[Array, "M R"],
) -> Float32[Array, "N I O"]:
    """Computes `dw[n] = x[rows_n].T @ dy_n` of the `counts[n]` rows from block `first[n]`
    on.

    Args:
        rows: as for `gathered_matmul`, -1 where a row does not count.
    """
    tiles, total = first.shape[0], rows.size
    inputs, outputs = x.shape[1], dy.shape[2]
    width = columns_of(outputs)
    down, across = inputs // ROWS, outputs // width

    def program(
        first_ref, counts_ref, x_ref, dy_ref, rows_ref, dw_ref, staging, masked, x_smem
    ):
        right = plgpu.BlockSpec((STEP, width), lambda k: (k, 0), transforms=tiled(STEP))
        warpgroup = lax.axis_index("wg")

        def output(number, run):
            n, place = lax.div(number, down * across), lax.rem(number, down * across)
            i, o = lax.div(place, across) * ROWS, lax.rem(place, across) * width
            start = pl.multiple_of(first_ref[n] * ROWS, STEP)
            steps = lax.div(counts_ref[n] + (STEP - 1), STEP)
            own = pl.ds(i + warpgroup * HALF, HALF)

            def copy(step, smem):
                of_step = rows_ref.at[pl.ds(start + step * STEP, STEP)]
                COPY.rows(x_ref.at[:, own], of_step, smem)

            fetch, smem_of = _ring(copy, x_smem.at[warpgroup], steps)

            def multiply(index, dy_smem, acc):
                COPY.wait()
                plgpu.commit_smem()
                count, own_smem = counts_ref[n] - index[0] * STEP, smem_of(index[0])

                pl.when(count < STEP)(lambda: hopper.mask(masked, count, dy_smem))
                plgpu.wgmma(acc, own_smem.transpose((1, 0)), dy_smem)
                fetch(index[0] + AHEAD)
                plgpu.wgmma_wait(0)
                return acc

            of_tile = pl.ds(start, total)  # beyond the end, where no step goes
            part = dy_ref.at[of_tile, pl.ds(o, width)]
            target = dw_ref.at[n].at[own, pl.ds(o, width)]
            run(steps, multiply, (part,), target, lambda: _start(fetch))

        count = tiles * down * across
        hopper.persistent(output, count, (right,), (dy_ref,), staging, width)

    dw = jax.ShapeDtypeStruct((tiles, inputs, outputs), jnp.float32)
    scratch = {
        "masked": plgpu.Barrier(num_arrivals=WARPGROUPS),
        "x_smem": _smem((WARPGROUPS, STAGES, STEP, HALF)),
    }
    of_rows = dy.reshape(total, outputs), rows.reshape(total)
    return hopper.kernel(program, dw, **scratch)(first, counts, x, *of_rows)


def outer_of_right(
    x: BFloat16[Array, "M R I"],
    dy: BFloat16[Array, "T O"],
    first: Int32[Array, " N"],
    counts: Int32[Array, " N"],
    rows: Int32[Array, "M R"],
) -> Float32[Array, "N I O"]:
    """Computes `dw[n] = x_n.T @ dy[rows_n]` of the `counts[n]` rows from block `first[n]`
    on.

    Each warpgroup fetches half of a step's rows and waits for the other's.

    Args:
        rows: as for `gathered_matmul`, -1 where a row does not count.
    """
    tiles, total = first.shape[0], rows.size
    inputs, outputs = x.shape[2], dy.shape[1]
    width = columns_of(outputs)
    down, across = inputs // ROWS, outputs // width
    share = STEP // WARPGROUPS

    def program(
        first_ref,
        counts_ref,
        x_ref,
        dy_ref,
        rows_ref,
        dw_ref,
        staging,
        masked,
        shared,
        dy_smem,
    ):
        left = plgpu.BlockSpec((STEP, ROWS), lambda k: (k, 0), transforms=tiled(STEP))
        warpgroup = lax.axis_index("wg")
        own = pl.ds(warpgroup * HALF, HALF)

        def meet():
            plgpu.barrier_arrive(shared)
            plgpu.barrier_wait(shared)

        def output(number, run):
            n, place = lax.div(number, down * across), lax.rem(number, down * across)
            i, o = lax.div(place, across) * ROWS, lax.rem(place, across) * width
            start = pl.multiple_of(first_ref[n] * ROWS, STEP)
            steps = lax.div(counts_ref[n] + (STEP - 1), STEP)

            def copy(step, smem):
                at = start + step * STEP + warpgroup * share
                half = smem.at[pl.ds(warpgroup * share, share)]
                columns = dy_ref.at[:, pl.ds(o, width)]
                COPY.rows(columns, rows_ref.at[pl.ds(at, share)], half)

            fetch, smem_of = _ring(copy, dy_smem, steps)

            def begin():
                meet()  # the other warpgroup still multiplies the output before
                _start(fetch)

            def multiply(index, x_smem, acc):
                COPY.wait()
                plgpu.commit_smem()
                meet()
                count, right = counts_ref[n] - index[0] * STEP, smem_of(index[0])

                pl.when(count < STEP)(lambda: hopper.mask(masked, count, x_smem))
                plgpu.wgmma(acc, x_smem.at[:, own].transpose((1, 0)), right)
                fetch(index[0] + AHEAD)
                plgpu.wgmma_wait(0)
                return acc

            of_tile = pl.ds(start, total)  # beyond the end, where no step goes
            part = x_ref.at[of_tile, pl.ds(i, ROWS)]
            own_rows = pl.ds(i + warpgroup * HALF, HALF)
            target = dw_ref.at[n].at[own_rows, pl.ds(o, width)]
            run(steps, multiply, (part,), target, begin)

        count = tiles * down * across
        hopper.persistent(output, count, (left,), (x_ref,), staging, width)

    dw = jax.ShapeDtypeStruct((tiles, inputs, outputs), jnp.float32)
    scratch = {
        "masked": plgpu.Barrier(num_arrivals=WARPGROUPS),
        "shared": plgpu.Barrier(num_arrivals=WARPGROUPS),
        "dy_smem": _smem((STAGES, STEP, width)),
    }
    of_rows = x.reshape(total, inputs), dy, rows.reshape(total)
    return hopper.kernel(program, dw, **scratch)(first, counts, *of_rows)


def _smem(shape):
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=tiled(STEP))


def _ring(copy, smem, steps):
    """`fetch(step)`, which asks for the rows of a step, and where these are then."""

    def of(step):
        return smem.at[lax.rem(step, STAGES)]

    def fetch(step):
        pl.when(step < steps)(lambda: copy(step, of(step)))
        COPY.commit()  # also of nothing: `wait` counts steps

    return fetch, of


def _start(fetch):
    for step in range(AHEAD):
        fetch(jnp.int32(step))


class Copy(NamedTuple):
    """How a warpgroup copies rows from global memory.

    Attributes:
        rows: `rows(x, numbers, smem)` has `smem[r] = x[numbers[r]]`, or zeros where the
            number is negative, some time later.
        commit: ends a step's copies.
        wait: until all but the last `AHEAD - 1` steps have come.
    """

    rows: Callable[[Ref, Ref, Ref], None]
    commit: Callable[[], None]
    wait: Callable[[], None]


class Piece(NamedTuple):
    """16 bytes that a thread copies.

    Attributes:
        row, column: of them, in numbers of two bytes.
        byte: where they go, from the start of the shared memory.
    """

    row: Any
    column: Any
    byte: Any


def pieces_of(thread: Any, rows: int, width: int) -> list[Piece]:
    """What a thread of a warpgroup copies of `rows` rows of `width` numbers.

    They go to tiles of 8 rows of 128 bytes, where the pieces of row r stand in the order
    `piece ^ (r % 8)`: the widest swizzle.
    """
    piece, first = thread % (LINE // PIECE), thread // (LINE // PIECE)
    tiles, apart = width // STEP, THREADS * PIECE // LINE
    line = (first // 8) * (8 * LINE * tiles) + (first % 8) * LINE
    byte = line + (piece ^ (first % 8)) * PIECE
    return [
        Piece(
            first + row, piece * 8 + STEP * tile, byte + LINE * (row * tiles + 8 * tile)
        )
        for row in range(0, rows, apart)
        for tile in range(tiles)
    ]


def _copy_rows(x_ref, rows_ref, smem_ref):
    (count, width), is_smem = smem_ref.shape, plgpu.RefType(tiled(STEP))

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), is_smem))
    def copy(_, x, rows, smem):
        lanes.copy_rows(x, rows, smem, lambda thread: pieces_of(thread, count, width))

    copy(x_ref, rows_ref, smem_ref)


def _commit():
    plgpu.inline_mgpu()(lambda _: lanes.commit())()


def _wait():
    plgpu.inline_mgpu()(lambda _: lanes.wait(AHEAD - 1))()


ASYNCHRONOUS = Copy(_copy_rows, _commit, _wait)


def _copy_rows_at_once(x_ref, rows_ref, smem_ref):
    @pl.loop(0, smem_ref.shape[0])
    def _(r):
        number = rows_ref[r]
        row = x_ref[jnp.maximum(number, 0), :]
        smem_ref[r, :] = jnp.where(number < 0, jnp.zeros_like(row), row)


# For the interpreter, which does not know what single threads do.
INTERPRETED = Copy(_copy_rows_at_once, lambda: None, lambda: None)

COPY = ASYNCHRONOUS
