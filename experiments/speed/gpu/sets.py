"""Tiles that tokens choose in sets (`RoutingConfig.hash_sets`): forward and backward as a
token's K tiles, which is what a GPU gets, and as its set's one wide tile.
"""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp

from experiments.speed.gpu.layer import memory
from experiments.speed.gpu.shapes import Shapes
from experiments.speed.gpu.timing import Case, Row, by_cupti, timed
from trix_jax import dispatch
from trix_jax.grouped_ffn import ROWS, Implementation, Inputs, grouped_ffn
from trix_jax.hashing import tile_sets
from trix_jax.nn.activations import squared_relu
from trix_jax.sets_ffn import Sets, sets_ffn
from trix_kernels.grouped_matmul import device_reason


def times(shapes: Shapes) -> Iterator[Row]:
    """Both ways in turn of the most tiles, and the bytes that they hold."""
    tiles = max(shapes.tiles)
    ways = cases(shapes, tiles)
    for name, row in timed(ways, shapes).items():
        about = {"tiles": tiles, "sets": shapes.sets, "way": name}
        if "us" in row:
            row |= by_cupti(ways[name]) | memory(ways[name])
        yield {"name": f"{tiles} tiles: {name}", **about, **row}


def cases(shapes: Shapes, tiles: int) -> dict[str, Case]:
    """The jitted gradients of input and weights, by way."""
    d, f, k = shapes.width, shapes.tile_width, shapes.per_token
    by: Implementation = "xla" if device_reason() else "mosaic_gpu"
    of = Sets(shapes.sets, 1, k)
    table = jnp.asarray(tile_sets(tiles, k, shapes.sets, 1))
    keys = jax.random.split(jax.random.key(3), 5)
    x, dy = (jax.random.normal(a, (shapes.tokens, d), jnp.bfloat16) for a in keys[:2])
    up = jax.random.normal(keys[2], (tiles, d, f))
    down = jax.random.normal(keys[3], (tiles, f, d))
    sets = jax.random.randint(keys[4], (shapes.tokens, 1), 0, shapes.sets)

    def tile_by_tile(x, up, down, sets):
        chosen = table[sets[:, 0]]
        plan = dispatch.make_plan(chosen, tiles, ROWS if by == "mosaic_gpu" else None)
        gates = jnp.ones(chosen.shape, jnp.float32)
        return grouped_ffn(Inputs(x, gates, up, down), plan, squared_relu, by)

    def in_sets(x, up, down, sets):
        return sets_ffn(x, sets, up, down, of, squared_relu, by)

    def gradients(way, dy, *args):
        _, pull = jax.vjp(lambda *given: way(*given, args[-1]), *args[:-1])
        return pull(dy)

    ways = {"tile by tile": tile_by_tile, "in sets": in_sets}
    args = dy, x, up, down, sets
    return {
        name: Case(jax.jit(partial(gradients, w)), args) for name, w in ways.items()
    }
