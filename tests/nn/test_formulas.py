"""Every FFN against a naive oracle written from the docstrings: float64 numpy, one
token at a time.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trix_jax import SparseLookupFFN

D = 16
EPS = np.finfo(np.float32).eps


def unit(x):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def ternary(w):
    """Absmean per tile."""
    scale = np.float64(jnp.bfloat16(np.abs(w).mean()))
    return np.clip(np.round(w / scale), -1, 1), scale


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def best(scores, k):
    return np.argsort(-scores, kind="stable")[:k]


def routes(h, signature, k, state, top_k_clusters=1):
    """Tiles of each token and their unbiased scores."""
    chosen, matches = [], []
    for token in unit(h):
        score = signature @ token / np.sqrt(len(token))
        biased = score + np.float64(state["bias"])
        if "members" in state:
            members = np.asarray(state["members"])
            address = unit(np.stack([signature[m].mean(axis=0) for m in members]))
            cluster = address @ token / np.sqrt(len(token))
            cluster = best(cluster + np.float64(state["cluster_bias"]), top_k_clusters)
            closed = np.ones(len(biased), bool)
            closed[members[cluster].reshape(-1)] = False
            biased[closed] = -np.inf
        chosen.append(best(biased, k))
        matches.append(score[chosen[-1]])
    return np.stack(chosen), np.stack(matches)


def tiles_oracle(h, tiles, matches, params):
    """The output, and the sum of the absolute values of its terms, which bounds what
    float32 may lose.
    """
    up = [ternary(w) for w in np.float64(params["up"]["kernel"])]
    down = [ternary(w) for w in np.float64(params["down"]["kernel"])]
    y, size = np.zeros_like(h), np.zeros_like(h)
    for t, token in enumerate(h):
        for n, match in zip(tiles[t], matches[t], strict=True):
            (q_up, s_up), (q_down, s_down) = up[n], down[n]
            gate = sigmoid(match)
            hidden = np.maximum((token @ q_up) * s_up, 0) ** 2
            y[t] += gate * (hidden @ q_down) * s_down
            largest = ((np.abs(token) @ np.abs(q_up)) * s_up) ** 2
            size[t] += gate * (largest @ np.abs(q_down)) * s_down
    return y, size


def up_signatures(params):
    return unit(
        np.stack(
            [ternary(w)[0].sum(axis=-1) for w in np.float64(params["up"]["kernel"])]
        )
    )


def sparse_oracle(layer, variables, x):
    params = variables["params"]["tiles"]
    state = variables["routing"]["tiles"]["router"]
    tiles, matches = routes(x, up_signatures(params), layer.tiles_per_token, state)
    return tiles, *tiles_oracle(x, tiles, matches, params)


def hierarchical_oracle(layer, variables, x):
    params, state = variables["params"], variables["routing"]["tiles"]["router"]
    h = unit(x) * np.float64(params["norm"]["scale"])
    tiles, matches = routes(
        h,
        up_signatures(params["tiles"]),
        layer.tiles_per_token,
        state,
        layer.top_k_clusters,
    )
    y, size = tiles_oracle(h, tiles, matches, params["tiles"])
    scale = np.float64(params["output_scale"])
    return tiles, scale * y, np.abs(scale) * size


def lookup_oracle(layer, variables, x):
    p = jax.tree.map(np.float64, variables["params"])
    centred = x - x.mean(axis=-1, keepdims=True)
    h = unit(centred) * p["norm"]["scale"] + p["norm"]["bias"]
    state, k = variables["routing"]["router"], layer.tiles_per_token
    is_own, grid = layer.reads == "own", layer.grid_size
    write, place = own_rows(p, h) if is_own else (p["directions"], shared_place(p, h))
    address = ternary(p["tile_read"]["kernel"])[0] if is_own else write
    tiles, matches = routes(h, unit(address), k, state, layer.top_k_clusters)
    splines = p["splines"]["kernel"]
    splines = np.sign(splines) * (np.abs(splines) > 0.3)
    axes = 1 if is_own else 2
    splines = splines.reshape(-1, *[grid] * axes, 1 + axes)
    y, size = np.zeros_like(x), np.zeros_like(x)
    for t, token in enumerate(tiles):
        for n, match in zip(token, matches[t], strict=True):
            where = (place[t, n] + 1) / 2 * grid
            cell = tuple(min(int(u), grid - 1) for u in where)
            c0, *c = splines[n][cell]
            far = c0 + sum(a * (u - i) for a, u, i in zip(c, where, cell, strict=True))
            outside = sigmoid(match) * p["spline_scale"][n] * p["output_scale"]
            y[t] += outside * far * write[n]
            # An error of tanh in 0..1 counts G times in the place inside a cell.
            size[t] += np.abs(outside * (1 + 2 * grid) * write[n])
    return tiles, y, size


def shared_place(p, h):
    """Two numbers a token, the same for all tiles."""
    hidden = h @ p["compress_in"]["kernel"] + p["compress_in"]["bias"]
    tanh_gelu = np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3))
    hidden = hidden / 2 * (1 + tanh_gelu)
    ab = np.tanh(hidden @ p["compress_out"]["kernel"] + p["compress_out"]["bias"])
    return np.broadcast_to(ab[:, None], (len(h), len(p["directions"]), 2))


def own_rows(p, h):
    """The directions as served, and a number a token and tile."""
    (read, scale), (write, size) = (
        ternary(p[n]["kernel"]) for n in ("tile_read", "tile_write")
    )
    return size * write, np.tanh(scale * (h @ read.T))[..., None]


ORACLES = {
    "sparse_top1": sparse_oracle,
    "sparse_top2": sparse_oracle,
    "hierarchical": hierarchical_oracle,
    "lookup": lookup_oracle,
    "lookup_own": lookup_oracle,
}


def disturbed(variables):
    """Variables as after some training: nothing is at its initial one or zero, tiles
    have moved between clusters.
    """
    rng = np.random.default_rng(5)
    variables = jax.tree.map(
        lambda leaf: (
            leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32)
            if leaf.dtype == jnp.float32
            else leaf
        ),
        variables,
    )
    state = variables["routing"].get("tiles", variables["routing"])["router"]
    if "members" in state:
        members = rng.permutation(state["members"].size)
        state["members"] = jnp.asarray(
            members.reshape(state["members"].shape), jnp.int32
        )
    return variables


def test_ffn_matches_the_oracle(ffn):
    layer = ffn.layer
    variables = disturbed(ffn.variables())
    y, info, _ = ffn.apply(variables, ffn.x)
    tiles, expected, size = ORACLES[ffn.name](
        layer, variables, np.float64(ffn.x).reshape(-1, D)
    )
    np.testing.assert_array_equal(info.tiles.reshape(-1, tiles.shape[1]), tiles)
    assert len(np.unique(tiles)) > 2
    # Roundings: D and F in the two products (the first squared), D in the norm, D in
    # the gate, a few in between.
    width = 4 * D // 4
    bound = (2 * D + width + 2 * D + 16) * EPS * size
    error = np.abs(np.float64(y).reshape(-1, D) - expected)
    assert (error <= bound).all(), (error / bound).max()


SHARED = SparseLookupFFN(
    D,
    num_tiles=8,
    tiles_per_cluster=4,
    grid_size=1,
    top_k_clusters=2,
    tiles_per_token=3,
)
OWN = SHARED.clone(grid_size=2, reads="own")


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param(SHARED, id="shared"),
        pytest.param(OWN, id="own", marks=pytest.mark.slow),
    ],
)
def test_several_directions_match_the_oracle(layer):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(24, D)), jnp.float32)
    variables = disturbed(jax.jit(layer.init)(jax.random.key(0), x))
    y, info, _ = jax.jit(layer.apply)(variables, x)
    tiles, expected, size = lookup_oracle(layer, variables, np.float64(x))
    np.testing.assert_array_equal(info.tiles, tiles)
    assert len(np.unique(tiles)) > 4
    error = np.abs(np.float64(y) - expected)
    assert (error <= (6 * D + 16) * EPS * size).all()
    assert np.abs(expected).max() > 0.05
