"""Calls that other people's code makes: variables from numpy, eager loops, float16 with
int8 activations, ids of padding that are no ids, a default device.
"""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trix_jax import (
    HierarchicalTriXFFN,
    SparseLookupFFN,
    SparseTriXFFN,
    TernaryConfig,
    TransformerConfig,
    TransformerLM,
    TriXLinear,
    freeze,
    routing,
    widen,
)
from trix_jax.nn import steering
from trix_kernels import device

D = 16
X = jax.random.normal(jax.random.key(0), (6, D))
LAYERS = {
    "sparse": SparseTriXFFN(D, num_tiles=4),
    "hierarchical": HierarchicalTriXFFN(D, num_tiles=4, tiles_per_cluster=2),
    "lookup": SparseLookupFFN(D, num_tiles=4, tiles_per_cluster=2, grid_size=2),
    "linear": TriXLinear(D),
}


def output(returned):
    return returned if isinstance(returned, jax.Array) else returned[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_numpy_variables_are_taken_under_jit(name, no_type_hook):
    """As `flax.serialization` and `jax.device_get` give them."""
    layer = LAYERS[name]
    variables = jax.jit(layer.init)(jax.random.key(1), X)
    packed = freeze(layer, variables, X)
    for given in (variables, packed, widen(packed)):
        host = jax.device_get(given)
        expected = output(jax.jit(layer.apply)(given, X))
        found = jax.jit(lambda x, host=host: output(layer.apply(host, x)))(X)
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "most"), [("sparse", 60), ("hierarchical", 75)])
def test_a_first_call_outside_of_jit_compiles_few_programs(name, most, caplog):
    """They were over 130 each, one for each operation."""
    jax.clear_caches()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        LAYERS[name].init(jax.random.key(1), X)
    said = [r.getMessage() for r in caplog.records]
    assert 0 < sum("Finished XLA compilation" in line for line in said) < most


@pytest.mark.parametrize("scale", [jnp.float32(2), 2.0])
def test_scores_take_a_scale_that_is_traced_or_an_array(scale):
    h, signature = X, X[:3]
    once = routing.match(h, signature)
    found = jax.jit(routing.match)(h, signature, scale)
    np.testing.assert_allclose(routing.match(h, signature, scale), 2 * once, rtol=1e-6)
    np.testing.assert_allclose(found, 2 * once, rtol=1e-6)


@pytest.mark.slow
def test_eager_calls_compile_once(caplog):
    layer = LAYERS["sparse"]
    variables = layer.init(jax.random.key(1), X)

    def loss(params):
        return (layer.apply(variables | {"params": params}, X)[0] ** 2).sum()

    def once():
        layer.apply(variables, X)
        jax.grad(loss)(variables["params"])

    once()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        once()
    said = [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()]
    assert not [line for line in said if "branch" in line or "forward" in line]
    assert len(said) <= 2, said


@pytest.mark.slow
def test_int8_activations_of_float16_have_the_gradients_of_float32():
    layer = SparseTriXFFN(D, num_tiles=4, ternary=TernaryConfig(activations="int8"))
    x = (0.01 * X).astype(jnp.float16)
    variables = jax.jit(layer.init)(jax.random.key(1), x)

    @jax.jit
    def gradients(params, x):
        def loss(params, x):
            y = layer.apply(variables | {"params": params}, x)[0]
            return y.astype(jnp.float32).sum()

        return jax.grad(loss, (0, 1))(params, x)

    found = gradients(variables["params"], x)
    expected = gradients(variables["params"], x.astype(jnp.float32))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.float32(a), np.float32(b)
        assert np.abs(a - b).max() < 0.01 * np.abs(b).max()


@pytest.mark.slow
def test_orders_of_bytes_are_those_of_bools(no_type_hook):
    layer = LAYERS["sparse"]
    variables = jax.jit(layer.init)(jax.random.key(1), X)
    (where,) = steering.layer_states(variables["routing"])
    for mask in (np.ones(6, np.uint8), jnp.ones(6, jnp.uint8), jnp.ones(6, bool)):
        left = steering.forbid(variables, where, 2, mask)
        assert not (layer.apply(left, X)[1].tiles == 2).any()


@pytest.mark.slow
@pytest.mark.parametrize("padding", [-100, 64])
def test_padding_ids_outside_the_vocabulary_leave_gradients_as_they_are(padding):
    config = TransformerConfig(
        vocab_size=64, context=8, d_model=D, n_layers=1, n_heads=2, ffn="sparse",
        num_tiles=4,
    )  # fmt: skip
    model = TransformerLM(config)
    tokens = jax.random.randint(jax.random.key(0), (2, 8), 0, 64)
    mask = jnp.arange(8)[None] < jnp.array([[8], [5]])
    variables = jax.jit(model.init)(jax.random.key(1), tokens)

    @jax.jit
    def gradients(tokens):
        def loss(params):
            given = variables | {"params": params}
            logits = model.apply(given, tokens, mask=mask)[0]
            return (jnp.where(mask[..., None], logits, 0) ** 2).sum()

        return jax.grad(loss)(variables["params"])

    expected, found = (
        gradients(jnp.where(mask, tokens, other)) for other in (0, padding)
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_the_default_device_is_the_one_that_was_set():
    other = jax.devices()[3]
    assert device.default_device() == jax.devices()[0]
    with jax.default_device(other):
        assert device.default_device() == other
    with jax.default_device("cpu"):
        assert device.default_device() == jax.devices("cpu")[0]


def test_a_gate_may_be_a_list(no_type_hook):
    layer = TriXLinear(4, num_tiles=2)
    variables = layer.init(jax.random.key(0), X)
    gate = [[0.0, 1.0]] * 6
    y = layer.apply(variables, X, gate=gate)
    np.testing.assert_array_equal(y, layer.apply(variables, X, gate=np.array(gate)))
    assert (y[:, :2] == 0).all()
