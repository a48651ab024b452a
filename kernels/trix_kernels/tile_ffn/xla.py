"""`tile_ffn` for XLA: one batched matmul after the other or, on CPUs where weights are
larger than rows, block after block.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Integer

from trix_kernels.derivatives import with_backward
from trix_kernels.quantize import Activations
from trix_kernels.tile_ffn import blockwise
from trix_kernels.tile_ffn.blockwise import Rows
from trix_kernels.tile_matmul.xla import of_blocks, tile_matmul
from trix_kernels.varying import vary_alike


def tile_ffn(
    x: Float[Array, "M R D"],
    up: Any,
    down: Any,
    block_tile: Integer[Array, " M"],
    shape: tuple[int, int],
    act: Callable,
    used: Integer[Array, "1"] | None = None,
    activations: Activations = "float",
) -> Float[Array, "M R O"]:
    """Computes `act(x[m] @ up[n]) @ down[n]`, `n = block_tile[m]`.

    Args:
        up, down: `Packed`, or pairs `(q, scale)` that take gradients.
        block_tile: blocks of one tile best stand together: a CPU decodes it once.
        shape: F, the hidden width, and O.
        act: elementwise.
        used: blocks from this one on need not be computed; None computes all.
        activations: "int8" takes packed weights.
    """
    if activations == "int8":
        hidden = act(tile_matmul(x, up, block_tile, shape[0], activations))
        return tile_matmul(hidden, down, block_tile, shape[1], activations)
    if used is None:
        used = jnp.full((1,), x.shape[0], jnp.int32)
    rows, weights = vary_alike((Rows(x, block_tile, used), (up, down)))
    numbers, words = blockwise.split(weights)
    run = _differentiable(tuple(shape), act)
    return run((rows.x, numbers), (rows.tile, rows.used, words))


def suits_batches(rows: int, inputs: int, outputs: int) -> bool:
    """Whether blocks of so many rows meet weights `[inputs, outputs]` in batched products
    on CPUs too: a block's copy of its tile's weights is no larger than its rows.

    On two CPU cores (AMD EPYC, jax 0.12.0.1) a frozen layer takes, in milliseconds,
    batched and block after block (`T, D, F, N, K`): 5.4 and 8.0 (2048, 128, 32, 96, 11),
    20 and 51 (8192, 128, 32, 96, 11), 16 and 28 (8192, 256, 64, 64, 4), 1.3 and 1.1 (128,
    128, 32, 96, 11). With weights larger than rows there is nothing to gain: 31 to 43 and
    32 to 39 (8192, 512, 128, 64, 1).
    """
    return inputs * outputs <= rows * (inputs + outputs)


@lru_cache(256)
def _differentiable(shape, act):
    """One object for one function, so that calls outside of `jit` compile once."""
    how = shape, act
    run = with_backward(partial(_forward, *how), partial(_backward, *how))
    return jax.jit(run, inline=True)


def _forward(shape, act, inputs, fixed):
    def loop(inputs, fixed):
        return blockwise.forward(*_joined(inputs, fixed), shape, act)

    def batched(inputs, fixed):
        return _batched(*_joined(inputs, fixed), shape, act)

    x = inputs[0]
    # A symbolic number of blocks is neither.
    if x.shape[0] in (0, 1) or suits_batches(x.shape[1], x.shape[2], shape[0]):
        return batched(inputs, fixed)
    cpu = loop_unless_vmapped(loop, batched)
    return jax.lax.platform_dependent(inputs, fixed, cpu=cpu, default=batched)


def _backward(shape, act, primals, dy):
    inputs, fixed = primals

    def loop(given, fixed):
        inputs, dy = given
        return blockwise.backward(*_joined(inputs, fixed), dy, shape, act)

    def batched(given, fixed):
        def value(inputs):
            return _batched(*_joined(inputs, fixed), shape, act)

        inputs, dy = given
        return jax.vjp(value, inputs)[1](dy)[0]

    given, x = (inputs, dy), inputs[0]
    if x.shape[0] == 0 or suits_batches(x.shape[1], x.shape[2], shape[0]):
        return batched(given, fixed)
    cpu = loop_unless_vmapped(loop, batched)
    return jax.lax.platform_dependent(given, fixed, cpu=cpu, default=batched)


def _joined(inputs, fixed):
    """Rows and weights from what takes gradients and what takes none."""
    (x, numbers), (tile, used, words) = inputs, fixed
    return Rows(x, tile, used), blockwise.join(numbers, words)


def _batched(rows, weights, shape, act):
    pair = tuple(
        of_blocks(w, rows.tile, features)
        for w, features in zip(weights, shape, strict=True)
    )
    return blockwise.ffn(rows.x, pair, act)


def loop_unless_vmapped(loop, batched):
    """`loop(inputs, fixed)`, but `batched` under `vmap`, where the loops of the batch
    would wait for each other. Its derivative to `inputs` is that of `batched`: a loop of
    unknown length has no transpose, and `custom_vmap` none of its own.
    """
    by_loop = custom_vmap(loop)

    @by_loop.def_vmap
    def _(axis_size, in_batched, *args):
        in_axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, in_batched)
        y = jax.vmap(batched, in_axes, axis_size=axis_size)(*args)
        return y, jax.tree.map(lambda _: True, y)

    @jax.custom_jvp
    def run(inputs, fixed):
        return by_loop(inputs, fixed)

    @run.defjvp
    def _(primals, tangents):
        inputs, fixed = primals
        _, tangent = jax.jvp(
            lambda inputs: batched(inputs, fixed), (inputs,), tangents[:1]
        )
        return run(inputs, fixed), tangent

    return run
