"""`SparseLookupFFN` with several directions a token, and with tiles that read by
themselves.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trix_jax import (
    RoutingConfig,
    SparseLookupFFN,
    TernaryConfig,
    ops,
    routing,
    splines,
)
from trix_jax.ternary import Ternary, hard_ternary, ternarize

D, EPS = 16, np.finfo(np.float32).eps
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 12, D)), jnp.float32)
OWN = SparseLookupFFN(
    D,
    num_tiles=12,
    tiles_per_cluster=3,
    grid_size=2,
    top_k_clusters=2,
    tiles_per_token=3,
    reads="own",
)


def test_splines_of_one_number_and_of_two_by_hand():
    one = jnp.array([[[0.0, 0.0], [0.0, 1.0]], [[1.0, -1.0], [2.0, 3.0]]])
    tiles = jnp.array([[0, 1], [0, 1]])
    place = jnp.array([[[-0.5], [-0.5]], [[0.25], [1.0]]])
    # relu of the first; 1 - l in the left cell of the second, 2 + 3 l at its end.
    found = splines.evaluate(one, tiles, place, 2)
    np.testing.assert_array_equal(found, [[0, 0.5], [0.25, 5]])
    two = jnp.arange(12.0).reshape(1, 4, 3)
    place = jnp.array([[[-0.75, 0.5]]])  # cell (0, 1), the second: 3, 4, 5
    found = splines.evaluate(two, jnp.array([[0]]), place, 2)
    np.testing.assert_array_equal(found, [[3 + 4 * 0.25 + 5 * 0.5]])


@pytest.mark.parametrize("grid", [1, 2, 3, 4])
def test_ramp_is_a_continuous_relu_of_its_cells(grid):
    where = np.linspace(-1, 1, 33)
    c = jnp.asarray(splines.ramp(grid))[None]
    tiles = jnp.zeros((33, 1), int)
    found = splines.evaluate(c, tiles, jnp.asarray(where)[:, None, None], grid)
    expected = np.maximum((where + 1) / 2 * grid - grid // 2, 0)
    np.testing.assert_allclose(found[:, 0], expected, rtol=0, atol=8 * EPS)


def dense_reference(layer, params, state, x, tiles):
    """Every tile computed for every token, those not chosen times 0."""
    centred = x - x.mean(axis=-1, keepdims=True)
    h = centred / jnp.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6)
    h = h * params["norm"]["scale"][None] + params["norm"]["bias"][None]
    read, write = (ternarize(params[n]["kernel"]) for n in ("tile_read", "tile_write"))
    scores = routing.match(h, routing.signatures(read.q))
    gates = routing.gates(scores, tiles, layer.routing.gate)
    chosen = jnp.zeros_like(scores).at[jnp.arange(len(x))[:, None], tiles].set(gates)
    place = jnp.tanh(h @ (read.q * read.scale).T)
    fixed = TernaryConfig(rule="fixed", threshold=0.3)
    c = ternarize(params["splines"]["kernel"], fixed).q.reshape(-1, layer.grid_size, 2)
    every = jnp.broadcast_to(jnp.arange(len(c))[None], place.shape)
    far = splines.evaluate(c, every, place[..., None], layer.grid_size)
    far = far * params["spline_scale"][None] * chosen * params["output_scale"]
    return far @ (write.q * write.scale)


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["sigmoid", "renormalized"])
def test_gradient_of_every_leaf_is_that_of_all_tiles_computed(gate):
    layer = OWN.clone(routing=RoutingConfig(gate=gate))
    variables = jax.jit(layer.init)(jax.random.key(0), X)
    x, state = X.reshape(-1, D), variables["routing"]
    dy = jnp.asarray(np.random.default_rng(2).normal(size=x.shape), jnp.float32)

    def own(params, x):
        y, info, _ = layer.apply({"params": params, "routing": state}, x)
        return jnp.sum(y * dy), info.tiles

    def dense(params, x, tiles):
        return jnp.sum(dense_reference(layer, params, state, x, tiles) * dy)

    (value, tiles), found = jax.jit(jax.value_and_grad(own, (0, 1), has_aux=True))(
        variables["params"], x
    )
    wanted_value, wanted = jax.jit(jax.value_and_grad(dense, (0, 1)))(
        variables["params"], x, tiles
    )
    np.testing.assert_allclose(value, wanted_value, rtol=1e-5)
    names = jax.tree.leaves_with_path(found)
    for (path, one), other in zip(names, jax.tree.leaves(wanted), strict=True):
        size = np.abs(other).max()
        assert size > 0, path
        # Sums over T tokens and D inputs, in another order.
        np.testing.assert_allclose(one, other, rtol=0, atol=(24 + 4 * D) * EPS * size)


def test_rows_not_asked_for_are_neither_computed_nor_read():
    def flops(number):
        weights = Ternary(jnp.ones((number, D)), jnp.ones((1, 1)))
        rows = jnp.zeros((8, 3), int)

        def both(x, weights):
            a = ops.read_rows(x, weights, rows, jnp.float32)
            return ops.write_rows(a, weights, rows, D, jnp.float32)

        arrays = jnp.ones((8, D)), ops.pack(weights, by_row=True)
        cost = jax.jit(both).lower(*arrays).compile().cost_analysis()
        return cost["flops"], cost["bytes accessed"] - arrays[1].bits.nbytes

    assert flops(16) == flops(1024)


@pytest.mark.parametrize("features", [16, 10])
def test_packed_rows_give_the_bits_of_latent_ones(features):
    chance = np.random.default_rng(3)
    weights = hard_ternary(jnp.asarray(chance.normal(size=(12, features)), jnp.float32))
    x = jnp.asarray(chance.normal(size=(5, features)), jnp.float32)
    rows = jnp.asarray(chance.integers(0, 12, (5, 3)))

    @jax.jit
    def both(x, weights):
        a = ops.read_rows(x, weights, rows, jnp.float32)
        return a, ops.write_rows(a, weights, rows, features, jnp.float32)

    packed = ops.pack(weights, by_row=True)
    a, y = both(x, weights)
    exact = (np.asarray(x, float)[:, None] * np.asarray(weights.q)[rows]).sum(-1)
    np.testing.assert_allclose(a, exact * float(weights.scale[0, 0]), atol=1e-5)
    for one, other in zip(both(x, packed), (a, y), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"reads": "each"}, "reads must be one of shared, own. Got 'each'"),
        ({"reads": "own", "compress_hidden": 4}, "no compressor. Got 4"),
        ({"ternary": TernaryConfig(mode="none")}, "directions are real"),
        (
            {"reads": "own", "ternary": TernaryConfig(granularity="channel")},
            "one scale for all tiles",
        ),
        ({"tiles_per_token": 9}, "tiles_per_token=9 .*tiles_per_cluster=8"),
        ({"top_k_clusters": 9}, "top_k_clusters=9 .* 8 clusters"),
    ],
)
def test_bad_argument_is_named(wrong, message, no_type_hook):
    layer = SparseLookupFFN(D, **wrong)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(layer.init, jax.random.key(0), X)


@pytest.mark.slow
@pytest.mark.parametrize("over", ["all", "open"])
def test_gradients_beside_masked_tokens_are_those_of_the_others_alone(over):
    """Of the norm too, which lies between the mask and the router."""
    layer = OWN.clone(routing=RoutingConfig(balance_over=over, gate="softmax"))
    x, mask = X.reshape(-1, D), jnp.arange(24) % 5 > 0
    variables = jax.jit(layer.init)(jax.random.key(0), x)

    @jax.jit
    def gradient(x, mask=None):
        def loss(params):
            given = variables | {"params": params}
            how = {"mask": mask, "mutable": ["routing"], "progress": 1.0}
            return jnp.sum(layer.apply(given, x, True, **how)[0][0] ** 2)

        return jax.grad(loss)(variables["params"])

    masked, alone = gradient(x, mask), gradient(x[mask])
    for found, expected in zip(*map(jax.tree.leaves, (masked, alone)), strict=True):
        limit = 64 * D * EPS * np.abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=0, atol=limit)


@pytest.mark.slow
@pytest.mark.parametrize("reads", ["shared", "own"])
def test_numpy_parameters_are_as_good(reads, no_type_hook):
    layer = OWN.clone(reads=reads)
    variables = jax.jit(layer.init)(jax.random.key(0), X)
    plain = jax.tree.map(np.asarray, variables)
    np.testing.assert_array_equal(
        layer.apply(plain, X)[0], layer.apply(variables, X)[0]
    )
