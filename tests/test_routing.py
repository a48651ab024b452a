"""Routing as pure functions against hand tables, its losses, and its state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trix_jax import HierarchicalTriXFFN, RoutingConfig, SparseTriXFFN, routing
from trix_jax.clusters import balanced_kmeans

# Compiling is what takes the time here, and no test in this file asks for equal bits across programs.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def floats(*rows):
    return jnp.asarray(rows, jnp.float32)


@functools.cache
def initialized(layer, seed=0):
    return jit(layer.init)(jax.random.key(seed), X, token_ids=jnp.zeros(40, int))


def variables_of(layer, seed=0):
    """A copy that a test may change."""
    return jax.tree.map(lambda leaf: leaf, initialized(layer, seed))


@functools.cache
def tiles_of(layer):
    return jit(lambda v, x: layer.apply(v, x)[1].tiles)


X = normal(40, 16)


# Signatures and scores -------------------------------------------------------------------------------------------------


def test_signatures_of_a_hand_table():
    sums = floats([3.0, -4.0, 0.0, 0.0])
    unit = routing.signatures(sums, "sum")
    np.testing.assert_allclose(unit, [[1.2, -1.6, 0, 0]], rtol=1e-6)
    np.testing.assert_array_equal(routing.signatures(sums, "sign"), [[1, -1, 0, 0]])


def test_sign_signature_has_the_gradient_of_the_unit_one():
    sums, dy = normal(3, 5), normal(3, 5, seed=1)
    sign, unit = (
        jax.grad(lambda s, kind=kind: jnp.sum(routing.signatures(s, kind) * dy))(sums)
        for kind in ("sign", "sum")
    )
    np.testing.assert_allclose(sign, unit, rtol=1e-6)
    assert np.abs(unit).max() > 0.01


def test_match_is_the_cosine_times_root_d_for_unit_signatures():
    h, signature = normal(6, 8), routing.signatures(normal(4, 8, seed=1))
    h64, s64 = np.float64(h), np.float64(signature)
    cosine = (h64 / np.linalg.norm(h64, axis=1, keepdims=True)) @ (
        s64 / np.linalg.norm(s64, axis=1, keepdims=True)
    ).T
    # The 1e-6 inside rms_unit moves the result by about 5e-7 relatively.
    np.testing.assert_allclose(
        routing.match(h, signature, 2.0), 2 * 8**0.5 * cosine, rtol=4e-6, atol=4e-6
    )


@pytest.mark.parametrize("factor", [2.0**-5, 2.0**7])
def test_scaling_the_input_or_a_tile_changes_no_route(factor):
    layer = SparseTriXFFN(16, num_tiles=8)
    variables, tiles = variables_of(layer), tiles_of(layer)
    before = tiles(variables, X)
    assert len(np.unique(before)) > 4
    np.testing.assert_array_equal(tiles(variables, factor * X), before)
    up = variables["params"]["tiles"]["up"]["kernel"]
    variables["params"]["tiles"]["up"]["kernel"] = up.at[3].multiply(factor)
    np.testing.assert_array_equal(tiles(variables, X), before)


# Selection -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([1, 3, 3, 2], [1, 2, 3]),
        ([5, 5, 5, 5], [0, 1, 2]),
        ([-0.0, 0.0, -0.0, 0.0], [0, 1, 2]),
        ([0, -1, 7, 7], [2, 3, 0]),
        ([-np.inf, 2, -np.inf, 1], [1, 3, 0]),
    ],
)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_select_tiles_puts_the_best_first_and_ties_to_the_lowest_index(
    scores, expected, k
):
    chosen = routing.select_tiles(floats(scores), k)
    np.testing.assert_array_equal(chosen, [expected[:k]])


@pytest.mark.parametrize("k", [0, 5])
def test_select_tiles_of_too_many_or_none_is_refused(k):
    with pytest.raises(ValueError, match=f"tiles_per_token={k} .* num_tiles=4"):
        routing.select_tiles(jnp.zeros((1, 4)), k)


@pytest.mark.parametrize("k", [1, 2])
def test_nan_scores_give_tiles_in_range(k):
    scores = jnp.full((3, 4), jnp.nan).at[1, 2].set(1.0)
    chosen = np.asarray(routing.select_tiles(scores, k))
    assert ((chosen >= 0) & (chosen < 4)).all()


def test_nan_input_gives_tiles_in_range_and_spares_the_other_tokens():
    x = X.at[2].set(jnp.nan)
    layer = hierarchical(1)
    y, info, _ = jit(layer.apply)(initialized(layer), x)
    assert ((info.tiles >= 0) & (info.tiles < 8)).all()
    assert info.counts.sum() == 80
    finite = np.isfinite(y).all(axis=-1)
    np.testing.assert_array_equal(finite, np.arange(40) != 2)


def test_cluster_of_inverts_members():
    members = jnp.asarray([[4, 0], [1, 5], [3, 2]])
    np.testing.assert_array_equal(routing.cluster_of(members), [0, 1, 2, 2, 0, 1])


def test_open_clusters_opens_the_tiles_of_the_best():
    members = jnp.asarray([[4, 0], [1, 5], [3, 2]])
    scores = floats([1, 3, 2], [2, 2, 0])
    once = routing.open_clusters(scores, members, 1)
    np.testing.assert_array_equal(once, [[0, 1, 0, 0, 0, 1], [1, 0, 0, 0, 1, 0]])
    twice = routing.open_clusters(scores, members, 2)
    np.testing.assert_array_equal(twice, [[0, 1, 1, 1, 0, 1], [1, 1, 0, 0, 1, 1]])
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"top_k_clusters={k} .* 3 clusters"):
            routing.open_clusters(scores, members, k)


def hierarchical(top_k_clusters, **kwargs):
    return HierarchicalTriXFFN(
        16,
        d_hidden=4,
        num_tiles=8,
        tiles_per_cluster=2,
        top_k_clusters=top_k_clusters,
        tiles_per_token=2,
        **kwargs,
    )


def test_hierarchical_selection_stays_inside_the_chosen_clusters():
    variables = variables_of(hierarchical(1))
    state = variables["routing"]["tiles"]["router"]
    state["members"] = jnp.asarray([[7, 0], [5, 2], [1, 4], [3, 6]])
    tiles = tiles_of(hierarchical(1))(variables, X)
    cluster = np.asarray(routing.cluster_of(state["members"]))[np.asarray(tiles)]
    np.testing.assert_array_equal(cluster[:, 0], cluster[:, 1])
    assert len(np.unique(cluster)) == 4
    # Some token's best tile lies in another cluster, or the hierarchy would not show.
    assert (tiles_of(hierarchical(4))(variables, X) != tiles).any()


def test_hierarchical_selection_with_every_cluster_open_is_flat():
    variables = variables_of(hierarchical(1))
    state = variables["routing"]["tiles"]["router"]
    bias = 0.1 * normal(8, seed=3)
    state.update(bias=bias, cluster_bias=normal(4))
    scores = routing.match(routing.rms_unit(X), state["signature"])
    np.testing.assert_array_equal(
        tiles_of(hierarchical(4))(variables, X),
        routing.select_tiles(scores + bias[None], 2),
    )


# Gates -----------------------------------------------------------------------------------------------------------------


def test_gates_of_a_hand_table():
    scores = jnp.log(floats([1, 2, 4, 1]))
    tiles = jnp.asarray([[2, 1]])
    allowed = jnp.asarray([[False, True, True, False]])
    gate = lambda kind, *rest: routing.gates(scores, tiles, kind, *rest)
    np.testing.assert_array_equal(gate("none"), [[1, 1]])
    np.testing.assert_allclose(gate("sigmoid"), [[4 / 5, 2 / 3]], rtol=1e-6)
    np.testing.assert_allclose(gate("softmax"), [[4 * 4 / 8, 4 * 2 / 8]], rtol=1e-6)
    np.testing.assert_allclose(gate("softmax", allowed), [[8 / 6, 4 / 6]], rtol=1e-6)
    np.testing.assert_allclose(gate("renormalized"), [[8 / 6, 4 / 6]], rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "k", "flows"),
    [
        ("none", 2, False),
        ("sigmoid", 1, True),
        ("softmax", 1, True),
        ("renormalized", 1, False),
        ("renormalized", 2, True),
    ],
)
def test_gate_lets_the_task_reach_the_scores(kind, k, flows):
    scores = normal(5, 4)
    tiles = routing.select_tiles(scores, k)
    weight = normal(5, k, seed=1)
    total = lambda s: jnp.sum(routing.gates(s, tiles, kind) * weight)
    assert bool(np.abs(jax.grad(total)(scores)).max() > 1e-3) == flows


# Losses ----------------------------------------------------------------------------------------------------------------


def test_balance_loss_is_zero_at_even_use_and_n_minus_one_at_collapse():
    even = routing.balance_loss(jnp.zeros((6, 4)), jnp.full(4, 0.25))
    assert even == pytest.approx(0, abs=1e-6)
    collapsed = routing.balance_loss(
        jnp.zeros((6, 4)).at[:, 2].set(50.0), jnp.zeros(4).at[2].set(1.0)
    )
    assert collapsed == pytest.approx(3, abs=1e-6)


def test_balance_loss_pushes_the_crowded_tile_down():
    share = floats([0.7, 0.1, 0.1, 0.1])[0]
    gradient = jax.grad(lambda s: routing.balance_loss(s, share))(jnp.zeros((5, 4)))
    assert (gradient[:, 0] > 1e-3).all()
    assert (gradient[:, 1:] < -1e-4).all()


def test_diversity_loss_is_zero_for_orthogonal_and_one_for_equal_signatures():
    assert routing.diversity_loss(jnp.eye(4)) == 0
    assert routing.diversity_loss(jnp.ones((4, 3))) == pytest.approx(1, abs=1e-5)
    assert routing.diversity_loss(jnp.ones((1, 3))) == 0


@pytest.mark.parametrize("kind", ["sum", "sign"])
def test_auxiliary_losses_reach_the_latent_weights_of_a_layer(kind):
    layer = SparseTriXFFN(16, num_tiles=8, routing=RoutingConfig(signature=kind))
    variables = initialized(SparseTriXFFN(16, num_tiles=8))

    @jit
    @jax.jacrev
    def gradients(params):
        return layer.apply({**variables, "params": params}, X)[2]

    for loss, gradient in gradients(variables["params"]).items():
        assert np.abs(gradient["tiles"]["up"]["kernel"]).max() > 1e-5, loss


def test_total_aux_is_the_weighted_sum():
    config = RoutingConfig(balance_weight=0.5, diversity_weight=0.25)
    layer = SparseTriXFFN(16, num_tiles=8, routing=config)
    variables = initialized(SparseTriXFFN(16, num_tiles=8))
    aux = jit(lambda v, x: layer.apply(v, x)[2])(variables, X)
    expected = 0.5 * aux["balance"] + 0.25 * aux["diversity"]
    assert aux["total_aux"] == pytest.approx(float(expected), rel=1e-6)


# Diagnostics -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "entropy", "max_load", "dead"),
    [
        ([5, 5, 5, 5], np.log(4), 1, 0),
        ([8, 0, 0, 0], 0, 4, 3),
        ([4, 4, 0, 0], np.log(2), 2, 2),
        # The threshold is a tenth of the mean load of 10: 1 is alive, 0 is dead.
        ([30, 9, 1, 0], -sum(p * np.log(p) for p in (0.75, 0.225, 0.025)), 3, 1),
    ],
)
def test_usage_diagnostics_of_hand_tables(counts, entropy, max_load, dead):
    counts = floats(counts)[0]
    assert routing.usage_entropy(counts) == pytest.approx(entropy, rel=1e-6, abs=1e-7)
    assert routing.max_load(counts) == pytest.approx(max_load, rel=1e-6)
    assert routing.dead_tiles(counts) == dead


def test_count_tiles_counts_tiles_without_tokens_too():
    counts = routing.count_tiles(jnp.asarray([[3, 1], [3, 0]]), 5)
    np.testing.assert_array_equal(counts, [1, 1, 0, 2, 0])


def test_tie_rate_is_the_share_of_tokens_with_two_best():
    scores = floats([1, 1, 0], [2, 1, 1], [3, 3, 3], [0, 1, 2])
    assert routing.tie_rate(scores) == 0.5


def test_stability_ignores_the_order_of_a_tokens_tiles():
    before = jnp.asarray([[0, 1], [2, 3], [0, 2]])
    after = jnp.asarray([[1, 0], [2, 1], [3, 1]])
    assert routing.stability(before, after) == 0.5
    assert routing.stability(before, before) == 1


def test_signature_cosine_of_opposite_tiles_is_one():
    signature = floats([1, 0], [-1, 0])
    assert routing.signature_cosine(signature) == pytest.approx(1, abs=1e-5)
    assert routing.signature_cosine(jnp.eye(3)) == 0


# State -----------------------------------------------------------------------------------------------------------------


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
        jax.tree.map(np.testing.assert_array_equal, alone, jax.tree.map(lambda a: a[i], new))  # fmt: skip


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


def test_freeze_routing_holds_routes_while_weights_change_until_released():
    layer = hierarchical(1)
    before, other = initialized(layer), initialized(layer, seed=1)
    tiles = functools.partial(tiles_of(layer), x=X)
    held = {**other, "routing": routing.freeze_routing(before["routing"])}
    np.testing.assert_array_equal(tiles(held), tiles(before))
    released = {**held, "routing": routing.freeze_routing(held["routing"], False)}
    np.testing.assert_array_equal(tiles(released), tiles(other))
    assert (tiles(other) != tiles(before)).any()


def test_apply_with_mutable_routing_adds_counts_and_remembers_the_signature():
    layer = SparseTriXFFN(16, num_tiles=8)
    variables = initialized(layer)
    counts = variables["routing"]["tiles"]["router"]["counts"]
    np.testing.assert_array_equal(counts, np.zeros(8))
    step = jit(lambda v: layer.apply(v, X, train=True, mutable=["routing"]))
    (_, info, _), state = step(variables)
    _, state = step({**variables, **state})
    router = state["routing"]["tiles"]["router"]
    np.testing.assert_array_equal(router["counts"], 2 * info.counts)
    assert info.counts.sum() == 40


def test_balance_loss_of_mapped_devices_sees_the_load_of_all():
    layer = SparseTriXFFN(16, num_tiles=8, axis_name="data")
    alone = layer.clone(axis_name=None)
    variables = initialized(alone)
    run = lambda x: layer.apply(variables, x, train=True)[2]["balance"]
    balance = jax.pmap(run, axis_name="data")(X.reshape(8, 5, 16))
    # The probabilities of the devices average to those of the whole batch, so the losses do.
    whole = jit(lambda x: alone.apply(variables, x)[2]["balance"])(X)
    np.testing.assert_allclose(balance.mean(), whole, rtol=1e-5, atol=1e-6)


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


# Config and controls ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"source": "router"}, "source must be one of .* Got 'router'"),
        ({"signature": "mean"}, "signature must be one of .* Got 'mean'"),
        ({"gate": "relu"}, "gate must be one of .* Got 'relu'"),
        ({"balance_weight": -0.1}, "balance_weight must not be negative. Got -0.1"),
        ({"diversity_weight": -1.0}, "diversity_weight must not be .* Got -1.0"),
        ({"score_scale": 0.0}, "score_scale must be positive. Got 0.0"),
    ],
)
def test_config_with_a_bad_value_names_argument_rule_and_value(
    wrong, message, no_type_hook
):
    with pytest.raises(ValueError, match=message):
        RoutingConfig(**wrong)


def control(source, **kwargs):
    config = RoutingConfig(source=source)
    return SparseTriXFFN(16, num_tiles=8, routing=config, **kwargs)


def test_hash_control_routes_equal_tokens_alike_and_needs_ids():
    layer = control("hash", tiles_per_token=2)
    ids = jnp.arange(40) % 20
    variables = initialized(SparseTriXFFN(16, num_tiles=8))
    run = jit(lambda v, ids: layer.apply(v, X, token_ids=ids)[1].tiles)
    tiles = run(variables, ids)
    np.testing.assert_array_equal(tiles[:20], tiles[20:])
    assert (tiles[:, 0] != tiles[:, 1]).all()
    assert len(np.unique(tiles)) == 8
    with pytest.raises(ValueError, match="token_ids must be given"):
        layer.apply(variables, X)


def test_random_control_does_not_look_at_the_weights():
    layer = control("random")
    before, other = initialized(layer), initialized(layer, seed=1)
    tiles = functools.partial(tiles_of(layer), x=X)
    swapped = {**other, "routing": before["routing"]}
    np.testing.assert_array_equal(tiles(swapped), tiles(before))
    assert (tiles(other) != tiles(before)).any()


def test_learned_control_is_the_only_one_with_a_routing_parameter():
    x, ids = normal(4, 16), jnp.arange(4)
    for source in ("weights", "random", "hash", "learned"):
        variables = jax.eval_shape(
            lambda s=source: control(s).init(jax.random.key(0), x, token_ids=ids)
        )
        has_router = "router" in variables["params"]["tiles"]
        assert has_router == (source == "learned")
