"""Layers whose tiles meet whole weights in Hopper's kernels: the numbers are those of
XLA's path. Stand-ins compute what the kernels do, also of float32; what a kernel leaves
unwritten is NaN. The kernels themselves are in `kernels/test_grouped_hopper.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from trix_jax import (
    HierarchicalTriXFFN,
    RoutingConfig,
    SparseTriXFFN,
    TernaryConfig,
    dispatch,
    expert_parallel,
    freeze,
    grouped_ffn,
    ops,
)
from trix_jax.nn.tiles import whole_products
from trix_jax.ternary import Ternary
from trix_kernels import choice, device
from trix_kernels.gpu_specs import GPUS
from trix_kernels.grouped_matmul import api, gathered, hopper

D = 8
X, DY = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 6, D)), jnp.float32)
MASK = jnp.arange(6)[None] < jnp.asarray([[6], [4], [0], [5]])


def matmul(x, w, block_tile, used, *, transposed=False):
    w = jnp.swapaxes(w, 1, 2) if transposed else w
    y = jnp.matmul(x, w[block_tile], preferred_element_type=jnp.float32)
    is_used = jnp.arange(x.shape[0])[:, None, None] < used[0]
    return jnp.where(is_used, y, jnp.nan).astype(x.dtype)


def outer(x, dy, first, rows):
    place = jnp.arange(x.shape[0] * x.shape[1])[None] - x.shape[1] * first[:, None]
    counts = (place >= 0) & (place < rows[:, None])
    x, dy = (a.reshape(-1, a.shape[-1]).astype(jnp.float32) for a in (x, dy))

    def of_tile(counts):
        return jnp.where(counts, x.T, 0) @ jnp.where(counts[:, None], dy, 0)

    return jax.vmap(of_tile)(counts)


def rows_of(x, rows):
    return jnp.where(rows[..., None] < 0, 0, x[rows])


def gathered_matmul(x, w, block_tile, used, rows, *, transposed=False):
    return matmul(rows_of(x, rows), w, block_tile, used, transposed=transposed)


def matmul_and_act(x, w, block_tile, used, rows, act):
    h = gathered_matmul(x, w, block_tile, used, rows)
    return h, act(h)


def hidden_gradient(dy, w, block_tile, used, rows, h, gate, act):
    p = gathered_matmul(dy, w, block_tile, used, rows, transposed=True)
    a, pull = jax.vjp(act, h)
    parts = (p * a).reshape(*p.shape[:2], 2, -1).sum(axis=-1)
    return *pull(gate[..., None] * p), gate[..., None] * a, jnp.moveaxis(parts, 2, 0)


@pytest.fixture
def hopper_stands_in(monkeypatch):
    monkeypatch.setattr(gathered, "matmul_and_act", matmul_and_act)
    monkeypatch.setattr(gathered, "hidden_gradient", hidden_gradient)
    monkeypatch.setattr(hopper, "grouped_matmul", matmul)
    monkeypatch.setattr(hopper, "grouped_outer", outer)
    monkeypatch.setattr(gathered, "gathered_matmul", gathered_matmul)
    monkeypatch.setattr(
        gathered,
        "outer_of_left",
        lambda x, dy, *runs: outer(rows_of(x, runs[-1]), dy, *runs[:-1]),
    )
    monkeypatch.setattr(
        gathered,
        "outer_of_right",
        lambda x, dy, *runs: outer(x, rows_of(dy, runs[-1]), *runs[:-1]),
    )
    monkeypatch.setattr(api, "unsupported_reason", lambda *_: None)


def pulled(layer, variables, x, dy, **given):
    """Output, tiles and gradients in training."""
    state = {"routing": variables["routing"]}

    def loss(params, x):
        (y, info, aux), _ = layer.apply(
            {"params": params, **state}, x, True, mutable=["routing"], **given
        )
        return jnp.sum(y * dy) + aux["total_aux"], (y, info.tiles)

    grads, (y, tiles) = jax.grad(loss, (0, 1), has_aux=True)(variables["params"], x)
    return (y, *grads), tiles


def assert_same(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        bound = 1e-5 * np.abs(b).max()
        assert bound > 0
        np.testing.assert_allclose(a, b, rtol=0, atol=bound)


def assert_equals_xla(layer, x=X, dy=DY, **given):
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    (found, tiles), (expected, theirs) = (
        jax.jit(functools.partial(pulled, layer.clone(implementation=how), **given))(
            variables, x, dy
        )
        for how in ("mosaic_gpu", "xla")
    )
    np.testing.assert_array_equal(tiles, theirs)
    assert_same(found, expected)


SLOW = pytest.mark.slow


TERNARY = {
    "real": {"mode": "none"},
    "soft": {"mode": "soft"},
    "progressive": {"mode": "progressive"},
    "late": {"full_precision_fraction": 0.7},
    "threshold channel": {"rule": "threshold", "granularity": "channel"},
    "fixed": {"rule": "fixed"},
}
ROUTING = {
    "sign": {"signature": "sign", "gate": "none"},
    "softmax": {"gate": "softmax"},
    "renormalized": {"gate": "renormalized"},
    "learned": {"source": "learned"},
}


@pytest.mark.usefixtures("hopper_stands_in")
@SLOW
@pytest.mark.parametrize("name", TERNARY)
def test_every_ternary_mode_has_the_numbers_of_xla(name):
    ternary = TernaryConfig(**TERNARY[name])
    layer = SparseTriXFFN(D, tiles_per_token=2, ternary=ternary)
    assert_equals_xla(layer, mask=MASK, progress=0.5)


@pytest.mark.usefixtures("hopper_stands_in")
@SLOW
@pytest.mark.parametrize("name", ROUTING)
def test_every_gate_has_the_numbers_of_xla(name):
    clusters = {"num_tiles": 4, "tiles_per_cluster": 2, "top_k_clusters": 2}
    routing = RoutingConfig(**ROUTING[name])
    layer = HierarchicalTriXFFN(D, tiles_per_token=2, routing=routing, **clusters)
    assert_equals_xla(layer)


@SLOW
@pytest.mark.usefixtures("hopper_stands_in")
def test_groups_have_the_numbers_of_xla():
    ternary = TernaryConfig(granularity="group")
    layer = SparseTriXFFN(256, num_tiles=2, expansion=1, ternary=ternary)
    x, dy = (jnp.tile(a, (1, 1, 256 // D)) for a in (X, DY))
    assert_equals_xla(layer, x, dy * jnp.linspace(-1, 1, 256)[None, None])


LAYER = SparseTriXFFN(D, tiles_per_token=2, activation="gelu")
MAPPED = {
    "vmap": lambda run: jax.vmap(run, (None, 0, 0)),
    "remat": lambda run: jax.checkpoint(run),
    "pmap": lambda run: jax.pmap(run, in_axes=(None, 0, 0)),
    "jvp": lambda run: (
        lambda variables, x, dy: jax.jvp(
            lambda x: run(variables, x, dy), (x,), (jnp.flip(x),)
        )[1]
    ),
    "scan": lambda run: (
        lambda variables, x, dy: jax.lax.scan(
            lambda _, given: (None, run(variables, *given)), None, (x, dy)
        )[1]
    ),
}


@pytest.mark.usefixtures("hopper_stands_in")
@SLOW
@pytest.mark.parametrize("name", MAPPED)
def test_transformed_it_has_the_numbers_of_xla(name):
    variables = jax.jit(LAYER.init)(jax.random.key(0), X)
    found, expected = (
        MAPPED[name](
            lambda *args, how=how: pulled(LAYER.clone(implementation=how), *args)[0]
        )(variables, X, DY)
        for how in ("mosaic_gpu", "xla")
    )
    assert_same(found, expected)


@SLOW
@pytest.mark.usefixtures("hopper_stands_in")
def test_a_shard_map_that_checks_what_varies_sums_the_gradient_of_shared_weights():
    layer = LAYER.clone(implementation="mosaic_gpu")
    variables = jax.jit(layer.init)(jax.random.key(0), X)
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))

    def total(call):
        def loss(params, x, dy):
            return jnp.sum(call({**variables, "params": params}, x) * dy)

        return lambda x, dy: jax.grad(loss)(variables["params"], x, dy)

    spread = jax.shard_map(
        lambda v, x: layer.apply(v, x)[0], mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d")
    )  # fmt: skip
    whole = LAYER.clone(implementation="xla")
    assert_same(
        jax.jit(total(spread))(X, DY),
        jax.jit(total(lambda v, x: whole.apply(v, x)[0]))(X, DY),
    )


@SLOW
@pytest.mark.usefixtures("hopper_stands_in")
def test_tiles_spread_over_devices_run_the_kernels():
    layer = LAYER.clone(implementation="xla")
    variables = jax.jit(layer.init)(jax.random.key(0), X)
    cut = expert_parallel.specs(variables["params"], "tile")
    mesh = jax.make_mesh((4,), ("tile",), axis_types=(AxisType.Auto,))
    spread = LAYER.clone(implementation="mosaic_gpu", tile_axis="tile")

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(cut, P(), P("tile"), P("tile")),
        out_specs=(P("tile"), cut),
        check_vma=False,
    )
    def many(params, state, x, dy):
        def loss(params):
            y = spread.apply({"params": params, "routing": state}, x)[0]
            return jnp.sum(y * dy), y

        grads, y = jax.grad(loss, has_aux=True)(params)
        return y, grads

    def one(params):
        y = layer.apply({**variables, "params": params}, X)[0]
        return jnp.sum(y * DY), y

    grads, y = jax.jit(jax.grad(one, has_aux=True))(variables["params"])
    assert_same(many(variables["params"], variables["routing"], X, DY), (y, grads))


@pytest.mark.parametrize("how", ["masked", "clusters", "channel"])
def test_batched_products_have_the_numbers_of_tiles_block_after_block(how, monkeypatch):
    layers = {
        "masked": LAYER,
        "clusters": HierarchicalTriXFFN(
            D, num_tiles=4, tiles_per_token=2, tiles_per_cluster=2, top_k_clusters=2
        ),
        "channel": LAYER.clone(ternary=TernaryConfig(granularity="channel")),
    }
    layer, given = layers[how], {"mask": MASK} if how == "masked" else {}
    variables = jax.jit(layer.init)(jax.random.key(0), X)
    suits, asked = grouped_ffn.suits_batches, []
    monkeypatch.setattr(
        grouped_ffn, "suits_batches", lambda s: asked.append(suits(s)) or asked[-1]
    )
    found, tiles = pulled(layer, variables, X, DY, **given)
    assert asked
    assert all(asked)
    monkeypatch.setattr(grouped_ffn, "suits_batches", lambda shapes: False)
    expected, theirs = pulled(layer, variables, X, DY, **given)
    np.testing.assert_array_equal(tiles, theirs)
    assert_same(found, expected)


@pytest.mark.parametrize("granularity", ["tile", "channel"])
def test_frozen_batches_are_those_of_training_bit_for_bit(granularity):
    ternary = TernaryConfig(granularity=granularity)
    layer = SparseTriXFFN(32, tiles_per_token=3, activation="gelu", ternary=ternary)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 64, 32)), jnp.float32)
    rows = dispatch.block_rows(4 * 64 * 3, layer.num_tiles)
    assert ops.suits_batches(rows, 32, layer.expansion * 32 // layer.num_tiles)
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    run = jax.jit(lambda variables: layer.apply(variables, x)[0])
    y = run(variables)
    np.testing.assert_array_equal(run(freeze(layer, variables, x)), y)
    assert np.any(y)


H, TILES = jnp.zeros((64, 128), jnp.bfloat16), jnp.zeros((64, 4), jnp.int32)
FEW = {"h": H[:16], "tiles": TILES[:16]}
WEIGHTS = Ternary(jnp.zeros((4, 128, 256)), jnp.ones((4, 1, 1)))


@pytest.mark.parametrize(
    ("given", "runs"),
    [
        ({}, True),
        ({"implementation": "xla"}, False),
        ({"h": H.astype(jnp.float32)}, "take bfloat16. Got float32"),
        ({"activations": "int8"}, "Int8 activations are rounded between"),
        ({"up": WEIGHTS._replace(q=jnp.zeros((4, 128, 64)))}, "Got 128 and 64"),
        (FEW, False),  # 16 rows a tile: blocks of padding
        (FEW | {"implementation": "mosaic_gpu"}, True),
    ],
)
def test_kernels_run_where_they_can_and_a_name_runs_or_says_why_not(
    given, runs, monkeypatch
):
    measured = choice.Choice("mosaic_gpu", "1.4 times as fast")
    monkeypatch.setattr(choice, "choose_whole", lambda arch: measured)
    asked = {"h": H, "tiles": TILES, "up": WEIGHTS, "activations": "float"}
    asked |= {"implementation": None} | given
    with device.assumed(GPUS["h100"]):
        kernels = whole_products(**asked) == "mosaic_gpu"
        assert kernels is (runs is True)
        if isinstance(runs, str):
            with pytest.raises(NotImplementedError, match=runs):
                whole_products(**asked | {"implementation": "mosaic_gpu"})
    with device.assumed(GPUS["b200"]):
        assert whole_products(**asked | {"implementation": None}) != "mosaic_gpu"


def test_kernels_that_no_gpu_has_timed_run_by_name_alone():
    asked = {"h": H, "tiles": TILES, "up": WEIGHTS, "activations": "float"}
    with device.assumed(GPUS["h100"]):
        assert whole_products(**asked, implementation=None) != "mosaic_gpu"
        by_name = whole_products(**asked, implementation="mosaic_gpu")
        assert by_name == "mosaic_gpu"
        assert ops.implementation({}) == "xla, weights not packed"
        asked_by_name = ops.implementation({}, asked="mosaic_gpu")
    assert asked_by_name == "mosaic_gpu where shapes allow, weights not packed"


def test_a_cpu_refuses_the_kernels_by_name():
    layer = SparseTriXFFN(D)
    variables = jax.eval_shape(layer.init, jax.random.key(0), X)
    named = layer.clone(implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match=r"'mosaic_gpu': .* need a GPU"):
        jax.eval_shape(named.apply, variables, X)
    frozen = jax.eval_shape(lambda v: freeze(layer, v, X), variables)
    with pytest.raises(NotImplementedError, match="take planar weights"):
        jax.eval_shape(named.apply, frozen, X)


@pytest.mark.usefixtures("no_type_hook")
def test_an_unknown_implementation_is_refused():
    layer = SparseTriXFFN(D, implementation="triton")
    with pytest.raises(ValueError, match=r"one of xla, mosaic_gpu\. Got 'triton'"):
        jax.eval_shape(layer.init, jax.random.key(0), X)
