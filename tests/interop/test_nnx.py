"""TriX layers in NNX models: modes, the routing state, a frozen model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from trix_jax import HierarchicalTriXFFN, SparseTriXFFN, TriXLinear, balance
from trix_jax.interop.nnx import (
    Layer,
    PackedWeights,
    Routing,
    freeze,
    update_routing,
)

X = jax.random.normal(jax.random.key(0), (4, 6, 16))
EPS = np.finfo(np.float32).eps


def assert_near(got, expected, roundings=64):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = np.float64(a), np.float64(b)
        bound = roundings * EPS * max(np.abs(b).max(), 1e-6)
        np.testing.assert_allclose(a, b, rtol=0, atol=bound)


class Mlp(nnx.Module):
    """Two modules of equal fields, whose input widths differ."""

    def __init__(self):
        def layer(width):
            module = nnx.bridge.ToNNX(TriXLinear(32), rngs=nnx.Rngs(0))
            return module.lazy_init(jnp.zeros((1, width)))

        self.a, self.b = layer(16), layer(32)

    def __call__(self, x):
        return self.b(nnx.relu(self.a(x)))


@pytest.mark.slow
def test_freeze_of_equal_modules_with_other_inputs_packs_each():
    model = Mlp()
    served = freeze(model, X)
    expected = nnx.jit(lambda model, x: model(x))(model, X)
    assert_near(nnx.jit(lambda model, x: model(x))(served, X), expected)


class Model(nnx.Module):
    """Two different layers between two dense ones, the second twice."""

    def __init__(self, rngs, dropout=0.0):
        x = jnp.zeros((1, 1, 16))
        self.first = nnx.Linear(16, 16, rngs=rngs)
        clusters = {"num_tiles": 4, "tiles_per_cluster": 2}
        self.flat = Layer(SparseTriXFFN(16, dropout=dropout), x, rngs=rngs)
        self.layers = nnx.List(
            [Layer(HierarchicalTriXFFN(16, **clusters), x, rngs=rngs) for _ in range(2)]
        )
        self.last = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, x):
        x, losses = self.first(x), []
        for layer in (self.flat, *self.layers):
            y, _, aux = layer(x)
            x = x + y
            losses.append(aux["total_aux"])
        return self.last(x), sum(losses)


@nnx.jit
def step(model, optimizer):
    def loss_fn(model):
        y, aux = model(X)
        return jnp.mean((y[..., 0] - jnp.sin(X[..., 0])) ** 2) + aux

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    update_routing(model)
    return loss


@pytest.fixture(scope="module")
def trained():
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    losses = [float(step(model, optimizer)) for _ in range(12)]
    return model, losses


def biases(model):
    state = nnx.to_pure_dict(nnx.state(model, Routing))
    return state["flat"]["tiles"]["router"]["bias"]


@pytest.mark.slow
def test_training_learns_and_moves_the_routing_state(trained):
    model, losses = trained
    assert losses[-1] < losses[0]
    assert np.abs(biases(model)).max() > 0


@pytest.mark.slow
def test_frozen_model_computes_what_the_trained_one_does_in_two_bits(trained):
    model, _ = trained
    before = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    served = freeze(model, X)
    after = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    model.eval()
    call = nnx.jit(lambda model, x: model(x)[0])
    np.testing.assert_array_equal(call(served, X), call(model, X))
    words = jax.tree.leaves(nnx.to_pure_dict(nnx.state(served, PackedWeights)))
    assert sum(leaf.dtype == jnp.uint8 for leaf in words) == 6
    kernels = [
        path
        for path, _ in nnx.to_flat_state(nnx.state(served, nnx.Param))
        if path[-1] == "kernel" and "tiles" in path
    ]
    assert not kernels


@pytest.mark.slow
def test_modes_switch_dropout_and_the_routing_state():
    model = Model(nnx.Rngs(0), dropout=0.5)
    call = nnx.jit(lambda model: model(X)[0])

    def assigned():
        state = nnx.to_pure_dict(nnx.state(model, Routing))
        return balance.loads(state["flat"]["tiles"]["router"]["margins"]).sum()

    model.eval()
    np.testing.assert_array_equal(call(model), call(model))
    assert assigned() == 0
    model.train()
    assert (call(model) != call(model)).any()
    assert assigned() == 2 * 24
    assert nnx.view(model, deterministic=True).flat.deterministic
    assert not model.flat.deterministic


def test_model_without_trix_layers_is_not_frozen():
    with pytest.raises(ValueError, match="Linear holds no ternary weights"):
        freeze(nnx.Linear(16, 2, rngs=nnx.Rngs(0)), X)


@pytest.mark.slow
def test_a_model_that_takes_flags_is_frozen():
    class Flagged(Model):
        def __call__(self, x, scale, deterministic):
            if not deterministic:
                raise AssertionError("serving is deterministic")
            return super().__call__({"one": x}[scale])

    model = Flagged(nnx.Rngs(0))
    served = freeze(model, X, "one", deterministic=True)
    model.eval()
    call = nnx.jit(lambda model: model(X, "one", deterministic=True)[0])
    np.testing.assert_array_equal(call(served), call(model))


@pytest.mark.slow
def test_bridge_without_a_mode_is_frozen_too():
    bridged = nnx.bridge.ToNNX(SparseTriXFFN(16), rngs=nnx.Rngs(0)).lazy_init(X)
    served = freeze(bridged, X)
    call = nnx.jit(lambda model, x: model(x)[0])
    np.testing.assert_array_equal(call(served, X), call(bridged, X))
    assert (
        functools.reduce(
            lambda a, b: a + b.size, jax.tree.leaves(nnx.state(served, nnx.Param)), 0
        )
        == 0
    )


# Transformations -------------------------------------------------------------------------------------------------------


class Small(nnx.Module):
    """One layer and its residual."""

    def __init__(self, rngs, axis_name=None):
        layer = SparseTriXFFN(16, tiles_per_token=2, axis_name=axis_name)
        self.ffn = Layer(layer, jnp.zeros((1, 16)), rngs=rngs)

    def __call__(self, x):
        y, _, aux = self.ffn(x)
        return x + y, aux["total_aux"]


def small_loss(model, x, call=lambda model, x: model(x)):
    y, aux = call(model, x)
    return jnp.mean((y - jnp.sin(x)) ** 2) + aux


def small_step(model, x, axis_name=None, **how):
    """A step of plain gradient descent."""
    grads = nnx.grad(small_loss)(model, x, **how)
    if axis_name is not None:
        grads = jax.lax.pmean(grads, axis_name)
    moved = jax.tree.map(
        lambda p, g: p - 0.1 * g, nnx.state(model, nnx.Param), nnx.state(grads)
    )
    nnx.update(model, moved)
    update_routing(model, axis_name=axis_name)


def shard_mapped(model, x):
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,), devices=jax.devices()[:4])
    step = functools.partial(small_step, axis_name="data")
    specs = {"in_specs": (P(), P("data")), "out_specs": None}
    nnx.shard_map(step, mesh=mesh, check_vma=False, **specs)(model, x)


def pmapped(model, x):
    step = functools.partial(small_step, axis_name="data")
    nnx.pmap(step, axis_name="data", in_axes=(None, 0))(model, x.reshape(4, 1, 6, 16))


def rematted(model, x):
    call = nnx.remat(lambda model, x: model(x))
    nnx.jit(functools.partial(small_step, call=call))(model, x)


def learned(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Any(nnx.Param, Routing)))


@pytest.mark.slow
@pytest.mark.parametrize("step", [shard_mapped, pmapped, rematted])
def test_transformed_step_is_the_plain_one(step):
    plain = Small(nnx.Rngs(0))
    nnx.jit(small_step)(plain, X)
    model = Small(nnx.Rngs(0), axis_name=None if step is rematted else "data")
    step(model, X)
    assert_near(learned(model), learned(plain))


@pytest.mark.slow
def test_calls_before_the_update_add_up_to_the_state_of_the_whole_batch():
    whole, halves = Small(nnx.Rngs(0)), Small(nnx.Rngs(0))
    call, update = nnx.jit(lambda model, x: model(x)[0]), nnx.jit(update_routing)
    call(whole, X)
    for half in jnp.split(X, 2):
        call(halves, half)
    update(whole)
    update(halves)
    assert_near(learned(halves), learned(whole))


class Scanned(nnx.Module):
    """Three layers that `nnx.vmap` makes and `nnx.scan` calls."""

    def __init__(self, rngs):
        make = nnx.vmap(Small, in_axes=(0,), out_axes=0)
        self.blocks = nnx.split_rngs(splits=3)(make)(rngs)

    def __call__(self, x):
        over = nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        x, aux = over(lambda x, block: block(x))(x, self.blocks)
        return x, aux.sum()


@pytest.mark.slow
def test_scanned_model_trains_and_is_frozen_layer_by_layer():
    model = Scanned(nnx.Rngs(0))
    step = nnx.jit(small_step)
    before = small_loss(model, X)
    for _ in range(5):
        step(model, X)
    model.eval()
    assert small_loss(model, X) < before
    bias = learned(model)["blocks"]["ffn"]["tiles"]["router"]["bias"]
    assert bias.shape == (3, 4)
    assert (np.abs(bias).max(axis=1) > 0).all()
    served = freeze(model, X)
    call = nnx.jit(lambda model, x: model(x)[0])
    np.testing.assert_array_equal(call(served, X), call(model, X))
    words = jax.tree.leaves(nnx.to_pure_dict(nnx.state(served, PackedWeights)))
    assert {leaf.shape[0] for leaf in words} == {3}
