"""Every layer under jit, vmap, scan, remat, checkpoint, tabulate and the bridge to NNX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

# Compiling is what takes the time here; no test in this file asks for equal bits across
# programs.

D = 16
EPS = np.finfo(np.float32).eps


def test_changing_routes_share_one_trace(ffn):
    one_token = jnp.broadcast_to(ffn.x[:1, :1], ffn.x.shape)
    variables = [ffn.variables()] * 3 + [ffn.variables(seed=1)]
    inputs = [ffn.x, -ffn.x, one_token, ffn.x]
    ffn.apply(variables[0], ffn.x)  # another test may have cleared JAX's caches
    before = ffn.traces.copy()
    assert before[ffn.x.shape, "float32"] >= 1
    tiles = [
        np.asarray(ffn.apply(v, x)[1].tiles)
        for v, x in zip(variables, inputs, strict=True)
    ]
    assert len({t.tobytes() for t in tiles}) == 4
    assert (tiles[2] == tiles[2][0, 0]).all()
    assert ffn.traces == before


def test_permuting_tokens_permutes_outputs(ffn):
    order = np.random.default_rng(0).permutation(24)
    flat = ffn.x.reshape(-1, D)
    y, info, _ = ffn.run(flat)
    moved, moved_info, _ = ffn.run(flat[order])
    np.testing.assert_array_equal(moved_info.tiles, info.tiles[order])
    # A token may sit in another row of a matrix product, whose sums of up to 4 D terms
    # may then be taken in another order.
    np.testing.assert_allclose(
        moved, y[order], rtol=0, atol=4 * D * EPS * np.abs(y).max()
    )


def test_scaling_a_tiles_signature_changes_no_route(ffn):
    """A tile is not found more often for being larger: addresses have unit RMS."""
    chance, variables = np.random.default_rng(0), ffn.variables()
    leaves = {"lookup": ("directions",), "lookup_own": ("tile_read", "kernel")}
    leaf = leaves.get(ffn.name, ("tiles", "up", "kernel"))

    def scales(w):  # where tiles have one scale, all are larger together
        tiles = 1 if ffn.name == "lookup_own" else len(w)
        return 2.0 ** chance.choice([-3, -2, -1, 1, 2, 3], (tiles, *[1] * (w.ndim - 1)))

    scaled = jax.tree_util.tree_map_with_path(
        lambda path, w: w * scales(w) if tuple(key.key for key in path) == leaf else w,
        variables["params"],
    )
    moved = jax.tree.map(lambda a, b: np.any(a != b), scaled, variables["params"])
    assert sum(jax.tree.leaves(moved)) == 1
    routes = [
        ffn.apply({**variables, "params": params}, ffn.x)[1].tiles
        for params in (variables["params"], scaled)
    ]
    np.testing.assert_array_equal(*routes)


@pytest.mark.slow
def test_vmap_equals_one_call(ffn_kind):
    layer, variables = ffn_kind.layer, ffn_kind.variables()
    y, info, _ = jax.jit(jax.vmap(lambda x: layer.apply(variables, x)))(ffn_kind.x)
    whole, whole_info, _ = ffn_kind.run()
    np.testing.assert_array_equal(info.tiles, whole_info.tiles)
    np.testing.assert_array_equal(info.counts.sum(axis=0), whole_info.counts)
    bound = 4 * D * EPS * np.abs(whole).max()
    np.testing.assert_allclose(y, whole, rtol=0, atol=bound)


class Repeated(nn.Module):
    """One layer twice under `nn.scan` and `nn.remat`, each time with weights of its
    own.
    """

    layer: nn.Module

    @nn.compact
    def __call__(self, x):
        cls = nn.remat(type(self.layer), static_argnums=(2,))
        fields = {
            name: getattr(self.layer, name)
            for name in self.layer.__dataclass_fields__
            if name not in ("name", "parent")
        }

        class Step(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                y, _, aux = cls(**fields, name="ffn")(x, False)
                return x + y, aux["total_aux"]

        scan = nn.scan(
            Step,
            variable_axes={"params": 0, "routing": 0},
            split_rngs={"params": True},
            length=2,
        )
        return scan(name="steps")(x, None)


@pytest.mark.slow
def test_scan_and_remat_equal_the_layers_one_after_another(ffn_kind):
    layer = ffn_kind.layer
    stacked = jax.tree.map(
        lambda a, b: jnp.stack([a, b]),
        ffn_kind.variables(),
        ffn_kind.variables(seed=1),
    )
    nested = {key: {"steps": {"ffn": value}} for key, value in stacked.items()}
    shapes = jax.eval_shape(Repeated(layer).init, jax.random.key(0), ffn_kind.x)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, nested)
    x = ffn_kind.x
    for i in range(2):
        x = x + ffn_kind.apply(jax.tree.map(lambda a, i=i: a[i], stacked), x)[0]

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params):
        y, _ = Repeated(layer).apply({**nested, "params": params}, ffn_kind.x)
        return jnp.sum(y**2), y

    (_, y), gradient = loss(nested["params"])
    np.testing.assert_allclose(y, x, rtol=0, atol=8 * D * EPS * np.abs(x).max())
    for leaf in jax.tree.leaves(gradient):
        assert (np.abs(leaf).reshape(2, -1).max(axis=1) > 0).all()


@pytest.mark.slow
def test_jax_checkpoint_leaves_the_gradient(ffn_kind):
    variables = ffn_kind.variables()
    plain, _ = ffn_kind.task_gradient()(variables)
    saved, _ = ffn_kind.task_gradient(jax.checkpoint)(variables)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(saved), strict=True):
        bound = 24 * 4 * D * EPS * np.abs(a).max()
        np.testing.assert_allclose(a, b, rtol=0, atol=bound)


def test_tabulate_lists_the_parameters(ffn):
    table = nn.tabulate(ffn.layer, jax.random.key(0), console_kwargs={"width": 200})(
        ffn.x
    )
    assert type(ffn.layer).__name__ in table
    total = sum(a.size for a in jax.tree.leaves(ffn.variables()["params"]))
    assert f"{total:,}" in table


@pytest.mark.slow
def test_nnx_bridge_runs_and_differentiates(ffn_kind):
    @jax.jit
    def build_and_differentiate(x):
        layer = ffn_kind.layer
        model = nnx.bridge.ToNNX(layer, rngs=nnx.Rngs(0)).lazy_init(x)

        def loss(model):
            y, info, aux = model(x)
            return jnp.sum(y**2), (y, info, aux)

        gradient, out = nnx.grad(loss, has_aux=True)(model)
        return nnx.to_pure_dict(nnx.state(gradient, nnx.Param)), out

    gradient, (y, info, aux) = build_and_differentiate(ffn_kind.x)
    assert y.shape == ffn_kind.x.shape
    assert np.abs(y).max() > 1e-3
    assert info.counts.sum() == info.tiles.size
    assert np.isfinite(aux["total_aux"])
    assert len(jax.tree.leaves(gradient)) == len(ffn_kind.leaves)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
