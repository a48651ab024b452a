"""The routing state: what an update moves, and how clusters are rebuilt."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trix_jax import balance, routing
from trix_jax.clusters import balanced_kmeans

# Compiling is what takes the time here; no test in this file asks for equal bits across
# programs.


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def floats(*rows):
    return jnp.asarray(rows, jnp.float32)


def margins(loads, tokens=16):
    """Histograms of tiles that `loads` of the tokens chose, all by half of the reach."""
    hist = np.zeros((len(loads), balance.BINS), np.float32)
    hist[:, balance.CHOSEN // 2] = loads
    hist[:, balance.CHOSEN + balance.CHOSEN // 2] = tokens - np.asarray(loads)
    return jnp.asarray(hist)


def flat_state(loads, bias=None, frozen=False):
    return {
        "bias": jnp.zeros(len(loads)) if bias is None else floats(bias)[0],
        "margins": margins(loads),
        "signature": jnp.ones((len(loads), 3)),
        "frozen": jnp.asarray(frozen),
    }


def clustered_state(loads, members, frozen=False):
    by_cluster = [sum(loads[tile] for tile in cluster) for cluster in members]
    return {
        **flat_state(loads, frozen=frozen),
        "members": jnp.asarray(members),
        "cluster_bias": jnp.zeros(len(members)),
        "cluster_margins": margins(by_cluster),
    }


def test_update_moves_a_flat_bias_against_the_load_and_centres_it():
    bias = [0, 0, 0, 1]
    state = {"block": {"router": flat_state([3, 1, 0, 0], bias=bias)}}
    new = routing.update(state, rate=0.5)["block"]["router"]
    moved = balance.step_bias(floats(bias)[0], margins([3, 1, 0, 0]), 0.5)
    np.testing.assert_array_equal(new["bias"], moved)
    step = new["bias"] - floats(bias)[0]
    assert step[0] < step[1] < step[2]
    np.testing.assert_allclose(step[3], step[2], rtol=1e-4)
    np.testing.assert_allclose(new["bias"].mean(), 0, atol=1e-6)
    np.testing.assert_array_equal(new["margins"], np.zeros((4, balance.BINS)))
    np.testing.assert_array_equal(new["signature"], np.ones((4, 3)))


def test_update_moves_both_levels_of_a_hierarchy():
    state = {"router": clustered_state([4, 0, 2, 1], [[2, 0], [1, 3]])}
    new = routing.update(state, rate=0.5)["router"]
    # Cluster 0 holds tiles 2 and 0 (loads 2 and 4), cluster 1 tiles 1 and 3 (loads 0
    # and 1). The mean of all tiles is 1.75, so that cluster 1 is not asked for more
    # than its own mean of 0.5. A token opens one cluster, where the common part is 0.
    load = floats([1.75, 0.5, 1.75, 0.5])[0]
    moved = balance.step_bias(jnp.zeros(4), margins([4, 0, 2, 1]), 0.5, load)
    common = (moved + moved[jnp.asarray([2, 3, 0, 1])]) / 2
    np.testing.assert_array_equal(new["bias"], moved - common)
    assert new["bias"][0] < new["bias"][2]
    assert new["bias"][3] < new["bias"][1]
    np.testing.assert_array_equal(np.sign(new["cluster_bias"]), [-1, 1])
    assert not new["margins"].any()
    assert not new["cluster_margins"].any()
    np.testing.assert_array_equal(new["members"], [[2, 0], [1, 3]])


@pytest.mark.parametrize("opened", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_what_biases_of_a_cluster_have_in_common_goes_where_one_is_open(opened):
    members = [[0, 3], [1, 4], [2, 5]]
    state = clustered_state([4, 4, 4, 4, 4, 4], members)
    state["cluster_margins"] = margins([16 * opened / 3] * 3)
    drifted = floats([2.0, -2.5, 0.5, 2.25, -2.5, 0.25])[0]
    bias = routing.update({**state, "bias": drifted})["bias"]
    common = floats([2.125, -2.5, 0.375] * 2)[0]
    np.testing.assert_array_equal(bias, drifted - (common if opened == 1 else 0))


def test_tiles_of_a_cluster_that_no_token_took_come_back():
    """Both clusters are open to every token; those of the second are 0.8 behind."""
    scores = normal(400, 4) * 0.1 - floats([0.0, 0.0, 0.8, 0.8])
    state = clustered_state([200, 200, 0, 0], [[0, 1], [2, 3]])

    @jax.jit
    def step(state):
        biased = scores + state["bias"][None]
        tiles = routing.select_tiles(biased, 1)
        seen = balance.margin_histogram(biased, tiles)
        return routing.update({**state, "margins": seen}, rate=0.5), tiles

    for _ in range(60):
        state, tiles = step(state)
    load = routing.count_tiles(tiles, 4)
    np.testing.assert_allclose(load, 100, atol=15)


def test_update_leaves_the_biases_of_a_frozen_layer():
    state = {"router": clustered_state([4, 0, 2, 1], [[2, 0], [1, 3]], frozen=True)}
    new = routing.update(state, rate=0.5)["router"]
    np.testing.assert_array_equal(new["bias"], np.zeros(4))
    np.testing.assert_array_equal(new["cluster_bias"], np.zeros(2))
    assert not new["margins"].any()


@pytest.mark.slow
def test_update_of_stacked_layers_equals_a_layer_at_a_time():
    one = clustered_state([4, 0, 2, 1], [[2, 0], [1, 3]])
    two = clustered_state([0, 9, 2, 1], [[0, 1], [2, 3]], frozen=True)
    stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), one, two)
    update = jax.jit(routing.update)
    new = update({"layers": stacked})["layers"]
    for i, state in enumerate((one, two)):
        alone = update({"router": state})["router"]
        for name, value in alone.items():
            np.testing.assert_array_equal(new[name][i], value)


def test_update_of_something_else_is_refused(no_type_hook):
    with pytest.raises(ValueError, match="routing must be a routing collection"):
        routing.update({"router": {"bias": jnp.zeros(3)}})


def test_update_over_eight_devices_sees_the_sum_of_their_margins():
    rng = np.random.default_rng(0)
    parts = jnp.asarray(rng.integers(0, 9, (8, 4, balance.BINS)), jnp.float32)
    parts = parts.at[:, 0].multiply(3)
    state = flat_state([0, 0, 0, 0])

    @functools.partial(jax.pmap, axis_name="data")
    def step(part):
        local = {"router": {**state, "margins": part}}
        reduced = routing.reduce(local, "data")["router"]["margins"]
        return reduced, routing.update(local, rate=0.1, axis_name="data")["router"]

    reduced, new = step(parts)
    np.testing.assert_array_equal(reduced[3], parts.sum(axis=0))
    whole = {**state, "margins": parts.sum(axis=0)}
    expected = jax.jit(functools.partial(routing.update, rate=0.1))({"router": whole})
    expected = expected["router"]["bias"]
    assert np.abs(expected).max() > 0
    for device in range(8):
        np.testing.assert_allclose(new["bias"][device], expected, rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(new["bias"][device], new["bias"][0])


# Clusters --------------------------------------------------------------------------------------------------------------


def separated(clusters=4, size=3, noise=0.05):
    """Tiles around orthogonal centres, tile `c + clusters * i` belonging to centre `c`."""
    centres = np.eye(clusters, 12)
    tiles = np.concatenate([centres] * size)
    rng = np.random.default_rng(0)
    signature = jnp.asarray(tiles + noise * rng.normal(size=tiles.shape), jnp.float32)
    members = jnp.arange(clusters * size, dtype=jnp.int32).reshape(size, clusters).T
    return signature, members


jit_kmeans = jax.jit(balanced_kmeans, static_argnums=2)


def test_kmeans_of_well_separated_clusters_is_a_fixed_point():
    signature, members = separated()
    np.testing.assert_array_equal(jit_kmeans(signature, members, 10), members)


def test_kmeans_puts_strays_back_and_keeps_the_index_of_a_cluster():
    signature, members = separated()
    mixed = members.at[0, 0].set(members[1, 0]).at[1, 0].set(members[0, 0])
    np.testing.assert_array_equal(jit_kmeans(signature, mixed, 10), members)


@pytest.mark.parametrize("signature", ["random", "equal", "zero", "nan"])
def test_kmeans_is_balanced_whatever_the_signatures(signature):
    tiles = {
        "random": normal(12, 5),
        "equal": jnp.ones((12, 5)),
        "zero": jnp.zeros((12, 5)),
        "nan": normal(12, 5).at[7].set(jnp.nan),
    }[signature]
    members = jnp.arange(12, dtype=jnp.int32).reshape(4, 3)
    new = jit_kmeans(tiles, members, 10)
    assert new.shape == members.shape
    np.testing.assert_array_equal(np.sort(new, axis=None), np.arange(12))
    np.testing.assert_array_equal(new, jit_kmeans(tiles, members, 10))


def test_rebuild_clusters_of_stacked_layers_leaves_flat_and_frozen_ones():
    signature, members = separated()
    mixed = members.at[0, 0].set(members[1, 0]).at[1, 0].set(members[0, 0])
    layer = {**clustered_state(np.zeros(12), mixed), "signature": signature}
    held = {**layer, "frozen": jnp.asarray(True)}
    stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), layer, held)
    flat = flat_state([1, 2, 3])
    new = routing.rebuild_clusters({"layers": stacked, "one": layer, "flat": flat})
    np.testing.assert_array_equal(new["layers"]["members"], [members, mixed])
    np.testing.assert_array_equal(new["one"]["members"], members)
    assert new["flat"].keys() == flat.keys()
