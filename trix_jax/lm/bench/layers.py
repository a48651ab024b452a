"""The layers against dense FFNs, on random weights.

Every ratio is `time of the other / time of TriX`: greater is better. Routing and
un-permutation are included.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trix_jax import freeze, ops, routing
from trix_jax.lm.bench.timing import (
    Case,
    Sizes,
    forward,
    interleaved,
    ratio,
    spread,
    tokens,
    train,
)
from trix_jax.nn.activations import squared_relu
from trix_jax.nn.block import DenseFFN
from trix_jax.nn.hierarchical_ffn import HierarchicalTriXFFN
from trix_jax.nn.router import Route
from trix_jax.nn.sparse_ffn import SparseTriXFFN
from trix_jax.nn.tiles import tile_ffn
from trix_jax.ternary import TernaryConfig, hard_ternary
from trix_jax.typing import Variables

Say = Callable[[str], None]


def measure_layers(rounds: int, report: Say, sizes: Sizes) -> dict[str, Any]:
    """The ratios of the main shape in float32, and a table of all shapes."""
    table, result = [], {}
    for dtype in (jnp.float32, jnp.bfloat16):
        row, ranges = main_shape(dtype, rounds, sizes)
        head = {"dtype": jnp.dtype(dtype).name, "tokens": sizes.tokens}
        table.append({**head, "tiles": sizes.tiles, **row})
        report(_line(table[-1]))
        if dtype == jnp.float32:
            result = {**row, "ranges": ranges}
    count, tiles = sizes.beyond_cache
    row = {"packed_vs_unpacked": packed_vs_unpacked(count, tiles, rounds, sizes)}
    shapes = [((count, tiles), row)]
    for shape in (*sizes.small, *sizes.many):
        shapes.append((shape, routed(*shape, max(rounds // 2, 2), sizes)))
    for (count, tiles), row in shapes:
        table.append({"dtype": "float32", "tokens": count, "tiles": tiles, **row})
        report(_line(table[-1]))
    return {**result, "table": table}


def main_shape(dtype: Any, rounds: int, sizes: Sizes) -> tuple[dict, dict]:
    """The ratios (`bench` says what each is), and their ranges over the rounds."""
    d, n, f = sizes.width, sizes.tiles, sizes.tile_width
    layer = SparseTriXFFN(d, num_tiles=n, expansion=n * f // d, dtype=dtype)
    dense, tile = DenseFFN(d, n * f, dtype=dtype), DenseFFN(d, f, dtype=dtype)
    x = tokens(sizes.tokens, d, dtype)
    variables = layer.init(jax.random.key(0), x[:1])
    frozen = freeze(layer, variables, x)
    dense_weights, tile_weights = (
        m.init(jax.random.key(1), x[:1]) for m in (dense, tile)
    )
    state = {"routing": variables["routing"]}
    calls = {"trix": forward(layer), "dense": forward(dense), "tile": forward(tile)}
    forwards = interleaved(
        {
            "trix": (calls["trix"], frozen, x),
            "dense": (calls["dense"], dense_weights, x),
            "tile": (calls["tile"], tile_weights, x),
        },
        rounds,
    )
    trained = interleaved(
        {
            "trix": (train(layer), variables["params"], state, x),
            "dense": (train(dense), dense_weights["params"], {}, x),
        },
        max(rounds // 2, 2),
    )
    decoded = interleaved(
        {
            "trix": (calls["trix"], frozen, x[:1]),
            "dense": (calls["dense"], dense_weights, x[:1]),
        },
        10 * rounds,
    )
    pairs = {
        "forward_vs_dense": (forwards, "dense"),
        "forward_vs_one_tile": (forwards, "tile"),
        "train_vs_dense": (trained, "dense"),
        "decode_vs_dense": (decoded, "dense"),
    }
    row = {name: ratio(taken, other, "trix") for name, (taken, other) in pairs.items()}
    row["packed_vs_unpacked"] = packed_vs_unpacked(
        sizes.tokens, n, rounds, sizes, dtype
    )
    ranges = {name: spread(taken, o, "trix") for name, (taken, o) in pairs.items()}
    return row, ranges


def packed_vs_unpacked(
    count: int, tiles: int, rounds: int, sizes: Sizes, dtype: Any = jnp.float32
) -> float:
    """A layer's tiles on the same frozen weights, two bits each or as `dtype`."""
    d, f = sizes.width, sizes.tile_width
    keys = jax.random.split(jax.random.key(2), 2)
    up, down = (
        hard_ternary(jax.random.normal(key, shape), TernaryConfig())
        for key, shape in zip(keys, ((tiles, d, f), (tiles, f, d)), strict=True)
    )
    signature = routing.signatures(up.q.sum(axis=-1))

    @jax.jit
    def layer(x, up, down):
        chosen = routing.select_tiles(routing.match(x, signature))
        route = Route(chosen, jnp.ones(chosen.shape, jnp.float32))
        return tile_ffn(x, route, up, down, (tiles, f), squared_relu)

    x = tokens(count, d, dtype)
    unpacked = [w._replace(q=w.q.astype(dtype)) for w in (up, down)]
    taken = interleaved(
        {
            "packed": (layer, x, ops.pack(up), ops.pack(down)),
            "unpacked": (layer, x, *unpacked),
        },
        rounds,
    )
    return ratio(taken, "unpacked", "packed")


def routed(count: int, tiles: int, rounds: int, sizes: Sizes) -> dict[str, float]:
    """Flat and hierarchical layers against the dense FFN of all their parameters, where
    that fits, and against the dense FFN of one tile.
    """
    d, f = sizes.width, sizes.tile_width
    x = tokens(count, d)
    models = {"flat": flat(d, tiles, f), "hierarchical": hierarchical(d, tiles, f)}
    cases: dict[str, Case] = {
        name: (forward(layer), random_frozen(layer, x), x)
        for name, layer in models.items()
    }
    tile = DenseFFN(d, f)
    cases["tile"] = (forward(tile), tile.init(jax.random.key(1), x[:1]), x)
    row = {}
    if 8 * d * tiles * f <= sizes.dense_bytes:
        dense = DenseFFN(d, tiles * f)
        weights = dense.init(jax.random.key(1), x[:1])
        slow = interleaved({"dense": (forward(dense), weights, x), **cases}, 2)
        row["forward_vs_dense"] = ratio(slow, "dense", "flat")
        row["hierarchical_vs_dense"] = ratio(slow, "dense", "hierarchical")
    taken = interleaved(cases, rounds)
    row["forward_vs_one_tile"] = ratio(taken, "tile", "flat")
    row["hierarchical_vs_one_tile"] = ratio(taken, "tile", "hierarchical")
    row["hierarchical_vs_flat"] = ratio(taken, "flat", "hierarchical")
    return row


def flat(width: int, tiles: int, tile_width: int) -> SparseTriXFFN:
    """A flat layer; its expansion follows from its tiles."""
    return SparseTriXFFN(width, num_tiles=tiles, expansion=tiles * tile_width // width)


def hierarchical(width: int, tiles: int, tile_width: int) -> HierarchicalTriXFFN:
    """A hierarchical layer of about as many clusters as tiles a cluster."""
    per_cluster = int(2 ** round(np.log2(tiles) / 2))
    return HierarchicalTriXFFN(
        width, d_hidden=tile_width, num_tiles=tiles, tiles_per_cluster=per_cluster
    )


def random_frozen(layer: Any, x: Any) -> Variables:
    """Packed variables filled with random words: thousands of tiles without the float
    weights that they would be packed from.
    """

    def initialized(x):
        return freeze(layer, layer.init(jax.random.key(0), x), x)

    rng = np.random.default_rng(0)

    def fill(path, leaf):
        name = path[-1].key
        if name == "bits":
            words = rng.integers(0, 1 << 8 * leaf.dtype.itemsize, leaf.shape)
            words |= (words >> 1) & 0x5555  # there is no code 10
            return jnp.asarray(words, leaf.dtype)
        if name == "signature_sums":
            return jnp.asarray(rng.integers(-20, 21, leaf.shape), leaf.dtype)
        if name == "members":
            return jnp.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape)
        is_factor = "params" in path[0].key or name == "scale"
        return jnp.full(leaf.shape, 1 if is_factor else 0, leaf.dtype)

    return jax.tree.map_with_path(fill, jax.eval_shape(initialized, x[:1]))


def packed_ratios() -> dict[str, float]:
    """Float32 bytes over packed bytes with scales, for each granularity, of a tile FFN
    of 512 x 2048.
    """
    ratios = {}
    for granularity in ("tile", "channel", "group"):
        config = TernaryConfig(granularity=granularity)
        latent = [jnp.ones((4, 512, 512)), jnp.ones((4, 512, 512))]
        packed = [ops.pack(hard_ternary(w, config)) for w in latent]
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(packed))
        ratios[granularity] = sum(w.nbytes for w in latent) / held
    return ratios


def _line(row: dict[str, Any]) -> str:
    head = f"{row['dtype']}, {row['tokens']} tokens, {row['tiles']} tiles:"
    ratios = (f"{k} {v:.2f}" for k, v in row.items() if isinstance(v, float))
    return f"{head} {', '.join(ratios)}"
