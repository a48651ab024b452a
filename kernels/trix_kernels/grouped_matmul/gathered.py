"""Hopper's products of rows that are read where they lie, by number, instead of copied
into blocks first.

    gathered_matmul    y[m] = x[rows[m]] @ w[n], or with w[n].T
    matmul_and_act     the same, h, with act(h)
    hidden_gradient    the same of dy and w[n].T, p, to act'(h) * gate * p and what goes with it
    outer_of_left      dw[n] = x[rows_n].T @ dy_n
    outer_of_right     dw[n] = x_n.T @ dy[rows_n]

The warpgroups that multiply fetch these rows themselves, with the copies that Hopper has
for single threads (`cp.async`: TMA takes no row numbers there), two steps ahead and while
a wgmma runs. All else is `hopper`'s.

Tokens that several tiles read come again from the L2 cache, as far as it holds them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float32, Int32

from trix_kernels.grouped_matmul import copying, hopper
from trix_kernels.grouped_matmul.hopper import (
    HALF,
    ROWS,
    STAGES,
    STEP,
    WARPGROUPS,
    columns_of,
)
from trix_kernels.planar_gpu import tiled


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
    blocks, outputs = rows.shape[0], w.shape[1 if transposed else 2]
    y = jax.ShapeDtypeStruct((blocks, ROWS, outputs), jnp.bfloat16)

    def store_of(y_ref, m, own, columns, _):
        return hopper.into(y_ref.at[m].at[own, pl.ds(columns, columns_of(outputs))])

    call = _matmul(x, rows, w, y, store_of, transposed)
    return call(block_tile, used, x, w, rows)


def matmul_and_act(
    x: BFloat16[Array, "T I"],
    w: BFloat16[Array, "N I O"],
    block_tile: Int32[Array, " M"],
    used: Int32[Array, "1"],
    rows: Int32[Array, "M R"],
    act: Callable,
) -> tuple[BFloat16[Array, "M R O"], BFloat16[Array, "M R O"]]:
    """Computes `h[m] = x[rows[m]] @ w[n]`, `n = block_tile[m]`, and `act(h)`.

    Args:
        rows: as for `gathered_matmul`.
    """
    h = jax.ShapeDtypeStruct((*rows.shape, w.shape[2]), jnp.bfloat16)

    def store_of(h_ref, a_ref, m, own, columns, _):
        def store(sums, staging):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for at, part in _pieces(columns, sums.shape[1]):
                values = sums[:, part].astype(jnp.bfloat16)
                hopper.send(values, staging.at[0], h_ref.at[m].at[own, at])
                hopper.send(act(values), staging.at[1], a_ref.at[m].at[own, at])

        return store

    call = _matmul(x, rows, w, (h, h), store_of, transposed=False)
    return call(block_tile, used, x, w, rows)


def hidden_gradient(
    dy: BFloat16[Array, "T O"],
    w: BFloat16[Array, "N I O"],
    block_tile: Int32[Array, " M"],
    used: Int32[Array, "1"],
    rows: Int32[Array, "M R"],
    h: BFloat16[Array, "M R I"],
    gate: Float32[Array, "M R"],
    act: Callable,
) -> tuple[BFloat16[Array, "M R I"], BFloat16[Array, "M R I"], Float32[Array, "C M R"]]:
    """Computes with `p[m] = dy[rows[m]] @ w[n].T`, `n = block_tile[m]`, and `a = act(h)`
    the gradient of h, `dh = act'(h) * gate * p`, `gate * a`, and `<p, a>` of each row in
    C parts, which are to be added.

    Args:
        rows: as for `gathered_matmul`.
    """
    parts = h.shape[2] // columns_of(h.shape[2])
    like = jax.ShapeDtypeStruct(h.shape, jnp.bfloat16)
    dots_type = jax.ShapeDtypeStruct((parts, *gate.shape), jnp.float32)
    layout = plgpu.Layout.WGMMA

    def load(ref, layout):
        return plgpu.load(ref, layout=layout, optimized=False)

    def store_of(h_ref, gate_ref, dh_ref, ga_ref, dots_ref, m, own, columns, number):
        def store(sums, staging):
            gates = load(gate_ref.at[m].at[own], layout.reduce(1))
            dots = plgpu.layout_cast(jnp.zeros((HALF,), jnp.float32), layout.reduce(1))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for at, part in _pieces(columns, sums.shape[1]):
                p = sums[:, part].astype(jnp.bfloat16).astype(jnp.float32)
                h_part = load(h_ref.at[m].at[own, at], layout)
                # Inside a `shard_map` a loaded array varies, and what is made of it no
                # longer does, which `pull` would refuse.
                a, pull = jax.vjp(act, lax.max(h_part, h_part))
                gate = lax.broadcast_in_dim(gates, p.shape, (0,))
                (dh,) = pull((gate * p).astype(jnp.bfloat16))
                a = a.astype(jnp.float32)
                dots += jnp.sum(p * a, axis=1)
                ga = (gate * a).astype(jnp.bfloat16)
                hopper.send(dh, staging.at[0], dh_ref.at[m].at[own, at])
                hopper.send(ga, staging.at[1], ga_ref.at[m].at[own, at])
            dots_ref.at[number].at[m].at[own][...] = dots

        return store

    results = like, like, dots_type
    call = _matmul(dy, rows, w, results, store_of, transposed=True)
    return call(block_tile, used, dy, w, rows, h, gate)


def _pieces(columns, width):
    """An output's columns, 64 by 64: where they lie, and which of its sums."""
    return [
        (pl.ds(columns + at, STEP), slice(at, at + STEP))
        for at in range(0, width, STEP)
    ]


def _matmul(x, rows, w, results, store_of, transposed):
    """The kernel of `gathered_matmul`, whose sums `store_of(*refs, m, own, columns,
    number)` stores: the warpgroup's `own` rows of block m, and the columns from where on.
    `refs` are further arguments and the results.
    """
    contraction, outputs = x.shape[1], w.shape[1 if transposed else 2]
    width, steps = columns_of(outputs), contraction // STEP
    across = outputs // width

    def program(tile_ref, used_ref, x_ref, w_ref, rows_ref, *refs, staging, x_smem):
        shape, index = (STEP, width), lambda k: (k, 0)
        if transposed:
            shape, index = (width, STEP), lambda k: (0, k)
        right = plgpu.BlockSpec(shape, index, transforms=tiled(STEP))
        warpgroup = lax.axis_index("wg")
        own = pl.ds(warpgroup * HALF, HALF)

        def output(number, run):
            m, place = lax.div(number, across), lax.rem(number, across)
            of_tile, columns = w_ref.at[tile_ref[m]], pl.ds(place * width, width)
            part = of_tile.at[columns, :] if transposed else of_tile.at[:, columns]

            def copy(step, smem):
                of_step = x_ref.at[:, pl.ds(step * STEP, STEP)]
                copying.COPY.rows(of_step, rows_ref.at[m].at[own], smem)

            fetch, smem_of = copying.ring(copy, x_smem.at[warpgroup], steps)

            def multiply(index, w_smem, acc):
                copying.COPY.wait()
                plgpu.commit_smem()
                w_step = w_smem.transpose((1, 0)) if transposed else w_smem
                plgpu.wgmma(acc, smem_of(index[0]), w_step)
                fetch(index[0] + copying.AHEAD)
                plgpu.wgmma_wait(0)
                return acc

            store = store_of(*refs, m, own, place * width, place)
            run(steps, multiply, (part,), store, lambda: copying.start(fetch))

        count, specs = used_ref[0] * across, (right,)
        hopper.persistent(output, count, specs, (w_ref,), staging, width)

    own_smem = _smem((WARPGROUPS, STAGES, HALF, STEP))
    return hopper.kernel(program, results, x_smem=own_smem)


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
                copying.COPY.rows(x_ref.at[:, own], of_step, smem)

            fetch, smem_of = copying.ring(copy, x_smem.at[warpgroup], steps)

            def multiply(index, dy_smem, acc):
                copying.COPY.wait()
                plgpu.commit_smem()
                count, own_smem = counts_ref[n] - index[0] * STEP, smem_of(index[0])

                pl.when(count < STEP)(lambda: hopper.mask(masked, count, dy_smem))
                plgpu.wgmma(acc, own_smem.transpose((1, 0)), dy_smem)
                fetch(index[0] + copying.AHEAD)
                plgpu.wgmma_wait(0)
                return acc

            of_tile = pl.ds(start, total)  # beyond the end, where no step goes
            part = dy_ref.at[of_tile, pl.ds(o, width)]
            store = hopper.into(dw_ref.at[n].at[own, pl.ds(o, width)])
            run(steps, multiply, (part,), store, lambda: copying.start(fetch))

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
                copying.COPY.rows(columns, rows_ref.at[pl.ds(at, share)], half)

            fetch, smem_of = copying.ring(copy, dy_smem, steps)

            def begin():
                meet()  # the other warpgroup still multiplies the output before
                copying.start(fetch)

            def multiply(index, x_smem, acc):
                copying.COPY.wait()
                plgpu.commit_smem()
                meet()
                count, right = counts_ref[n] - index[0] * STEP, smem_of(index[0])

                pl.when(count < STEP)(lambda: hopper.mask(masked, count, x_smem))
                plgpu.wgmma(acc, x_smem.at[:, own].transpose((1, 0)), right)
                fetch(index[0] + copying.AHEAD)
                plgpu.wgmma_wait(0)
                return acc

            of_tile = pl.ds(start, total)  # beyond the end, where no step goes
            part = x_ref.at[of_tile, pl.ds(i, ROWS)]
            own_rows = pl.ds(i + warpgroup * HALF, HALF)
            store = hopper.into(dw_ref.at[n].at[own_rows, pl.ds(o, width)])
            run(steps, multiply, (part,), store, begin)

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
