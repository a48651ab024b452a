"""The FFN of tiles that tokens choose in sets: a token goes to a set's tiles as to one wide
tile (`trix_kernels.tile_ffn.sets`), with gates of one.

On CPUs the weights of a few sets are put together at a time. A GPU's kernels get those of
all sets, as if they were tiles; since that was not measured on one, layers do not do it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from trix_jax import dispatch, grouped_ffn, hashing, ops
from trix_jax.grouped_ffn import Implementation, Shapes
from trix_jax.typing import Array, Bool, Float, Integer

ROWS = 32  # of a block on CPUs


class Sets(NamedTuple):
    """A token has one of S sets for each of G choices, and K / G tiles of each.

    Attributes:
        number: S.
        per_token: G.
        tiles_per_token: K.
    """

    number: int
    per_token: int
    tiles_per_token: int


def default_reason(shapes: Shapes, of: Sets) -> str | None:
    """Why a layer goes to its tiles one by one; None where it takes sets.

    Args:
        shapes: of the layer, whose K T assignments are to tiles.
    """
    if ops.platform() != "cpu":
        return "Sets were measured on CPUs alone."
    if shapes.activations == "int8":
        return "Int8 activations are rounded between the products of a tile."
    if not isinstance(shapes.assignments, int):
        return "The number of tokens is a symbol."
    tokens, width = shapes.assignments // of.tiles_per_token, shapes.tile_width
    if of.number * width > tokens:
        return (
            f"Copies of weights, {of.number} * {width} numbers for each column and tile of "
            f"a token, would be larger than those of {tokens} tokens."
        )
    return None


def sets_ffn(
    x: Float[Array, "T D"],
    sets: Integer[Array, "T G"],
    up: Float[Array, "N D F"],
    down: Float[Array, "N F D"],
    of: Sets,
    act: Callable,
    implementation: Implementation,
    mask: Bool[Array, " T"] | None = None,
) -> Float[Array, "T D"]:
    """Computes `y_t = sum over n in sets_t of act(x_t @ up_n) @ down_n`, in the dtype of
    `x`; the tiles of a set are those of `hashing.tile_sets`.

    Products are of numbers in the dtype of `x`, summed in float32 and rounded to it.
    Gradients of weights are float32 sums.

    Args:
        act: elementwise, one object for one function.
        mask: False for tokens that are not computed; what they get means nothing.
    """
    num_sets = of.per_token * of.number  # of all choices
    on_gpu = implementation == "mosaic_gpu"
    with jax.named_scope("plan"):
        rows = grouped_ffn.ROWS if on_gpu else ROWS
        plan = dispatch.make_plan(sets, num_sets, rows, mask)
    k, (s, g) = of.tiles_per_token, of[:2]
    tiles = hashing.tile_sets(up.shape[0], k, s, g)
    places = hashing.places_in_sets(tiles, up.shape[0])
    members = ops.Members(jnp.asarray(tiles), jnp.asarray(places))
    if on_gpu:
        gates = jnp.ones(sets.shape, jnp.float32)
        up, down = ops.join(up, down, members)
        inputs = grouped_ffn.Inputs(x, gates, up, down)
        return grouped_ffn.grouped_ffn(inputs, plan, act, implementation, mask)
    blocks = dispatch.to_blocks(x, plan)
    rows = ops.Rows(blocks, plan.block_tile, plan.used)
    y = ops.sets_ffn(rows, up, down, members, act)
    return dispatch.sum_from_blocks(y, plan)
