"""Addresses that are read once and held: in one layer, by its progress or by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from trix_jax import (
    HierarchicalTriXFFN,
    RoutingConfig,
    SparseLookupFFN,
    SparseTriXFFN,
    freeze,
    routing,
)
from trix_jax.ternary import ternarize

# Compiling is what takes the time here; no test in this file asks for equal bits across
# programs.

X = jnp.asarray(np.random.default_rng(0).normal(size=(40, 16)), jnp.float32)
HOLD = RoutingConfig(hold_after=0.5)


def flat(config=HOLD):
    return SparseTriXFFN(16, num_tiles=8, tiles_per_token=2, routing=config)


def hierarchical(config=HOLD):
    return HierarchicalTriXFFN(
        16, 4, num_tiles=8, tiles_per_cluster=4, tiles_per_token=2, routing=config
    )


def lookup(config=HOLD):
    return SparseLookupFFN(
        16, num_tiles=8, tiles_per_cluster=2, grid_size=2, routing=config
    )


def slow(case):
    return pytest.param(case, marks=pytest.mark.slow)


def router_of(state):
    return state["tiles"]["router"] if "tiles" in state else state["router"]


class Trained:
    """A layer, three sets of weights, and what a training step at each of them did: at
    a quarter of the training, at half of it, where it holds, and after.
    """

    def __init__(self, layer):
        self.layer = layer
        variables = jax.jit(layer.init)(jax.random.key(0), X)
        self.params = [
            variables["params"],
            *map(functools.partial(other, variables["params"]), (1, 2)),
        ]
        self.step = jax.jit(self._step)
        self.call = jax.jit(
            lambda *a: layer.apply({"params": a[0], "routing": a[1]}, X)[1]
        )
        state, self.states, self.outs = variables["routing"], [], []
        for params, progress in zip(self.params, (0.25, 0.5, 0.75), strict=True):
            gradient, (info, aux, state) = self.step(params, state, progress)
            self.outs.append((info, aux, gradient))
            self.states.append(state)

    def _step(self, params, state, progress):
        def losses(params):
            (_, info, aux), new = self.layer.apply(
                {"params": params, "routing": state},
                X,
                train=True,
                progress=progress,
                mutable=["routing"],
            )
            routed = aux["balance"] + aux["diversity"] + info.gates.sum()
            return routed, (info, aux, routing.update(new["routing"]))

        return jax.grad(losses, has_aux=True)(params)


@functools.cache
def trained(make, config=HOLD):
    return Trained(make(config))


def other(params, seed):
    """Other weights of the same shapes and sizes."""
    rng = np.random.default_rng(seed)

    def drawn(leaf):
        return leaf + jnp.float32(rng.normal(0, 0.1 + jnp.std(leaf), leaf.shape))

    return jax.tree.map(drawn, params)


def read_off(make, params):
    """What stands in the weights."""
    if make is lookup:
        return routing.signatures(params["directions"])
    q = ternarize(params["tiles"]["up"]["kernel"]).q
    return routing.signatures(q.sum(axis=-1))


@pytest.mark.parametrize("make", [flat, slow(hierarchical), slow(lookup)])
def test_signatures_move_until_the_moment_and_are_the_same_bits_from_then_on(make):
    run = trained(make)
    routers = [router_of(state) for state in run.states]
    assert [bool(r["held"]) for r in routers] == [False, True, True]
    assert not any(r["frozen"] for r in routers)
    for router, weights in zip(routers, (0, 1, 1), strict=True):
        own = read_off(make, run.params[weights])
        np.testing.assert_allclose(router["signature"], own, rtol=1e-6)
    np.testing.assert_array_equal(routers[2]["signature"], routers[1]["signature"])
    assert not np.allclose(*(read_off(make, params) for params in run.params[1:]))


@pytest.mark.parametrize("make", [flat, slow(hierarchical), slow(lookup)])
def test_balance_goes_on_and_no_gradient_reaches_held_signatures(make):
    run = trained(make)
    biases = [np.asarray(router_of(state)["bias"]) for state in run.states]
    assert (biases[2] != biases[1]).all()
    before, at, after = (out[2] for out in run.outs)
    name = "tiles" if make is not lookup else "directions"
    sizes = [
        max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads[name]))
        for grads in (before, at, after)
    ]
    assert sizes[0] > 1e-4
    assert sizes[1:] == [0, 0]


def test_routes_after_the_moment_are_those_of_the_held_signatures_and_the_biases():
    run = trained(flat)
    router = router_of(run.states[1])
    scores = routing.match(X, read_off(flat, run.params[1]))
    expected = routing.select_tiles(scores + router["bias"][None], 2)
    np.testing.assert_array_equal(run.outs[2][0].tiles, expected)
    moving = routing.match(X, read_off(flat, run.params[2]))
    assert (routing.select_tiles(moving + router["bias"][None], 2) != expected).any()


@pytest.mark.parametrize("make", [flat, slow(hierarchical)])
def test_evaluation_and_frozen_layers_know_it_from_the_state(make):
    run = trained(make)
    weights = run.params[2]
    before = {**run.states[2], "tiles": {"router": dict(router_of(run.states[2]))}}
    before["tiles"]["router"]["held"] = jnp.asarray(False)
    free, held = run.call(weights, before), run.call(weights, run.states[2])
    _, (trains, *_) = run.step(weights, run.states[2], 0.9)
    np.testing.assert_array_equal(held.tiles, trains.tiles)
    assert (free.tiles != held.tiles).any()
    packed = freeze(run.layer, {"params": weights, "routing": run.states[2]}, X)
    served = jax.jit(run.layer.apply)(packed, X)[1]
    np.testing.assert_array_equal(served.tiles, held.tiles)
    np.testing.assert_allclose(served.gates, held.gates, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["random", "learned"])
def test_controls_are_held_alike(source):
    run = trained(flat, RoutingConfig(source=source, hold_after=0.5))
    routers = [router_of(state) for state in run.states]
    np.testing.assert_array_equal(routers[2]["signature"], routers[1]["signature"])
    gradients = [out[2]["tiles"].get("router", {}) for out in run.outs]
    if source == "learned":
        own = [params["tiles"]["router"]["router"] for params in run.params]
        np.testing.assert_array_equal(routers[2]["signature"], own[1])
        assert jnp.abs(gradients[0]["router"]).max() > 1e-4
        assert not gradients[2]["router"].any()
    scores = routing.match(X, routers[1]["signature"])
    expected = routing.select_tiles(scores + routers[1]["bias"][None], 2)
    np.testing.assert_array_equal(run.outs[2][0].tiles, expected)


@pytest.mark.slow
def test_held_routes_keep_their_biases_too():
    run = trained(flat, RoutingConfig(hold_after=0.5, hold="routes"))
    routers = [router_of(state) for state in run.states]
    assert [bool(r["frozen"]) for r in routers] == [False, True, True]
    assert routers[0]["bias"].any()
    np.testing.assert_array_equal(routers[2]["bias"], routers[0]["bias"])
    np.testing.assert_array_equal(routers[2]["signature"], routers[1]["signature"])


@pytest.mark.slow
def test_by_hand_the_signatures_last_seen_in_training_are_held_and_released():
    layer = flat(RoutingConfig(hold_after=1.0))
    run = trained(flat)
    never = Trained(layer)
    assert not router_of(never.states[2])["held"]
    state = routing.hold_signatures(never.states[0])
    _, (_, _, new) = never.step(run.params[2], state, 0.0)
    np.testing.assert_array_equal(
        router_of(new)["signature"], router_of(never.states[0])["signature"]
    )
    free = routing.hold_signatures(new, False)
    _, (_, _, new) = never.step(run.params[2], free, 0.0)
    own = read_off(flat, run.params[2])
    np.testing.assert_allclose(router_of(new)["signature"], own, rtol=1e-6)


def test_layers_without_a_place_for_it_cannot_be_held_by_hand():
    layer = flat(RoutingConfig())
    state = jax.eval_shape(layer.init, jax.random.key(0), X)["routing"]
    assert set(router_of(state)) == {"bias", "margins", "signature", "frozen"}
    with pytest.raises(ValueError, match=r"RoutingConfig\(hold_after=1\.0\)"):
        routing.hold_signatures(state)


def test_training_without_progress_is_refused_and_evaluation_is_not():
    run = trained(flat)
    variables = {"params": run.params[0], "routing": run.states[0]}
    with pytest.raises(ValueError, match=r"progress must be given .* hold_after=0.5"):
        run.layer.apply(variables, X, train=True, mutable=["routing"])
    with pytest.raises(ValueError, match="progress must be a share"):
        run.layer.apply(variables, X, train=True, progress=7.0, mutable=["routing"])
    run.call(run.params[0], run.states[0])


def test_clusters_settle_on_held_signatures_and_then_stay():
    half = np.random.default_rng(0).normal(size=(4, 16))  # tiles 0 and 4, 1 and 5, ...
    state = {
        "router": {
            "margins": jnp.zeros((8, 64)),
            "signature": jnp.asarray(np.concatenate([half, half]), jnp.float32),
            "members": jnp.arange(8, dtype=jnp.int32).reshape(4, 2),
            "frozen": jnp.asarray(False),
            "held": jnp.asarray(False),
        }
    }
    settled = routing.rebuild_clusters(routing.hold_signatures(state))["router"]
    assert np.sort(settled["members"], axis=1).tolist().count([0, 4]) == 1
    again = routing.rebuild_clusters({"router": settled})["router"]
    np.testing.assert_array_equal(again["members"], settled["members"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hold_after": 1.5}, "hold_after must be in 0..1. Got 1.5"),
        ({"hold_after": -0.1}, "hold_after must be in 0..1. Got -0.1"),
        ({"hold": "scores"}, "hold='scores' needs hold_after"),
        ({"hold": "all", "hold_after": 0.1}, "hold must be one of signatures, scores"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong, message, no_type_hook):
    with pytest.raises(ValueError, match=message):
        RoutingConfig(**wrong)


@pytest.mark.slow
def test_devices_and_remat_hold_the_same_bits():
    layer, run = flat(), trained(flat)
    again = nn.remat(SparseTriXFFN, static_argnums=(2,))(
        16, num_tiles=8, tiles_per_token=2, routing=HOLD
    )

    def step(layer, x, state):
        variables = {"params": run.params[1], "routing": state}
        how = {"progress": jnp.float32(0.5), "mutable": ["routing"]}
        return layer.apply(variables, x, True, **how)[1]["routing"]

    both = jax.pmap(functools.partial(step, layer), in_axes=(0, None))(
        X.reshape(8, 5, 16), run.states[0]
    )
    again = jax.jit(functools.partial(step, again))(X, run.states[0])
    for device in range(8):
        mine = jax.tree.map(lambda leaf, d=device: leaf[d], both)
        for state in (mine, again):
            router = router_of(state)
            assert router["held"]
            np.testing.assert_allclose(
                router["signature"], read_off(flat, run.params[1]), rtol=1e-6
            )
