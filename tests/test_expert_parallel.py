"""Tiles spread over devices: every token gets its tiles' outputs and gradients, however
uneven the routing.
"""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from trix_jax import HierarchicalTriXFFN, SparseTriXFFN, expert_parallel, routing

N, T, K, D = 16, 24, 2, 4  # T tokens a device
AXES = ("data", "tile")
ALL = P(AXES)


# Compiling is what takes the time here; exact tests are exact in integers.


def mesh_of(tiles):
    devices = np.asarray(jax.devices()[:8]).reshape(-1, tiles)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def mapped(mesh, in_specs, out_specs):
    options = {"mesh": mesh, "in_specs": in_specs, "out_specs": out_specs}
    return lambda f: jax.jit(jax.shard_map(f, check_vma=False, **options))


def routings():
    """Tiles of 8 T tokens: even, random, all to one tile, half of the devices uneven."""
    chance = np.random.default_rng(0)
    even = np.arange(8 * T * K).reshape(-1, K) % N
    apart = chance.permuted(np.tile(np.arange(N), (8 * T, 1)), axis=1)[:, :K]
    one = np.full((8 * T, K), N - 1)
    half = np.concatenate([one[: 4 * T], even[4 * T :]])
    return {"even": even, "random": apart, "one tile": one, "half": half}


def multiply(x, tiles, weights):
    """A stand-in for tiles: `x * w_n`."""
    return x[:, None] * weights[tiles][..., None]


@lru_cache
def spread(tiles):
    """Outputs, pulled-back gradients and a tangent over a mesh of (8 / tiles, tiles)."""

    @mapped(mesh_of(tiles), (ALL, ALL, ALL, P("tile")), (ALL, ALL, P("tile"), ALL))
    def run(x, routes, g, w):
        def outputs(x, w):
            return expert_parallel.route_tiles(multiply, x, routes, w, N, "tile")

        y, pull = jax.vjp(outputs, x, w)
        dx, dw = pull(g)
        tangent = jax.jvp(outputs, (x, w), (2 * x, 3 * w))[1]
        return y, dx, jax.lax.psum(dw, "data"), tangent

    return run


@pytest.mark.parametrize("tiles", [4, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", routings())
def test_route_tiles_any_routing_computes_every_assignment_exactly(tiles, name):
    chance, routes = np.random.default_rng(1), jnp.asarray(routings()[name])
    x, g = (
        jnp.asarray(chance.integers(-8, 8, s), jnp.float32)
        for s in ((8 * T, D), (8 * T, K, D))
    )
    w = jnp.asarray(chance.integers(1, 8, N), jnp.float32)
    y, pull = jax.vjp(lambda x, w: multiply(x, routes, w), x, w)
    found = spread(tiles)(x, routes, g, w)
    for a, b in zip(found, (y, *pull(g), 5 * y), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_masked_tokens_stay_at_home_also_under_shard_maps_own_check():
    chance, routes = np.random.default_rng(1), jnp.asarray(routings()["half"])
    x, g = (
        jnp.asarray(chance.integers(-8, 8, s), jnp.float32)
        for s in ((8 * T, D), (8 * T, K, D))
    )
    w = jnp.asarray(chance.integers(1, 8, N), jnp.float32)
    mask = jnp.asarray(chance.random(8 * T) < 0.25)

    def pulled(outputs, g, x, w):
        y, pull = jax.vjp(outputs, x, w)
        return y, *pull(g)

    def local(x, routes, g, mask, w):
        def outputs(x, w):
            how = (routes, w, N, "tile", mask)
            return expert_parallel.route_tiles(multiply, x, *how)

        return pulled(outputs, g, x, w)

    specs = {"in_specs": (ALL,) * 4 + (P("tile"),), "out_specs": (ALL, ALL, P("tile"))}
    run = jax.jit(jax.shard_map(local, mesh=mesh_of(4), **specs))
    real = mask[:, None, None]
    found = run(x, routes, g, mask, w)
    plain = pulled(lambda x, w: multiply(x, routes, w) * real, g, x, w)
    for a, b in zip(found, plain, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("name", "tiles", "rounds"),
    [("even", 8, {1}), ("one tile", 8, {6}), ("half", 4, {1, 4}), ("one tile", 4, {4})],
)
def test_rounds_are_as_many_as_the_most_uneven_device_needs(name, tiles, rounds):
    @mapped(mesh_of(tiles), ALL, ALL)
    def count(routes):
        return expert_parallel.line_up(routes.reshape(-1), N, "tile").rounds[None]

    assert set(count(jnp.asarray(routings()[name])).tolist()) == rounds


@pytest.mark.parametrize("assignments", [1, 7, 48, 1000])
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_rounds_of_the_worst_routing_have_room_for_every_assignment(
    assignments, devices
):
    rows = expert_parallel.rows_a_round(assignments, devices)
    assert -(-assignments // rows) <= devices
    assert rows * devices <= 1.25 * assignments + devices


LAYERS = {
    "sparse": partial(SparseTriXFFN, 16, num_tiles=8, tiles_per_token=2),
    "hierarchical": partial(
        HierarchicalTriXFFN, 16, num_tiles=16, tiles_per_cluster=4, tiles_per_token=2
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tiles"), [("sparse", 8), ("hierarchical", 4)])
def test_layer_with_spread_tiles_equals_one_device(name, tiles):
    x, target = jax.random.normal(jax.random.key(0), (2, 8, 12, 16))
    layer = LAYERS[name]()
    start = layer.init(jax.random.key(1), x)
    spread = LAYERS[name](axis_name=AXES, tile_axis="tile")
    cut = expert_parallel.specs(start["params"], "tile")

    def loss(layer, params, state, x, target):
        variables = {"params": params, "routing": state}
        (y, info, aux), state = layer.apply(variables, x, True, mutable=["routing"])
        total = jnp.square(y - target).mean() + aux["total_aux"]
        return total, (y, info.tiles, state["routing"])

    def step(layer, params, state, x, target):
        of = jax.value_and_grad(partial(loss, layer), has_aux=True)
        return of(params, state, x, target)

    @mapped(mesh_of(tiles), (cut, P(), ALL, ALL), ((P(), (ALL, ALL, P())), cut, P()))
    def many(params, state, x, target):
        (total, (y, routes, state)), grads = step(spread, params, state, x, target)
        total, state = jax.lax.pmean(total, AXES), routing.update(state, axis_name=AXES)
        grads = expert_parallel.mean_gradients(grads, cut, AXES)
        norm = expert_parallel.global_norm(grads, cut)
        return (total, (y, routes, state)), grads, norm

    inputs = (start["params"], start["routing"], x, target)
    (total, (y, routes, state)), grads = jax.jit(partial(step, layer))(*inputs)
    norm = jnp.sqrt(sum(jnp.square(g).sum() for g in jax.tree.leaves(grads)))
    found = many(*inputs)
    assert not np.array_equal(found[0][1][0], jnp.zeros_like(y))
    np.testing.assert_array_equal(found[0][1][1], routes)
    expected = (total, (y, routes, routing.update(state))), grads, norm
    paths = jax.tree_util.tree_leaves_with_path(expected)
    for (path, a), b in zip(paths, jax.tree.leaves(found), strict=True):
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6, err_msg=where)


def test_specs_cut_the_weights_of_tiles_and_nothing_else():
    layer = LAYERS["hierarchical"](routing=routing.RoutingConfig(source="learned"))
    x = jnp.zeros((2, 16))
    params = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    specs = expert_parallel.specs({"moments": params}, "tile")["moments"]
    assert specs["tiles"]["up"]["kernel"] == P("tile")
    assert specs["tiles"]["down"]["kernel"] == P("tile")
    rest = [s for s in jax.tree.leaves(specs) if s != P("tile")]
    assert rest == [P()] * (len(jax.tree.leaves(params)) - 2)


@pytest.mark.usefixtures("no_type_hook")
def test_tiles_that_do_not_spread_evenly_are_refused():
    layer = SparseTriXFFN(16, num_tiles=4, tile_axis="tile")
    x = jnp.zeros((8, 16))
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    apply = mapped(mesh_of(8), (P(), ALL), ALL)(lambda v, x: layer.apply(v, x)[0])
    with pytest.raises(ValueError, match="devices of tile=8 must divide num_tiles=4"):
        jax.eval_shape(apply, variables, x)
