"""TriX layers in NNX models: modes, the routing state, a frozen model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from trix_jax import HierarchicalTriXFFN, SparseTriXFFN, balance
from trix_jax.interop.nnx import (
    Layer,
    PackedWeights,
    Routing,
    freeze,
    update_routing,
)

X = jax.random.normal(jax.random.key(0), (4, 6, 16))


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


def test_model_without_trix_layers_is_not_frozen():
    with pytest.raises(ValueError, match="Linear holds no ternary weights"):
        freeze(nnx.Linear(16, 2, rngs=nnx.Rngs(0)), X)


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
