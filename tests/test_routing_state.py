"""The routing state: what an update moves, and how clusters are rebuilt."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trix_jax import routing
from trix_jax.clusters import balanced_kmeans

# Compiling is what takes the time here; no test in this file asks for equal bits across programs.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def floats(*rows):
    return jnp.asarray(rows, jnp.float32)


def flat_state(counts, bias=None, frozen=False):
    counts = floats(counts)[0]
    return {
        "bias": jnp.zeros(counts.shape) if bias is None else floats(bias)[0],
        "counts": counts,
        "signature": jnp.ones((counts.size, 3)),
        "frozen": jnp.asarray(frozen),
    }


def clustered_state(counts, members, frozen=False):
    return {
        **flat_state(counts, frozen=frozen),
        "members": jnp.asarray(members),
        "cluster_bias": jnp.zeros(len(members)),
    }


def test_update_moves_a_flat_bias_against_the_load_and_centres_it():
    state = {"block": {"router": flat_state([3, 1, 0, 0], bias=[0, 0, 0, 1])}}
    new = routing.update(state, rate=0.5)["block"]["router"]
    # (-0.5, 0, 0.5, 1.5) less its mean.
    np.testing.assert_allclose(new["bias"], [-0.875, -0.375, 0.125, 1.125], rtol=1e-6)
    np.testing.assert_array_equal(new["counts"], np.zeros(4))
    np.testing.assert_array_equal(new["signature"], np.ones((4, 3)))


def test_update_moves_both_levels_of_a_hierarchy():
    state = {"router": clustered_state([4, 0, 2, 1], [[2, 0], [1, 3]])}
    new = routing.update(state, rate=0.5)["router"]
    # Cluster 0 holds tiles 2 and 0 (loads 2 and 4), cluster 1 tiles 1 and 3 (loads 0 and 1).
    np.testing.assert_array_equal(new["bias"], [-0.5, 0.5, 0.5, -0.5])
    np.testing.assert_array_equal(new["cluster_bias"], [-0.5, 0.5])
    np.testing.assert_array_equal(new["counts"], np.zeros(4))
    np.testing.assert_array_equal(new["members"], [[2, 0], [1, 3]])


def test_update_leaves_the_biases_of_a_frozen_layer():
    state = {"router": clustered_state([4, 0, 2, 1], [[2, 0], [1, 3]], frozen=True)}
    new = routing.update(state, rate=0.5)["router"]
    np.testing.assert_array_equal(new["bias"], np.zeros(4))
    np.testing.assert_array_equal(new["cluster_bias"], np.zeros(2))
    np.testing.assert_array_equal(new["counts"], np.zeros(4))


def test_update_of_stacked_layers_equals_a_layer_at_a_time():
    one = clustered_state([4, 0, 2, 1], [[2, 0], [1, 3]])
    two = clustered_state([0, 9, 2, 1], [[0, 1], [2, 3]], frozen=True)
    stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), one, two)
    new = routing.update({"layers": stacked})["layers"]
    for i, state in enumerate((one, two)):
        alone = routing.update({"router": state})["router"]
        for name, value in alone.items():
            np.testing.assert_array_equal(new[name][i], value)


def test_update_of_something_else_is_refused(no_type_hook):
    with pytest.raises(ValueError, match="routing must be a routing collection"):
        routing.update({"router": {"bias": jnp.zeros(3)}})


def test_update_over_eight_devices_sees_the_sum_of_their_counts():
    rng = np.random.default_rng(0)
    counts = jnp.asarray(rng.integers(0, 9, (8, 4)), jnp.float32)
    state = {"router": flat_state([0, 0, 0, 0])}

    @functools.partial(jax.pmap, axis_name="data")
    def step(counts):
        local = {"router": {**state["router"], "counts": counts}}
        reduced = routing.reduce(local, "data")["router"]["counts"]
        return reduced, routing.update(local, rate=0.1, axis_name="data")["router"]

    reduced, new = step(counts)
    np.testing.assert_array_equal(reduced, np.tile(counts.sum(axis=0), (8, 1)))
    whole = flat_state(np.asarray(counts.sum(axis=0)))
    expected = routing.update({"router": whole}, rate=0.1)["router"]
    assert np.abs(expected["bias"]).max() > 0
    for device in range(8):
        np.testing.assert_array_equal(new["bias"][device], expected["bias"])


# Clusters --------------------------------------------------------------------------------------------------------------


def separated(clusters=4, size=3, noise=0.05):
    """Tiles around orthogonal centres, tile `c + clusters * i` belonging to centre `c`."""
    centres = np.eye(clusters, 12)
    tiles = np.concatenate([centres] * size)
    rng = np.random.default_rng(0)
    signature = jnp.asarray(tiles + noise * rng.normal(size=tiles.shape), jnp.float32)
    members = jnp.arange(clusters * size, dtype=jnp.int32).reshape(size, clusters).T
    return signature, members


jit_kmeans = jit(balanced_kmeans, static_argnums=2)


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
