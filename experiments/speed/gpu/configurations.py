"""Hopper's grouped products, cut otherwise than they are shipped."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments.speed.gpu.products import Product, ours_of, products
from experiments.speed.gpu.shapes import Shapes
from experiments.speed.gpu.timing import Case, Row, by_cupti, timed

# Constants of trix_kernels.grouped_matmul.hopper that differ from the shipped ones.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "shipped": {},
    "2 stages": {"STAGES": 2},
    "4 stages, 128 columns": {"STAGES": 4, "COLUMNS": (128, 64)},
    "128 columns": {"COLUMNS": (128, 64)},
    "32 registers for the copier": {"COPIER_REGISTERS": 32},
}


@contextlib.contextmanager
def constants(changed: dict[str, Any]) -> Iterator[None]:
    """The kernels' module with other constants while it is open.

    Raises:
        AttributeError: there is no such constant.
    """
    from trix_kernels.grouped_matmul import hopper

    before = {name: getattr(hopper, name) for name in changed}
    for name, value in changed.items():
        setattr(hopper, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(hopper, name, value)


def times(shapes: Shapes) -> Iterator[Row]:
    """The forward and the outer product of the up-projection in each configuration."""
    for tiles in shapes.tiles:
        for case in products(shapes, tiles):
            if case.use not in ("up", "gradient of up"):
                continue
            args = ours_of(case, shapes).args
            for name, changed in CONFIGURATIONS.items():
                kernel = Case(hopper_call(case), args, needs_gpu=True)
                with constants(changed):
                    row = timed({name: kernel}, shapes)[name]
                    row |= by_cupti(kernel)
                about = {"tiles": tiles, "product": case.name, "constants": changed}
                yield {"name": f"{case.name}: {name}", **about, **row}


def hopper_call(case: Product) -> Any:
    """The kernel itself, jitted anew, so that it is traced with the constants of now."""
    from trix_kernels.grouped_matmul import hopper
    from trix_kernels.grouped_matmul.api import runs
    from trix_kernels.grouped_matmul.products import Groups

    def call(left, right, tile, filled):
        if case.product == "outer":
            groups = Groups(tile, filled, jnp.arange(case.tiles, dtype=jnp.int32))
            return hopper.grouped_outer(left, right, *runs(groups))
        used = (filled > 0).sum(keepdims=True, dtype=jnp.int32)
        return hopper.grouped_matmul(left, right, tile, used)

    return jax.jit(call)
