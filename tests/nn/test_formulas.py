"""Every FFN against a naive oracle written from the docstrings: float64 numpy, one
token at a time.
"""

import jax
import jax.numpy as jnp
import numpy as np

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
    state = variables["routing"]["router"]
    tiles, matches = routes(h, unit(p["directions"]), 1, state)
    hidden = h @ p["compress_in"]["kernel"] + p["compress_in"]["bias"]
    tanh_gelu = np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3))
    hidden = hidden / 2 * (1 + tanh_gelu)
    ab = np.tanh(hidden @ p["compress_out"]["kernel"] + p["compress_out"]["bias"])
    grid = layer.grid_size
    splines = p["splines"]["kernel"].reshape(-1, grid, grid, 3)
    splines = np.sign(splines) * (np.abs(splines) > 0.3)
    y, size = np.zeros_like(x), np.zeros_like(x)
    for t, (n, (a, b)) in enumerate(zip(tiles[:, 0], ab, strict=True)):
        i, j = (min(int((u + 1) / 2 * grid), grid - 1) for u in (a, b))
        la, lb = (a + 1) / 2 * grid - i, (b + 1) / 2 * grid - j
        c0, c1, c2 = splines[n, i, j]
        outside = sigmoid(matches[t, 0]) * p["spline_scale"][n] * p["output_scale"]
        y[t] = outside * (c0 + c1 * la + c2 * lb) * p["directions"][n]
        # An error of tanh in 0..1 counts G times in the place inside a cell.
        size[t] = np.abs(outside * (1 + 2 * grid) * p["directions"][n])
    return tiles, y, size


ORACLES = {
    "sparse_top1": sparse_oracle,
    "sparse_top2": sparse_oracle,
    "hierarchical": hierarchical_oracle,
    "lookup": lookup_oracle,
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
