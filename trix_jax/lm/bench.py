"""Speed of the layers on the device that is here, as ratios of medians taken in one
run.

Every ratio is `time of the other / time of TriX`: greater is better. The functions of a
comparison run in turn, round after round, so that other work on the machine meets all
of them. T tokens of width D, N tiles of F, routing and un-permutation included.
"""

import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trix_jax import dispatch, freeze, ops, routing
from trix_jax.nn.block import DenseFFN
from trix_jax.nn.hierarchical_ffn import HierarchicalTriXFFN
from trix_jax.nn.sparse_ffn import SparseTriXFFN
from trix_jax.nn.tiles import squared_relu
from trix_jax.ternary import TernaryConfig, hard_ternary
from trix_jax.typing import Array

T, D, N, F = 8192, 512, 64, 128
SHAPES = ((8192, 256), (8192, 1024), (1024, 64), (64, 64))  # further tokens and tiles


def bench(rounds: int = 7, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Measures everything; see DESIGN section 5 for the keys."""
    result: dict[str, Any] = {"device": str(jax.devices()[0]), "versions": _versions()}
    table = []
    for dtype in (jnp.float32, jnp.bfloat16):
        row = _main_shape(dtype, rounds)
        table.append({"dtype": jnp.dtype(dtype).name, "tokens": T, "tiles": N, **row})
        report(_line(table[-1]))
        if dtype == jnp.float32:
            result |= row
    for tokens, tiles in SHAPES:
        row = _layers(jnp.float32, tokens, tiles, rounds)
        table.append({"dtype": "float32", "tokens": tokens, "tiles": tiles, **row})
        report(_line(table[-1]))
    result["packed_ratio"] = min(ratio for _, ratio in packed_ratios())
    result["packed_ratios"] = dict(packed_ratios())
    result["table"] = table
    return result


def _main_shape(dtype, rounds: int) -> dict[str, float]:
    layer = SparseTriXFFN(D, num_tiles=N, expansion=N * F // D, dtype=dtype)
    dense, one_tile = DenseFFN(D, N * F, dtype=dtype), DenseFFN(D, F, dtype=dtype)
    x = _tokens(T, dtype)
    variables = layer.init(jax.random.key(0), x)
    frozen = freeze(layer, variables, x)
    dense_params, tile_params = (
        m.init(jax.random.key(1), x) for m in (dense, one_tile)
    )

    def forward(model):
        return jax.jit(lambda variables, x: _output(model.apply(variables, x)))

    def train(model):
        loss = lambda v, x: jnp.sum(jnp.square(_output(model.apply(v, x))))  # noqa: E731
        return jax.jit(jax.grad(lambda p, rest, x: loss({**rest, "params": p}, x)))

    times = _interleaved(
        {
            "trix": (forward(layer), frozen, x),
            "dense": (forward(dense), dense_params, x),
            "one_tile": (forward(one_tile), tile_params, x),
        },
        rounds,
    )
    state = {"routing": variables["routing"]}
    training = _interleaved(
        {
            "trix": (train(layer), variables["params"], state, x),
            "dense": (train(dense), dense_params["params"], {}, x),
        },
        max(rounds // 2, 2),
    )
    decoding = _interleaved(
        {
            "trix": (forward(layer), frozen, x[:1]),
            "dense": (forward(dense), dense_params, x[:1]),
        },
        10 * rounds,
    )
    return {
        "forward_vs_dense": times["dense"] / times["trix"],
        "forward_vs_one_tile": times["one_tile"] / times["trix"],
        "train_vs_dense": training["dense"] / training["trix"],
        "decode_vs_dense": decoding["dense"] / decoding["trix"],
        "packed_vs_unpacked": _packed_vs_unpacked(dtype, rounds),
    }


def _packed_vs_unpacked(dtype, rounds: int) -> float:
    """The core on the same frozen weights, two bits each or as `dtype`."""
    keys = jax.random.split(jax.random.key(2), 2)
    up, down = (
        hard_ternary(jax.random.normal(key, shape), TernaryConfig())
        for key, shape in zip(keys, ((N, D, F), (N, F, D)), strict=True)
    )
    signature = routing.signatures(up.q.sum(axis=-1))

    @jax.jit
    def layer(x, up, down):
        tiles = routing.select_tiles(routing.match(x, signature))
        plan = dispatch.make_plan(tiles, N)
        h = dispatch.to_blocks(x, plan)
        y = ops.tile_ffn(h, up, down, plan.block_tile, (F, D), squared_relu, plan.used)
        return dispatch.from_blocks(y, plan).sum(axis=1)

    x = _tokens(T, dtype)
    unpacked = [w._replace(q=w.q.astype(dtype)) for w in (up, down)]
    times = _interleaved(
        {
            "packed": (layer, x, ops.pack(up), ops.pack(down)),
            "unpacked": (layer, x, *unpacked),
        },
        rounds,
    )
    return times["unpacked"] / times["packed"]


def _layers(dtype, tokens: int, tiles: int, rounds: int) -> dict[str, float]:
    """Flat and hierarchical layers of `tiles` tiles of F against the dense FFN of all
    their parameters.
    """
    x = _tokens(tokens, dtype)
    per_cluster = int(2 ** round(np.log2(tiles) / 2))
    layers = {
        "flat": SparseTriXFFN(D, num_tiles=tiles, expansion=tiles * F // D),
        "hierarchical": HierarchicalTriXFFN(
            D, d_hidden=F, num_tiles=tiles, tiles_per_cluster=per_cluster
        ),
    }
    cases: dict[str, tuple] = {}
    for name, layer in layers.items():
        frozen = freeze(layer, layer.init(jax.random.key(0), x), x)
        call = jax.jit(lambda v, x, layer=layer: layer.apply(v, x)[0])
        cases[name] = (call, frozen, x)
    dense = DenseFFN(D, tiles * F)
    cases["dense"] = (jax.jit(dense.apply), dense.init(jax.random.key(1), x), x)
    times = _interleaved(cases, max(rounds // 2, 2))
    return {
        "forward_vs_dense": times["dense"] / times["flat"],
        "hierarchical_vs_dense": times["dense"] / times["hierarchical"],
    }


def packed_ratios() -> list[tuple[str, float]]:
    """Float32 bytes over packed bytes with scales, for each granularity, of a tile FFN
    of D x 4 D.
    """
    ratios = []
    for granularity in ("tile", "channel", "group"):
        config = TernaryConfig(granularity=granularity)
        latent = [jnp.zeros((4, D, D)) + 1, jnp.zeros((4, D, D)) + 1]
        packed = [ops.pack(hard_ternary(w, config)) for w in latent]
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(packed))
        ratios.append((granularity, sum(w.nbytes for w in latent) / held))
    return ratios


def _interleaved(cases: dict[str, tuple], rounds: int) -> dict[str, float]:
    """Median seconds of each case, `(function, *arguments)`, run in turn."""
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for call, *args in cases.values():
        jax.block_until_ready(call(*args))
    for _ in range(rounds):
        for name, (call, *args) in cases.items():
            began = time.perf_counter()
            jax.block_until_ready(call(*args))
            taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in taken.items()}


def _tokens(count: int, dtype) -> Array:
    return jax.random.normal(jax.random.key(3), (count, D), dtype)


def _output(result: Any) -> Array:
    return result[0] if isinstance(result, tuple) else result


def _line(row: dict[str, Any]) -> str:
    head = f"{row['dtype']}, {row['tokens']} tokens, {row['tiles']} tiles:"
    ratios = (f"{k} {v:.2f}" for k, v in row.items() if isinstance(v, float))
    return f"{head} {', '.join(ratios)}"


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "jax": jax.__version__}
