"""The six products of a training FFN at the shapes that are timed, compiled for a GPU
that need not be there, and a model of their time.

    bytes_us    = bytes / bandwidth
    tensor_us   = outputs a core, rounded up, * clocks of one
    modelled_us = `times.grouped_us`, with launches, latencies and rates that are reached

Bytes are those of `x`, `w` and `y`, each once; what programs read again is taken to come
from the L2 cache, and so are tokens that several tiles read by number. Loads are balanced.
"""

import functools
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from trix_kernels import sass, times
from trix_kernels.gpu_specs import Gpu

Product = Literal["forward", "transposed", "outer"]


class Case(NamedTuple):
    """One product of `tokens * per_token` rows with `[tiles, inputs, outputs]` weights.

    Attributes:
        numbered: whether the wider side of the rows are tokens, read by number where they
            lie. Then "up" computes a squared ReLU too, and the gradient of the hidden
            layer what goes with it (`gathered.hidden_gradient`).
    """

    use: str
    product: Product
    tiles: int
    inputs: int
    outputs: int
    tokens: int = 16384
    per_token: int = 4
    numbered: bool = False

    @property
    def name(self) -> str:
        return f"{self.use}, {self.tiles} tiles, {self.inputs}x{self.outputs}"

    @property
    def rows(self) -> int:
        return self.tokens * self.per_token

    def blocks(self, rows_of_block: int) -> int:
        """The most blocks that any routing needs."""
        return (self.rows + self.tiles * (rows_of_block - 1)) // rows_of_block


D, F = 1024, 256
CASES = tuple(
    case
    for tiles in (16, 64)
    for case in (
        Case("up", "forward", tiles, D, F, numbered=True),
        Case("down", "forward", tiles, F, D),
        Case("gradient of the hidden layer", "transposed", tiles, F, D, numbered=True),
        Case("gradient of the input", "transposed", tiles, D, F),
        Case("gradient of up", "outer", tiles, D, F, numbered=True),
        Case("gradient of down", "outer", tiles, F, D, numbered=True),
    )
)


def report(gpu: Gpu, sharding: Any, folder: Path) -> list[dict[str, Any]]:
    """Compiles every case in this process, whose environment is `aot.environment`'s.

    Args:
        gpu: of compute capability 9.0.
        sharding: on it.
        folder: of the compiler's dumps.
    """
    found = []
    for case in CASES:
        before = set(folder.glob("*.ptxas"))
        compile_case(case, sharding)
        (new,) = set(folder.glob("*.ptxas")) - before
        resources = sass.resources(folder, new.stem)._asdict()
        found.append({"name": case.name, **resources, **model(case, gpu)})
    return found


def compile_case(case: Case, sharding: Any) -> None:
    """Compiles one case ahead of time."""
    from trix_kernels.grouped_matmul import gathered, hopper

    def abstract(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    index = functools.partial(abstract, dtype=jnp.int32)
    blocks = case.blocks(hopper.ROWS)
    x = abstract(blocks, hopper.ROWS, case.inputs)
    dy = abstract(blocks, hopper.ROWS, case.outputs)
    w = abstract(case.tiles, case.inputs, case.outputs)
    if case.numbered:
        tokens = abstract(case.tokens, max(case.inputs, case.outputs))
        x, dy = (tokens, dy) if case.inputs > case.outputs else (x, tokens)
    rows = (index(blocks, hopper.ROWS),) if case.numbered else ()
    if case.product == "outer":
        kernel: Any = hopper.grouped_outer
        if case.numbered:
            is_left = case.inputs > case.outputs
            kernel = gathered.outer_of_left if is_left else gathered.outer_of_right
        args = x, dy, index(case.tiles), index(case.tiles), *rows
    else:
        is_transposed = case.product == "transposed"
        kernel = functools.partial(hopper.grouped_matmul, transposed=is_transposed)
        args = dy if is_transposed else x, w, index(blocks), index(1), *rows
        if case.numbered:
            kernel = functools.partial(gathered.matmul_and_act, act=_squared_relu)
        if case.numbered and is_transposed:
            kernel = functools.partial(gathered.hidden_gradient, act=_squared_relu)
            h = abstract(blocks, hopper.ROWS, case.inputs)
            args = *args, h, abstract(blocks, hopper.ROWS, dtype=jnp.float32)
    jax.jit(kernel).lower(*args).compile()


def _squared_relu(h):
    return jnp.square(jax.nn.relu(h))


def model(case: Case, gpu: Gpu) -> dict[str, float]:
    """Bytes, and time by the formula above in microseconds."""
    from trix_kernels.grouped_matmul import hopper

    rows, weights = case.rows, case.tiles * case.inputs * case.outputs
    width_of_dw = 4 if case.product == "outer" else 2
    narrow, wide = sorted((case.inputs, case.outputs))
    lying = case.tokens if case.numbered else rows  # rows of the wide side in memory
    hidden = 1  # arrays as wide as the hidden layer
    if case.numbered and case.product != "outer":
        hidden = 2 if case.product == "forward" else 3
    moved = 2 * (hidden * rows * narrow + lying * wide) + width_of_dw * weights
    target = {
        "forward": (rows, case.outputs, case.inputs),
        "transposed": (rows, case.inputs, case.outputs),
        "outer": (case.tiles * case.inputs, case.outputs, rows // case.tiles),
    }
    down, across, contraction = target[case.product]
    width = hopper.columns_of(across)
    outputs = down // hopper.ROWS * across // width
    macs = hopper.ROWS * width * contraction
    cost = gpu, moved, outputs, macs, min(hidden, 2)
    clocks = -(-outputs // gpu.cores) * macs / gpu.macs
    bytes_us = 1e6 * moved / gpu.bandwidth
    tensor_us = clocks / gpu.clock_ghz / 1e3
    return {
        "bytes_moved": moved,
        "bytes_us": round(bytes_us, 3),
        "tensor_us": round(tensor_us, 3),
        "modelled_us": round(times.grouped_us(*cost), 3),
    }
