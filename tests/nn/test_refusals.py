"""What a layer cannot take, said with what to write instead."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from trix_jax import (
    HierarchicalTriXFFN,
    SparseLookupFFN,
    SparseTriXFFN,
    TriXLinear,
    freeze,
    widen,
)

D = 16
X = jax.random.normal(jax.random.key(0), (4, D))


@pytest.fixture(scope="module")
def variables():
    return jax.jit(SparseTriXFFN(D).init)(jax.random.key(1), X)


@pytest.mark.parametrize(
    ("kind", "how", "message"),
    [
        (SparseTriXFFN, {"expansion": 2.3}, r"=36\.8 .* must be integers"),
        (SparseTriXFFN, {"expansion": 2.5}, r"=40\.0 .* must be integers"),
        (SparseTriXFFN, {"num_tiles": 4.0}, r"num_tiles=4\.0 must be integers"),
        (HierarchicalTriXFFN, {"tiles_per_cluster": 2.5}, "=2.5 must be integers"),
        (SparseTriXFFN, {"routing": "hash"}, "must be a RoutingConfig.* Got 'hash'"),
        (SparseTriXFFN, {"routing": {"source": "hash"}}, "must be a RoutingConfig"),
        (HierarchicalTriXFFN, {"ternary": "ste"}, "must be a TernaryConfig"),
        (SparseTriXFFN, {"dropout": 1.5}, r"dropout must be in 0\.\.1\. Got 1\.5"),
        (SparseLookupFFN, {"dropout": -0.5}, r"dropout must be in 0\.\.1\. Got -0\.5"),
        (SparseLookupFFN, {"grid_size": -1}, "grid_size must be an integer above 0"),
        (SparseLookupFFN, {"grid_size": 2.0}, r"integer above 0\. Got 2\.0"),
    ],
)
def test_settings_of_another_type_are_named(kind, how, message, no_type_hook):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(kind(D, **how).init, jax.random.key(0), X)


@pytest.mark.slow
def test_a_mesh_of_explicit_axes_is_refused_with_what_to_write(variables):
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    assert mesh.axis_types == (AxisType.Explicit,)  # JAX's default
    x = jax.device_put(X, NamedSharding(mesh, P("data")))

    def call(x):
        return SparseTriXFFN(D).apply(variables, x)[0]

    with pytest.raises(ValueError, match=r"\['data'\] are explicit.* jax\.shard_map"):
        jax.jit(call)(x)
    with jax.set_mesh(mesh):
        with pytest.raises(ValueError, match=r"jax\.sharding\.auto_axes"):
            jax.jit(call)(x)
        whole = jax.device_put(X, NamedSharding(mesh, P()))
        np.testing.assert_allclose(jax.jit(call)(whole), call(X), atol=1e-5)
        inside = jax.sharding.auto_axes(call, out_sharding=P("data"))
        np.testing.assert_allclose(jax.jit(inside)(x), call(X), atol=1e-5)


def test_the_state_of_other_tiles_is_refused_as_such(variables):
    wider = jax.jit(SparseTriXFFN(D, num_tiles=8).init)(jax.random.key(0), X)
    mixed = variables | {"routing": wider["routing"]}
    with pytest.raises(ValueError, match=r"must be of 4 tiles\. Got that of 8"):
        jax.eval_shape(SparseTriXFFN(D).apply, mixed, X)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layer", "other"),
    [
        (TriXLinear(32), TriXLinear(16)),
        (SparseLookupFFN(D, grid_size=2), SparseLookupFFN(D, grid_size=1)),
    ],
)
def test_frozen_variables_of_other_settings_are_refused(layer, other):
    variables = jax.jit(layer.init)(jax.random.key(0), X)
    frozen = freeze(layer, variables, X)
    for given in (frozen, widen(frozen)):
        jax.eval_shape(layer.apply, given, X)
        with pytest.raises(ValueError, match=r"bits must be .*frozen with other sett"):
            jax.eval_shape(other.apply, given, X)


def test_clusters_of_other_settings_are_refused():
    small = HierarchicalTriXFFN(D, num_tiles=8, tiles_per_cluster=2)
    variables = jax.jit(small.init)(jax.random.key(0), X)
    other = small.clone(tiles_per_cluster=4)
    with pytest.raises(ValueError, match=r"Got \[4, 2\]: the state of other settings"):
        jax.eval_shape(other.apply, variables, X)


class WithItsOwnPack(nn.Module):
    """A user's module whose `pack` has nothing to do with weights."""

    def pack(self, luggage):
        return {"suitcase": luggage}

    @nn.compact
    def __call__(self, x):
        scale = self.param("own", nn.initializers.ones, (8,))
        return TriXLinear(8, name="linear")(x) * scale[None]


def test_freeze_leaves_a_module_alone_that_has_a_method_pack_of_its_own():
    model = WithItsOwnPack()
    variables = jax.jit(model.init)(jax.random.key(1), X)
    frozen = freeze(model, variables, X)
    assert frozen["params"].keys() == {"own"}
    assert frozen["packed"].keys() == {"linear"}
    np.testing.assert_allclose(
        model.apply(frozen, X), model.apply(variables, X), rtol=1e-5
    )


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_freeze_refuses_weights_that_are_not_finite(value):
    layer = TriXLinear(8)
    variables = jax.jit(layer.init)(jax.random.key(1), X)
    kernel = variables["params"]["kernel"]["kernel"]
    spoilt = {"params": {"kernel": {"kernel": kernel.at[1, 2, 0].set(value)}}}
    with pytest.raises(ValueError, match=r"params/kernel/kernel must .* Got 1 of 128"):
        freeze(layer, spoilt, X)
    traced = jax.eval_shape(lambda v: freeze(layer, v, X), spoilt)  # nothing is known
    assert traced["packed"]["kernel"]["bits"].dtype == jnp.uint8
