"""From how many tiles on is routing by clusters faster than flat routing?

    python -m experiments.speed.hierarchy

times one layer of each kind, four tiles a token, in float32 on one CPU core: forward and
backward with routing's state and losses ("training"), and the frozen layer on as many
tokens ("serving") and on one ("decoding"). All kinds of one size run in turn; a figure is
the median of seven rounds of processor time over that of flat routing, with the range of
the rounds' ratios. Writes `experiments/speed/measured/hierarchy.json`.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.speed.turns import in_turn, ratio
from trix_jax import (
    HierarchicalTriXFFN,
    RoutingConfig,
    SparseTriXFFN,
    freeze,
    routing,
)

PATH = Path(__file__).parent / "measured" / "hierarchy.json"
ROUNDS = 7
TILES = (64, 128, 256, 512, 1024)
USES = ("training", "serving", "decoding")


class Shape(NamedTuple):
    """Of a layer and its input."""

    d_model: int = 128
    tile_width: int = 32
    tokens: int = 2048


def cluster_size(num_tiles: int) -> int:
    """The power of two at or above `sqrt(N)`: about as many clusters as tiles in each."""
    return 2 ** ((num_tiles.bit_length()) // 2)


def layers(num_tiles: int, shape: Shape) -> dict[str, Any]:
    """The kinds that are compared, the first with the others."""
    d, f = shape.d_model, shape.tile_width
    sizes = {"num_tiles": num_tiles, "tiles_per_token": 4}
    flat = SparseTriXFFN(d, expansion=num_tiles * f // d, **sizes)
    found: dict[str, Any] = {"flat": flat}
    clusters = {"tiles_per_cluster": cluster_size(num_tiles), **sizes}
    for top in (2, 4):
        for over in ("all", "open"):
            config = RoutingConfig(balance_over=over)
            more = {"top_k_clusters": top, "routing": config, **clusters}
            found[f"{top} clusters, {over}"] = HierarchicalTriXFFN(d, f, **more)
    return found


def calls(layer: Any, shape: Shape) -> dict[str, Callable]:
    """A call of each use, compiled and run once."""
    x = np.random.default_rng(0).normal(size=(shape.tokens, shape.d_model))
    x = jnp.asarray(x, jnp.float32)
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    frozen = freeze(layer, variables, x)

    def loss(params, x, state):
        given = {"params": params, "routing": state}
        (y, _, aux), new = layer.apply(given, x, True, mutable=["routing"])
        return jnp.sum(y**2) + aux["total_aux"], new["routing"]

    @jax.jit
    def train(x):
        how = jax.value_and_grad(loss, (0, 1), has_aux=True)
        (_, state), grads = how(variables["params"], x, variables["routing"])
        return grads, routing.update(state)

    serve = jax.jit(lambda x: layer.apply(frozen, x)[0])
    made = (train, x), (serve, x), (serve, x[:1])
    found = {u: lambda f=f, x=x: f(x) for u, (f, x) in zip(USES, made, strict=True)}
    for call in found.values():
        jax.block_until_ready(call())
    return found


def compare(num_tiles: int, shape: Shape, rounds: int) -> list[dict[str, Any]]:
    """A row a kind and use."""
    made = {
        name: calls(layer, shape) for name, layer in layers(num_tiles, shape).items()
    }
    rows = []
    for use in USES:
        each = {name: kind[use] for name, kind in made.items()}
        times = in_turn(each, rounds, 20 if use == "decoding" else 1)
        flat = times.pop("flat")
        for name, own in times.items():
            found = ratio(own, flat)
            found["of_flat"] = found.pop("ratio")
            rows.append({"num_tiles": num_tiles, "use": use, "kind": name, **found})
    return rows


def main() -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    shape, rows = Shape(), []
    for num_tiles in TILES:
        rows += compare(num_tiles, shape, ROUNDS)
        for row in rows[-4 * len(USES) :]:
            print(json.dumps(row), flush=True)
    about = {**shape._asdict(), "tiles_per_token": 4, "rounds": ROUNDS}
    about |= {"jax": jax.__version__, "device": "one CPU core, shared: ratios only"}
    PATH.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
