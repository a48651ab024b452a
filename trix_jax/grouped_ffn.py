"""The FFN of tiles on whole weights, with one backward pass over all of it: up-projection,
activation, down-projection and the sum over a token's tiles.

    forward    h_r = x_t @ up_n                    y_t = sum_k g_tk * (a_r @ down_n)
               a_r = act(h_r)
    backward   p_r = dy_t @ down_n.T               ddown_n = sum_r (g_tk * a_r).T @ dy_t
               dg_tk = <p_r, a_r>                  dup_n = sum_r x_t.T @ dh_r
               dh_r = g_tk * p_r * act'(h_r)       dx_t = sum_k dh_r @ up_n.T

r is the row of token t's k-th tile n in the blocks of a plan. Kept for the backward pass
are the arguments, h and the plan. The tiles' outputs are not, since the gradient of the
gates does without (`<dy_t, a_r @ down_n> = <p_r, a_r>`). The six products, or
with `factors` the derivatives of the two forward ones, are `trix_kernels.grouped_matmul`'s,
so that forward mode and derivatives of derivatives are those of the products. The GPU kernels read the rows of x and dy where they lie; XLA copies
them into blocks.

References:
    Guo et al., 2025, "SonicMoE: Accelerating MoE with IO and Tile-aware Optimizations",
    https://arxiv.org/abs/2512.14080 (the gates' gradient, and what is kept).
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from trix_jax import ops
from trix_jax.dispatch import (
    Plan,
    block_rows,
    gated_sum,
    numbers_from_blocks,
    numbers_to_blocks,
    sum_from_blocks,
    to_blocks,
)
from trix_jax.ternary import Activations, Ternary
from trix_jax.typing import Array, Bool, Float

Implementation = Literal["xla", "mosaic_gpu"]

ROWS = ops.GROUPED_ROWS  # of a block
LEAST_LOAD = 32  # rows of a tile, on average, below which blocks are mostly padding


class Inputs(NamedTuple):
    """What takes gradients."""

    x: Float[Array, "T D"]
    gates: Float[Array, "T K"]
    up: Float[Array, "N D F"]
    down: Float[Array, "N F D"]


def grouped_ffn(
    inputs: Inputs,
    plan: Plan,
    act: Callable,
    implementation: Implementation,
    mask: Bool[Array, " T"] | None = None,
    factors: tuple[Ternary, Ternary] | None = None,
) -> Float[Array, "T D"]:
    """Computes `y_t = sum_k g_tk * (act(x_t @ up_n) @ down_n)` over token t's tiles n, in
    the dtype of `x`.

    Products are of numbers in the dtype of `x`, summed in float32 and rounded to it.
    Gradients of weights are float32 sums.

    Args:
        plan: made of the tiles; of blocks of 128 rows for the GPU kernels.
        act: elementwise, one object for one function.
        implementation: of the products.
        mask: of the plan; masked tokens get 0.
        factors: what `up` and `down` are products of. With them XLA's forward products
            are `(x @ q) * scale`, bit for bit those of packed weights.

    Raises:
        NotImplementedError: the named implementation does not run on this device or these
            shapes, and why.
    """
    if mask is not None:  # they have no row, and read that of another
        x, gates = _hide(inputs.x, mask), _hide(inputs.gates, mask)
        inputs = inputs._replace(x=x, gates=gates)
    fixed = plan, None if implementation == "mosaic_gpu" else factors
    y = _differentiable(act, implementation)(*ops.vary_alike((inputs, fixed)))
    return y if mask is None else _hide(y, mask)


def _hide(x_TI, mask):
    return jnp.where(mask[:, None], x_TI, 0)


class Shapes(NamedTuple):
    """What decides whether the GPU kernels run: `assignments` is T * K."""

    dtype: Any
    d_model: int
    tile_width: int
    num_tiles: int
    assignments: Any
    activations: Activations = "float"


def unsupported_reason(shapes: Shapes) -> str | None:
    """Why the GPU kernels of the products do not run; None where they do."""
    if shapes.activations == "int8":
        return "Int8 activations are rounded between the products, by XLA."
    if not isinstance(shapes.assignments, int):
        return "The GPU kernels take a number of tokens that is known, not a symbol."
    return ops.grouped_reason(shapes.dtype, shapes.d_model, shapes.tile_width)


def suits_batches(shapes: Shapes) -> bool:
    """Whether XLA computes these shapes in batched products: see `ops.suits_batches`.
    Larger weights, and few rows, go block after block (`trix_kernels.tile_ffn`).

    On two CPU cores (AMD EPYC, jax 0.12.0.1) forward and backward take, in milliseconds,
    batched and block after block (`T, D, F, N, K`): 18 and 35 (2048, 128, 32, 96, 11), 21
    and 32 (8192, 128, 32, 16, 4), 60 and 94 (8192, 256, 64, 64, 4), but 71 and 74 (8192,
    512, 128, 64, 1).
    """
    if shapes.activations == "int8":
        return False
    rows = block_rows(shapes.assignments, shapes.num_tiles)
    return ops.suits_batches(rows, shapes.d_model, shapes.tile_width)


def default_reason(shapes: Shapes) -> str | None:
    """Why `implementation=None` takes XLA; None where it takes the GPU kernels."""
    if reason := unsupported_reason(shapes):
        return reason
    if shapes.assignments < LEAST_LOAD * shapes.num_tiles:
        return (
            f"Fewer than {LEAST_LOAD} tokens a tile would leave blocks of {ROWS} rows "
            f"mostly empty. Got {shapes.assignments} for {shapes.num_tiles} tiles."
        )
    return ops.whole_reason()


@lru_cache
def _differentiable(act, implementation):
    forward, backward = (partial(f, act, implementation) for f in (_forward, _backward))
    return ops.with_kept(forward, backward)


def _forward(act, implementation, inputs: Inputs, fixed: Any):
    plan, factors = fixed
    how = _How(act, implementation, inputs.up.shape[0])
    if factors is None:
        h, a = _up(how, inputs.x, inputs.up, plan)
        y = _product("forward", how, a, inputs.down, plan)
    else:
        h = _scaled(how, inputs.x, inputs.up, factors[0], plan)
        y = _scaled(how, act(h), inputs.down, factors[1], plan)
    return gated_sum(y, inputs.gates, plan).astype(inputs.x.dtype), h


def _backward(act, implementation, primals: Any, dy: Float[Array, "T D"]) -> Inputs:
    inputs, (plan, _), h = primals
    how = _How(act, implementation, inputs.up.shape[0])
    # Or XLA would find the rows of x and act(h) where the way forward has made them, and
    # keep them until now.
    x, h, dy = jax.lax.optimization_barrier((inputs.x, h, dy))
    gate = numbers_to_blocks(inputs.gates, plan)
    dh, ga, dots = _hidden(how, dy, inputs.down, h, gate, plan)
    dgates = numbers_from_blocks(dots, plan)
    ddown = _product("outer", how, ga, dy, plan)
    dup = _product("outer", how, x, dh, plan)
    dx = _product("transposed", how, dh, inputs.up, plan)
    return Inputs(
        sum_from_blocks(dx, plan),
        dgates.astype(inputs.gates.dtype),
        dup.astype(inputs.up.dtype),
        ddown.astype(inputs.down.dtype),
    )


class _How(NamedTuple):
    """What computes: the activation, the products' implementation, and N."""

    act: Callable
    implementation: Implementation
    tiles: int

    @property
    def has_epilogues(self) -> bool:
        """Whether the kernels compute the activation too; else XLA does."""
        return self.implementation == "mosaic_gpu" and ops.knows(self.act)


def _up(how, x, w, plan):
    """Computes `h = x_t @ up_n` and `act(h)` in blocks."""

    def plain(x, w, plan):
        h = _product("forward", how, x, w, plan)
        return h, how.act(h)

    def fused(x, w, plan):
        return ops.numbered_matmul_and_act(x, w, *_numbers(how, plan), how.act)

    return _either(how.has_epilogues, fused, plain, x, w, plan)


def _hidden(how, dy, w, h, gate, plan):
    """Computes `act'(h) * gate * p`, `gate * act(h)` and `<p, act(h)>` of each row, `p =
    dy_t @ down_n.T`.
    """

    def plain(dy, w, h, gate, plan):
        p = _product("transposed", how, dy, w, plan)
        a, act_back = jax.vjp(how.act, h)
        wide = gate[..., None]
        (dh,) = act_back((wide * p).astype(h.dtype))
        return dh, (wide * a).astype(h.dtype), (p * a.astype(gate.dtype)).sum(axis=-1)

    def fused(dy, w, h, gate, plan):
        numbers, more = _numbers(how, plan), (h, gate, how.act)
        dh, ga, dots = ops.numbered_hidden_gradient(dy, w, *numbers, *more)
        return dh, ga, dots.astype(gate.dtype)

    return _either(how.has_epilogues, fused, plain, dy, w, h, gate, plan)


def _product(name, how, left, right, plan):
    """A product of two arrays. Tokens, `[T, D]`, stand for their rows in blocks: the
    kernels read these where they lie.
    """

    def plain(left, right, plan):
        blocks = (to_blocks(a, plan) if a.ndim == 2 else a for a in (left, right))
        calls: dict[str, Any] = {
            "forward": ops.grouped_matmul,
            "transposed": ops.transposed_matmul,
            "outer": partial(ops.grouped_outer, tiles=how.tiles),
        }
        at = {"block_tile": plan.block_tile, "filled": _filled(plan)}
        return calls[name](*blocks, **at, implementation=how.implementation)

    def fused(left, right, plan):
        numbers = _numbers(how, plan)
        if name == "outer":
            return ops.numbered_outer(left, right, *numbers)
        is_transposed = name == "transposed"
        return ops.numbered_matmul(left, right, *numbers, transposed=is_transposed)

    has_tokens = 2 in (left.ndim, right.ndim)
    is_fused = has_tokens and how.implementation == "mosaic_gpu"
    return _either(is_fused, fused, plain, left, right, plan)


def _scaled(how, x, w, factors, plan):
    """The forward product of `w` as `(x @ q) * scale`, with the derivatives of `w`'s."""

    def plain(x, w, factors, plan):
        return _product("forward", how, x, w, plan)

    def scaled(x, w, factors, plan):
        blocks = to_blocks(x, plan) if x.ndim == 2 else x
        return ops.blocks_matmul(blocks, factors, plan.block_tile)

    return _either(True, scaled, plain, x, w, factors, plan)


def _either(is_fused, fused, plain, *args):
    """`plain(*args)`, or `fused(*args)`, which is the same, with the derivatives of
    `plain`.
    """
    if not is_fused:
        return plain(*args)
    call = jax.custom_jvp(fused)

    @call.defjvp
    def _(primals, tangents):
        return jax.jvp(plain, primals, tangents)

    return call(*args)


def _numbers(how, plan):
    """The groups of a plan's blocks, and the token in each row, -1 where none is."""
    numbers = jnp.arange(how.tiles, dtype=jnp.int32)
    groups = ops.Groups(plan.block_tile, _filled(plan), numbers)
    is_real = plan.source < plan.slot.size
    return groups, jnp.where(is_real, plan.source // plan.slot.shape[-1], -1)


def _filled(plan):
    """Rows of each block that hold an assignment."""
    return (plan.source < plan.slot.size).sum(axis=1, dtype=jnp.int32)
