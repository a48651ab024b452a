"""`tile_ffn` for XLA: one batched matmul after the other or, on CPUs, block after
block.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Integer

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
        block_tile: on a CPU blocks of one tile must stand together.
        shape: F, the hidden width, and O.
        act: elementwise.
        used: blocks from this one on need not be computed; None computes all.
        activations: "int8" takes packed weights and has no gradient.
    """
    if activations == "int8":
        hidden = act(tile_matmul(x, up, block_tile, shape[0], activations))
        return tile_matmul(hidden, down, block_tile, shape[1], activations)
    if used is None:
        used = jnp.full((1,), x.shape[0], jnp.int32)
    rows, weights = vary_alike((Rows(x, block_tile, used), (up, down)))
    return _tile_ffn(rows, weights, shape, act)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _tile_ffn(rows, weights, shape, act):
    batched = partial(_batched, shape=shape, act=act)
    if rows.x.shape[0] == 1:
        return batched(rows, weights)
    loop = custom_vmap(partial(blockwise.forward, shape=shape, act=act))
    loop.def_vmap(_vmapped(batched))
    return jax.lax.platform_dependent(rows, weights, cpu=loop, default=batched)


def _tile_ffn_forward(rows, weights, shape, act):
    return _tile_ffn(rows, weights, shape, act), (rows, weights)


def _tile_ffn_backward(shape, act, saved, dy):
    def batched(rows, weights, dy):
        numbers, words = blockwise.split(weights)

        def value(x, numbers):
            whole = blockwise.join(numbers, words)
            return _batched(rows._replace(x=x), whole, shape, act)

        return jax.vjp(value, rows.x, numbers)[1](dy)

    loop = custom_vmap(partial(blockwise.backward, shape=shape, act=act))
    loop.def_vmap(_vmapped(batched))
    dx, dw = jax.lax.platform_dependent(*saved, dy, cpu=loop, default=batched)
    integers: Any = None
    return Rows(dx, integers, integers), dw


_tile_ffn.defvjp(_tile_ffn_forward, _tile_ffn_backward)


def _batched(rows, weights, shape, act):
    pair = tuple(
        of_blocks(w, rows.tile, features)
        for w, features in zip(weights, shape, strict=True)
    )
    return blockwise.ffn(rows.x, pair, act)


def _vmapped(batched):
    """Under `vmap` the loops of the batch would wait for each other: all at once."""

    def rule(axis_size, in_batched, *args):
        in_axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, in_batched)
        y = jax.vmap(batched, in_axes, axis_size=axis_size)(*args)
        return y, jax.tree.map(lambda _: True, y)

    return rule
