"""Pinned and forbidden tiles, on a flat and on a hierarchical layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from trix_jax import HierarchicalTriXFFN, RoutingConfig, SparseTriXFFN, freeze
from trix_jax.nn.steering import forbid, layer_states, pin

LAYER = ("tiles", "router")
X = jax.random.normal(jax.random.key(0), (2, 6, 16))
SOME = np.arange(12).reshape(2, 6) % 3 == 0


@pytest.fixture(
    scope="module", params=["flat", pytest.param("clusters", marks=pytest.mark.slow)]
)
def steered(request):
    """A layer, its variables and its jitted forward."""
    if request.param == "flat":
        layer = SparseTriXFFN(16, num_tiles=8, tiles_per_token=2)
    else:
        layer = HierarchicalTriXFFN(16, num_tiles=8, tiles_per_cluster=4)
    variables = jax.jit(layer.init)(jax.random.key(1), X)
    return layer, variables, jax.jit(lambda v: layer.apply(v, X))


def test_pinned_tokens_take_the_tile_and_others_stay(steered):
    _, variables, forward = steered
    y, before, _ = forward(variables)
    moved, after, _ = forward(pin(variables, LAYER, 5, jnp.asarray(SOME)))
    assert (after.tiles[SOME] == 5).any(axis=-1).all()
    assert not (before.tiles[SOME] == 5).any(axis=-1).all()
    np.testing.assert_array_equal(after.tiles[~SOME], before.tiles[~SOME])
    changed = ~(before.tiles == after.tiles).all(axis=-1)
    assert changed.any()
    assert (np.abs(moved - y)[changed].max(axis=-1) > 0).all()


def test_forbidden_tile_is_not_taken_by_the_marked_tokens(steered):
    _, variables, forward = steered
    _, before, _ = forward(variables)
    tile = int(before.tiles[0, 0, 0])
    _, after, _ = forward(forbid(variables, LAYER, tile, jnp.asarray(SOME)))
    assert not (after.tiles[SOME] == tile).any()
    np.testing.assert_array_equal(after.tiles[~SOME], before.tiles[~SOME])


@pytest.mark.slow
def test_whole_cluster_forbidden_opens_another():
    layer = HierarchicalTriXFFN(16, num_tiles=4, tiles_per_cluster=2)
    variables = jax.jit(layer.init)(jax.random.key(1), X)
    everyone = jnp.ones(X.shape[:2], bool)
    for tile in (0, 1):
        variables = forbid(variables, LAYER, tile, everyone)
    assert jax.jit(layer.apply)(variables, X)[1].tiles.min() >= 2


@pytest.mark.slow
def test_a_tile_of_another_cluster_has_a_gate_of_its_own():
    config = RoutingConfig(gate="softmax")
    layer = HierarchicalTriXFFN(16, num_tiles=8, tiles_per_cluster=2, routing=config)
    variables = jax.jit(layer.init)(jax.random.key(1), X)
    _, before, _ = jax.jit(layer.apply)(variables, X)
    members = variables["routing"]["tiles"]["router"]["members"]
    cluster = next(c for c in members if before.tiles[0, 0, 0] in c)
    everyone, given = jnp.ones(X.shape[:2], bool), variables
    for tile in cluster:
        given = forbid(given, LAYER, int(tile), everyone)
    y, after, _ = jax.jit(layer.apply)(given, X)
    assert after.tiles[0, 0, 0] not in cluster
    assert 0 < after.gates[0, 0, 0] < 3  # its share of three tiles, times three
    assert np.abs(y[0, 0]).max() > 0


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        class Step(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return SparseTriXFFN(16, num_tiles=8, name="ffn")(x)[0], None

        axes = {"params": 0, "routing": 0, "packed": 0}
        scan = nn.scan(Step, variable_axes=axes, split_rngs={"params": True}, length=2)
        return scan(name="steps")(x, None)[0]


def test_layers_that_share_a_state_take_no_orders():
    variables = jax.eval_shape(Scanned().init, jax.random.key(1), X)
    layer = ("steps", "ffn", *LAYER)
    with pytest.raises(ValueError, match="whose state is that of 2 layers"):
        pin(variables, layer, 3, jnp.ones(X.shape[:2], bool))


@pytest.mark.slow
def test_orders_hold_for_packed_variables(steered):
    layer, variables, forward = steered
    given = pin(freeze(layer, variables, X), LAYER, 3, jnp.asarray(SOME))
    assert (forward(given)[1].tiles[SOME] == 3).any(axis=-1).all()


def test_wrong_orders_are_refused(steered, no_type_hook):
    layer, variables, _ = steered
    assert list(layer_states(variables["routing"])) == [LAYER]
    with pytest.raises(ValueError, match=r"below 8\. Got 8"):
        pin(variables, LAYER, 8, jnp.asarray(SOME))
    with pytest.raises(ValueError, match="layer must be one of"):
        pin(variables, ("router",), 0, jnp.asarray(SOME))
    given = pin(variables, LAYER, 0, jnp.asarray(SOME))
    with pytest.raises(ValueError, match=r"\[6, 8\]\. Got \[12, 8\]"):
        layer.apply(given, X[:1])


@pytest.mark.slow
def test_layer_that_looks_at_token_ids_alone_refuses_orders():
    layer = SparseTriXFFN(16, num_tiles=4, routing=RoutingConfig(source="hash"))
    ids = jnp.zeros(X.shape[:2], jnp.int32)
    variables = jax.jit(layer.init)(jax.random.key(1), X, token_ids=ids)
    given = pin(variables, LAYER, 0, jnp.asarray(SOME))
    with pytest.raises(ValueError, match="must not be given"):
        layer.apply(given, X, token_ids=ids)
