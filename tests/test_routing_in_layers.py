"""Routing as the layers use it: where routes come from, what they stay the same under,
the controls.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trix_jax import HierarchicalTriXFFN, RoutingConfig, SparseTriXFFN, balance, routing

# Compiling is what takes the time here; no test in this file asks for equal bits across
# programs.


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def floats(*rows):
    return jnp.asarray(rows, jnp.float32)


@functools.cache
def initialized(layer, seed=0):
    return jax.jit(layer.init)(jax.random.key(seed), X, token_ids=jnp.zeros(40, int))


def variables_of(layer, seed=0):
    """A copy that a test may change."""
    return jax.tree.map(lambda leaf: leaf, initialized(layer, seed))


@functools.cache
def tiles_of(layer):
    return jax.jit(lambda v, x: layer.apply(v, x)[1].tiles)


X = normal(40, 16)
EPS = np.finfo(np.float32).eps


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


@pytest.mark.slow
def test_nan_input_gives_tiles_in_range_and_spares_the_other_tokens():
    x = X.at[2].set(jnp.nan)
    layer = hierarchical(1)
    y, info, _ = jax.jit(layer.apply)(initialized(layer), x)
    assert ((info.tiles >= 0) & (info.tiles < 8)).all()
    assert info.counts.sum() == 80
    finite = np.isfinite(y).all(axis=-1)
    np.testing.assert_array_equal(finite, np.arange(40) != 2)


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


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["sigmoid", "softmax", "renormalized"])
@pytest.mark.parametrize("top_k_clusters", [1, 2])
def test_evaluation_takes_the_tiles_that_training_takes(top_k_clusters, gate):
    # Training scores all tiles and masks the closed ones, evaluation scores the open
    # ones. What counts tokens is equal; gates and outputs are up to the order in which
    # a score's 16 products are added, at most 16 roundings of a score of about 1.
    layer = hierarchical(top_k_clusters, routing=RoutingConfig(gate=gate))
    variables = variables_of(layer)
    state = variables["routing"]["tiles"]["router"]
    members = jnp.asarray([[7, 0], [5, 2], [1, 4], [3, 6]])
    bias = 0.1 * normal(8, seed=3)
    state.update(members=members, bias=bias, cluster_bias=0.1 * normal(4, seed=4))
    y, info, aux = jax.jit(layer.apply)(variables, X)
    (y_all, all_, aux_all), _ = jax.jit(
        lambda v, x: layer.apply(v, x, mutable=["routing"])
    )(variables, X)
    for name in ("tiles", "counts", "entropy", "max_load", "dead_tiles", "tie_rate"):
        np.testing.assert_array_equal(getattr(info, name), getattr(all_, name))
    np.testing.assert_allclose(info.gates, all_.gates, rtol=32 * EPS)
    bound = 64 * EPS * np.abs(y_all).max()
    np.testing.assert_allclose(y, y_all, rtol=0, atol=bound)
    for name, value in aux.items():
        np.testing.assert_allclose(value, aux_all[name], rtol=32 * EPS, atol=EPS)


@pytest.mark.slow
def test_evaluation_of_clusters_makes_no_score_for_every_tile():
    layer = HierarchicalTriXFFN(16, d_hidden=4, num_tiles=24, tiles_per_cluster=4)
    x = normal(56, 16)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)

    def text(**kwargs):
        call = jax.jit(lambda v, x: layer.apply(v, x, **kwargs)[0])
        return call.lower(variables, x).compile().as_text()

    evaluation = text()
    assert "[56,24]" not in evaluation
    assert "[24,56]" not in evaluation
    assert "[56,24]" in text(mutable=["routing"])


@pytest.mark.parametrize("kind", ["sum", pytest.param("sign", marks=pytest.mark.slow)])
def test_auxiliary_losses_reach_the_latent_weights_of_a_layer(kind):
    layer = SparseTriXFFN(16, num_tiles=8, routing=RoutingConfig(signature=kind))
    variables = initialized(SparseTriXFFN(16, num_tiles=8))

    @jax.jit
    @jax.jacrev
    def gradients(params):
        return layer.apply({**variables, "params": params}, X)[2]

    for loss, gradient in gradients(variables["params"]).items():
        assert np.abs(gradient["tiles"]["up"]["kernel"]).max() > 1e-5, loss


def test_total_aux_is_the_weighted_sum():
    config = RoutingConfig(balance_weight=0.5, diversity_weight=0.25)
    layer = SparseTriXFFN(16, num_tiles=8, routing=config)
    variables = initialized(SparseTriXFFN(16, num_tiles=8))
    aux = jax.jit(lambda v, x: layer.apply(v, x)[2])(variables, X)
    expected = 0.5 * aux["balance"] + 0.25 * aux["diversity"]
    assert aux["total_aux"] == pytest.approx(float(expected), rel=1e-6)


def test_freeze_routing_holds_routes_while_weights_change_until_released():
    layer = hierarchical(1)
    before, other = initialized(layer), initialized(layer, seed=1)
    tiles = functools.partial(tiles_of(layer), x=X)
    held = {**other, "routing": routing.freeze_routing(before["routing"])}
    np.testing.assert_array_equal(tiles(held), tiles(before))
    released = {**held, "routing": routing.freeze_routing(held["routing"], False)}
    np.testing.assert_array_equal(tiles(released), tiles(other))
    assert (tiles(other) != tiles(before)).any()


def test_freeze_routing_holds_a_learned_router():
    layer = control("learned", tiles_per_token=2)
    before = initialized(layer)
    other = {**before, "params": jax.tree.map(jnp.negative, before["params"])}
    tiles = functools.partial(tiles_of(layer), x=X)
    assert (tiles(other) != tiles(before)).any()
    held = {**other, "routing": routing.freeze_routing(before["routing"])}
    np.testing.assert_array_equal(tiles(held), tiles(before))


def test_apply_with_mutable_routing_adds_margins_and_remembers_the_signature():
    layer = SparseTriXFFN(16, num_tiles=8)
    variables = initialized(layer)
    assert not variables["routing"]["tiles"]["router"]["margins"].any()
    step = jax.jit(lambda v: layer.apply(v, X, train=True, mutable=["routing"]))
    (_, info, _), state = step(variables)
    _, state = step({**variables, **state})
    router = state["routing"]["tiles"]["router"]
    np.testing.assert_array_equal(balance.loads(router["margins"]), 2 * info.counts)
    assert info.counts.sum() == 40


@pytest.mark.slow
@pytest.mark.parametrize("top_k_clusters", [1, 2])
def test_updates_make_both_levels_of_a_hierarchy_even(top_k_clusters):
    layer = hierarchical(top_k_clusters)
    variables = initialized(layer)
    x = normal(1000, 16) + 2 * normal(1, 16, seed=1)  # what all tokens share

    @jax.jit
    def step(routing_state):
        variables_now = {**variables, "routing": routing_state}
        (_, info, _), state = layer.apply(variables_now, x, mutable=["routing"])
        return routing.update(state["routing"]), info.counts

    state, before = step(variables["routing"])
    for _ in range(80):
        state, counts = step(state)
    assert routing.max_load(before) > 2
    assert routing.max_load(counts) < 1.25
    assert routing.dead_tiles(counts) == 0


def test_balance_loss_of_mapped_devices_sees_the_load_of_all():
    layer = SparseTriXFFN(16, num_tiles=8, axis_name="data")
    alone = layer.clone(axis_name=None)
    variables = initialized(alone)

    def run(x):
        out, _ = layer.apply(variables, x, train=True, mutable=["routing"])
        return out[2]["balance"]

    losses = jax.pmap(run, axis_name="data")(X.reshape(8, 5, 16))
    # The probabilities of the devices average to those of the whole batch, so the
    # losses do.
    whole = jax.jit(lambda x: alone.apply(variables, x)[2]["balance"])(X)
    np.testing.assert_allclose(losses.mean(), whole, rtol=1e-5, atol=1e-6)


def control(source, **kwargs):
    config = RoutingConfig(source=source)
    return SparseTriXFFN(16, num_tiles=8, routing=config, **kwargs)


@pytest.mark.slow
def test_hash_control_routes_equal_tokens_alike_and_needs_ids():
    layer = control("hash", tiles_per_token=2)
    ids = jnp.arange(40) % 20
    variables = initialized(SparseTriXFFN(16, num_tiles=8))
    run = jax.jit(lambda v, ids: layer.apply(v, X, token_ids=ids)[1].tiles)
    tiles = run(variables, ids)
    np.testing.assert_array_equal(tiles[:20], tiles[20:])
    assert (tiles[:, 0] != tiles[:, 1]).all()
    assert len(np.unique(tiles)) == 8
    with pytest.raises(ValueError, match="token_ids must be given"):
        layer.apply(variables, X)
    with pytest.raises(ValueError, match=r"must be integers\. Got float32"):
        layer.apply(variables, X, token_ids=ids / 20)
    with pytest.raises(ValueError, match="hold_after must be None with source 'hash'"):
        RoutingConfig(source="hash", hold_after=0.1)


def test_hash_has_no_losses_and_nothing_of_its_routing_moves():
    layer, ids = control("hash", tiles_per_token=2), np.arange(40, dtype=np.uint8) % 20
    variables = jax.jit(layer.init)(jax.random.key(1), X, token_ids=ids)

    @jax.jit
    def run(params):
        (_, info, aux), new = layer.apply(
            {**variables, "params": params},
            X,
            train=True,
            token_ids=ids,
            router_input=2 * X,
            mutable=["routing"],
        )
        return aux["total_aux"], (info, routing.update(new["routing"]))

    grads, (info, new) = jax.grad(run, has_aux=True)(variables["params"])
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads))
    assert info.gates.min() == info.gates.max() == 1
    jax.tree.map(np.testing.assert_array_equal, new, variables["routing"])
    state = new["tiles"]["router"]
    assert not state["bias"].any()
    assert not state["signature"].any()  # it has no addresses to show


@pytest.mark.slow
def test_hash_control_gives_tokens_their_own_sets_of_tiles_evenly():
    layer, ids = control("hash", tiles_per_token=2), jnp.arange(4000)
    x = jnp.zeros((4000, 16))
    variables = initialized(SparseTriXFFN(16, num_tiles=8))
    tiles = np.asarray(layer.apply(variables, x, token_ids=ids)[1].tiles)
    pairs, counts = np.unique(np.sort(tiles, axis=1), axis=0, return_counts=True)
    assert len(pairs) == 8 * 7 // 2
    expected = 4000 / len(pairs)  # binomial: five standard deviations
    assert abs(counts - expected).max() < 5 * expected**0.5


@pytest.mark.slow
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
    narrow = control("learned", param_dtype=jnp.bfloat16)
    variables = jax.eval_shape(narrow.init, jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {
        jnp.dtype(jnp.bfloat16)
    }


@pytest.mark.slow
def test_training_that_scores_open_tiles_alone_moves_as_that_which_scores_all():
    layer = HierarchicalTriXFFN(
        16,
        8,
        num_tiles=16,
        tiles_per_cluster=4,
        top_k_clusters=2,
        tiles_per_token=3,
        routing=RoutingConfig(balance_weight=0.0, diversity_weight=0.0),
    )
    variables = variables_of(layer)
    dy = normal(40, 16, seed=1)

    def trained(over):
        config = RoutingConfig(balance_weight=0.0, balance_over=over)
        model = layer.clone(routing=config)

        def loss(params):
            (y, info, aux), new = model.apply(
                {**variables, "params": params}, X, True, mutable=["routing"]
            )
            return jnp.sum(y * dy) + aux["total_aux"], (info, aux, new["routing"])

        return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])

    (all_grads, (all_info, _, all_state)), (grads, (info, aux, state)) = (
        trained(over) for over in ("all", "open")
    )
    np.testing.assert_array_equal(info.tiles, all_info.tiles)
    for one, other in zip(*map(jax.tree.leaves, (grads, all_grads)), strict=True):
        bound = 40 * 16 * EPS * np.abs(other).max()  # sums in another order
        np.testing.assert_allclose(one, other, rtol=0, atol=bound)
    # A score in its last bits may fall into the next bin: two counts.
    found, wanted = (
        t["tiles"]["router"]["margins"].cumsum(axis=-1) for t in (state, all_state)
    )
    assert np.abs(found - wanted).sum() <= 2
    np.testing.assert_array_equal(found[:, -1], wanted[:, -1])
    assert 0 < aux["balance"] < 1
