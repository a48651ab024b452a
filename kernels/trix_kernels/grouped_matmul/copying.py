"""Rows by number from global to shared memory, by the warpgroup that multiplies them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from trix_kernels.grouped_matmul import lanes
from trix_kernels.grouped_matmul.hopper import STAGES, STEP, Ref
from trix_kernels.planar_gpu import tiled

AHEAD = STAGES - 1  # steps that rows are asked for before they are multiplied
THREADS = 128  # of a warpgroup
PIECE = 16  # bytes that a thread copies at a time
LINE = 128  # bytes of a row in a tile of shared memory: 8 pieces, swizzled


def ring(
    copy: Callable, smem: Ref, steps: Any
) -> tuple[Callable[[Any], None], Callable[[Any], Ref]]:
    """`fetch(step)`, which asks for the rows of a step, and where these are then."""

    def of(step):
        return smem.at[lax.rem(step, STAGES)]

    def fetch(step):
        pl.when(step < steps)(lambda: copy(step, of(step)))
        COPY.commit()  # also of nothing: `wait` counts steps

    return fetch, of


def start(fetch: Callable[[Any], None]) -> None:
    """Asks for the first steps."""
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
