"""What others compute the grouped products with, in turn with ours.

Rows are sorted by tile and not padded, `[A, I]` and `[A, O]`, with the rows of each tile.
jax ships its kernels without a public name; what wins of a few configurations is what
counts. tokamax is measured where it is installed.
"""

import functools
import importlib
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from experiments.speed.gpu.machine import is_there
from experiments.speed.gpu.products import Product, counts, products, timed_product
from experiments.speed.gpu.shapes import Shapes
from experiments.speed.gpu.timing import Case, Row, on_gpu
from trix_kernels.gpu_specs import GPUS

OUTER = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
)
JAX_KERNELS = "jax.experimental.pallas.ops.gpu"
SHARED = {"block_k": 64, "max_concurrent_steps": 4}
# What compiles for sm_90a at these shapes; 128 x 256 does not.
CONFIGURATIONS = {
    "128x128": {"block_m": 128, "block_n": 128, "grid_block_n": 1, **SHARED},
    "128x128, pairs": {"block_m": 128, "block_n": 128, "grid_block_n": 2, **SHARED},
    "64x128": {"block_m": 64, "block_n": 128, "grid_block_n": 1, **SHARED},
}


def times(shapes: Shapes) -> Iterator[Row]:
    """Every product, balanced, by everybody."""
    for tiles in shapes.tiles:
        for case in products(shapes, tiles):
            others = {
                "lax.ragged_dot": Case(jax.jit(ragged(case)), sorted_inputs(case)),
                **jax_shipped(case),
                **tokamax(case),
            }
            yield from timed_product(case, shapes, others)


def sorted_inputs(case: Product) -> tuple[Any, Any, Any]:
    """Both arrays and the rows of each tile."""
    keys = jax.random.split(jax.random.key(2), 3)
    shapes = {
        "x": (case.rows, case.inputs),
        "dy": (case.rows, case.outputs),
        "w": (case.tiles, case.inputs, case.outputs),
    }
    made = {
        name: jax.random.normal(key, shape, jnp.bfloat16)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    names = {"forward": "x w", "transposed": "dy w", "outer": "x dy"}[case.product]
    left, right = (made[name] for name in names.split())
    sizes = jnp.asarray(counts("balanced", case.rows, case.tiles), jnp.int32)
    return left, right, sizes


def ragged(case: Product) -> Callable:
    """By `jax.lax.ragged_dot` and its general form."""
    if case.product == "outer":
        wide = {"preferred_element_type": jnp.float32}
        return functools.partial(_general, jax.lax.ragged_dot_general, **wide)
    if case.product == "transposed":
        return lambda dy, w, sizes: jax.lax.ragged_dot(dy, w.mT, sizes)
    return jax.lax.ragged_dot


def _general(product, x, dy, sizes, **how):
    return product(x, dy, sizes, ragged_dot_dimension_numbers=OUTER, **how)


def jax_shipped(case: Product) -> dict[str, Case]:
    """By the Mosaic GPU kernels that jax ships, whose `dw` is bfloat16."""
    args, found = sorted_inputs(case), {}
    outer = case.product == "outer"
    name = "transposed_ragged_dot" if outer else "ragged_dot"
    module = importlib.import_module(f"{JAX_KERNELS}.{name}_mgpu")
    kernel = getattr(module, name)
    across = case.inputs if case.product == "transposed" else case.outputs
    for label, how in CONFIGURATIONS.items():
        if across % (how["block_n"] * how["grid_block_n"]):
            continue
        turned = {} if outer else {"transpose_rhs": case.product == "transposed"}
        call = functools.partial(_by_sizes, kernel, **how, **turned)
        found[f"jax's kernel, {label}"] = Case(jax.jit(call), args, needs_gpu=True)
    return found


def _by_sizes(kernel, left, right, sizes, **how):
    if on_gpu():
        return kernel(left, right, group_sizes=sizes, **how)
    # Its tracing asks the device for its cores, which only a GPU has.
    h100 = types.SimpleNamespace(core_count=GPUS["h100"].cores)
    with mock.patch("jax.devices", return_value=[h100]):
        return kernel(left, right, group_sizes=sizes, **how)


def tokamax(case: Product) -> dict[str, Case]:
    """By tokamax; nothing where it is not installed."""
    if not is_there("tokamax"):
        return {}
    library = importlib.import_module("tokamax")
    if case.product == "outer":
        call = functools.partial(_general, library.ragged_dot_general)
    elif case.product == "transposed":

        def call(dy, w, sizes):
            return library.ragged_dot(dy, w.mT, sizes)

    else:
        call = library.ragged_dot
    return {"tokamax": Case(jax.jit(call), sorted_inputs(case), needs_gpu=True)}
