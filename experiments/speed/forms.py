"""What attention in blocks of rows and a byte a weight save, on one CPU core.

    python -m experiments.speed.forms

times attention forward and backward in blocks of rows, as layers take it on CPUs, in one
piece, and by `jax.nn.dot_product_attention`; and one token of a frozen layer of 64 tiles
of 128 at D=512, one tile a token, with two bits a weight and with a byte (`widen`), beside
the dense FFN of as many parameters, ten calls in a row. Float32; medians of nine rounds in
turn, in processor time. Writes `experiments/speed/measured/forms.json`.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.speed.turns import in_turn, ratio
from trix_jax import SparseTriXFFN, freeze, widen
from trix_jax.nn.attention import attend_back, row_blocks, visible

PATH = Path(__file__).parent / "measured" / "forms.json"
ROUNDS = 9
SEQUENCES = ((64, 128), (16, 512), (4, 1024))  # how many, and how long
HEADS, WIDTH = 4, 32
D_MODEL, TILES, TILE_WIDTH = 512, 64, 128
CALLS = 10  # of a token, in a row


def attention(batch: int, length: int, rounds: int) -> list[dict[str, Any]]:
    """How many times as fast blocks are, forward and backward."""
    keys = jax.random.split(jax.random.key(0), 3)
    shape = batch, length, HEADS, WIDTH
    q, k, v = (jax.random.normal(key, shape) for key in keys)
    seen, blocks = visible(length, None, None), row_blocks(length, "cpu")

    def gradient(attend: Callable) -> Callable:
        call = jax.jit(jax.grad(lambda *a: jnp.sum(attend(*a) ** 2), (0, 1, 2)))
        jax.block_until_ready(call(q, k, v))
        return lambda: call(q, k, v)

    times = in_turn(
        {
            "blocks": gradient(lambda q, k, v: attend_back(q, k, v, seen, blocks)),
            "one piece": gradient(lambda q, k, v: attend_back(q, k, v, seen, 1)),
            "dot_product_attention": gradient(
                lambda *a: jax.nn.dot_product_attention(*a, is_causal=True)
            ),
        },
        rounds,
    )
    about = {"what": "attention", "sequences": batch, "length": length}
    about |= {"blocks": blocks}
    return [
        about | {"against": name, **ratio(times[name], times["blocks"])}
        for name in ("one piece", "dot_product_attention")
    ]


def token(rounds: int, d_model: int = D_MODEL, tiles: int = TILES) -> list[dict]:
    """How many times as fast as the dense FFN a token is."""
    hidden = tiles * TILE_WIDTH
    layer = SparseTriXFFN(d_model, num_tiles=tiles, expansion=hidden // d_model)
    x = jax.random.normal(jax.random.key(0), (1, d_model))
    variables = jax.jit(layer.init)(jax.random.key(1), x)
    packed = freeze(layer, variables, x)
    wide = widen(packed)
    up, down = (
        jax.random.normal(jax.random.key(2), shape)
        for shape in ((d_model, hidden), (hidden, d_model))
    )
    apply = jax.jit(lambda v, x: layer.apply(v, x)[0])
    dense = jax.jit(lambda x, up, down: jnp.square(jax.nn.relu(x @ up)) @ down)
    calls = {
        "two bits": lambda: apply(packed, x),
        "a byte": lambda: apply(wide, x),
        "dense": lambda: dense(x, up, down),
    }
    for call in calls.values():
        jax.block_until_ready(call())
    times = in_turn(calls, rounds, CALLS)
    return [
        {"what": f"a token, {name} a weight", "against": "dense, equal parameters"}
        | ratio(times["dense"], times[name])
        for name in ("two bits", "a byte")
    ]


def main() -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    rows = [row for shape in SEQUENCES for row in attention(*shape, ROUNDS)]
    rows += token(ROUNDS)
    for row in rows:
        print(json.dumps(row), flush=True)
    about = {"rounds": ROUNDS, "jax": jax.__version__}
    about |= {"device": "one CPU core, shared: ratios only"}
    PATH.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
