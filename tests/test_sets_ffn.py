"""Tiles that tokens choose in sets, against JAX's own derivatives of the sum over each
token's tiles, and in a layer.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trix_jax import RoutingConfig, SparseTriXFFN, TernaryConfig, freeze, ops
from trix_jax.grouped_ffn import Shapes
from trix_jax.hashing import places_in_sets, tile_sets
from trix_jax.nn import tiles as layer_tiles
from trix_jax.sets_ffn import Sets, default_reason, sets_ffn

T, D, N, F = 150, 6, 10, 3
OF = Sets(number=4, per_token=2, tiles_per_token=6)
DY = jnp.asarray(np.random.default_rng(9).normal(size=(T, D)), jnp.float32)
MASK = jnp.arange(T) % 5 != 0


def drawn(dtype=jnp.float32):
    """Inputs and sets, one of which no token is in and one of which most are in, by the
    first choice.
    """
    chance = np.random.default_rng(0)
    shapes = (T, D), (N, D, F), (N, F, D)
    x, *weights = (jnp.asarray(chance.normal(size=s), jnp.float32) for s in shapes)
    first = chance.choice(4, size=T, p=[0.7, 0.0, 0.1, 0.2])
    sets = np.stack([first, 4 + chance.choice(4, size=T)], axis=1)
    return (x.astype(dtype), *weights), jnp.asarray(sets, jnp.int32)


def ours(inputs, sets, act, mask=None):
    x, up, down = inputs
    return sets_ffn(x, sets, up, down, OF, act, "xla", mask)


def formula(inputs, sets, act, mask=None):
    del mask
    x, up, down = inputs
    tiles = jnp.asarray(tile_sets(N, 6, 4, 2))[sets].reshape(T, 6)
    h = jnp.einsum("td,tkdf->tkf", x, up[tiles])
    return jnp.einsum("tkf,tkfd->td", act(h), down[tiles])


def with_gradient(call, inputs, sets, act, mask=None):
    """The output and the gradient, nothing of masked tokens."""
    keep = jnp.ones(T, bool) if mask is None else mask

    def value(inputs):
        x, *weights = inputs
        y = call((jnp.where(keep[:, None], x, 0), *weights), sets, act, mask)
        return jnp.where(keep[:, None], y, 0)

    y, pull = jax.vjp(value, inputs)
    return y, pull(DY.astype(y.dtype))[0]


def assert_close(found, expected, rtol=2e-6):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        bound = rtol * np.abs(b).max()
        assert bound > 0
        np.testing.assert_allclose(a, b, rtol=0, atol=bound)


@pytest.mark.parametrize("at_a_time", [1, 16])
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
def test_output_and_gradients_are_those_of_the_formula(mask, at_a_time, monkeypatch):
    monkeypatch.setattr("trix_kernels.tile_ffn.sets.BLOCKS", at_a_time)
    inputs, sets = drawn()
    if mask is not None:  # what masked tokens hold reaches nothing
        inputs = jnp.where(mask[:, None], inputs[0], jnp.nan), *inputs[1:]
    found, expected = (
        jax.jit(functools.partial(with_gradient, call, act=jax.nn.gelu, mask=mask))(
            inputs, sets
        )
        for call in (ours, formula)
    )
    assert_close(found, expected)


def test_in_bfloat16_products_are_rounded_and_weights_get_float32_sums():
    inputs, sets = drawn(jnp.bfloat16)
    found = with_gradient(ours, inputs, sets, jax.nn.gelu)
    wide = inputs[0].astype(jnp.float32), *inputs[1:]
    expected = with_gradient(formula, wide, sets, jax.nn.gelu)
    y, (dx, dup, ddown) = found
    assert {y.dtype, dx.dtype} == {jnp.dtype(jnp.bfloat16)}
    assert {dup.dtype, ddown.dtype} == {jnp.dtype(jnp.float32)}
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(
            a.astype(jnp.float32), b, rtol=0, atol=2e-2 * np.abs(b).max()
        )


def test_weights_of_sets_are_those_of_one_wide_tile():
    (_, up, down), _ = drawn()
    sets = tile_sets(N, 6, 4, 2)
    places = places_in_sets(sets, N)
    members = ops.Members(jnp.asarray(sets), jnp.asarray(places))
    wide_up, wide_down = ops.join(up, down, members)
    for s in range(len(sets)):
        np.testing.assert_array_equal(wide_up[s], np.hstack(up[sets[s]]))
        np.testing.assert_array_equal(wide_down[s], np.vstack(down[sets[s]]))
    grad = jax.grad(lambda up: (ops.join(up, down, members)[0] ** 2).sum())(up)
    times = np.bincount(sets.reshape(-1))
    np.testing.assert_allclose(grad, 2 * up * times[:, None, None], rtol=1e-6)


DERIVED = {
    "jvp": lambda f, i: jax.jvp(f, (i,), ((i[0] + 1, *i[1:]),)),
    "remat": lambda f, i: jax.vjp(jax.checkpoint(f), i)[1](DY),
    "vmap": lambda f, i: jax.vmap(lambda x: jax.vjp(f, (x, *i[1:]))[1](DY))(
        jnp.stack([i[0], i[0] + 1])
    ),
    "gradient penalty": lambda f, i: jax.grad(
        lambda i: sum(jnp.sum(leaf**2) for leaf in jax.vjp(f, i)[1](DY)[0])
    )(i),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DERIVED)
def test_transformed_it_is_the_formula_transformed(name):
    inputs, sets = drawn()
    found, expected = (
        jax.jit(
            lambda inputs, call=call: DERIVED[name](
                lambda i: call(i, sets, jax.nn.silu), inputs
            )
        )(inputs)
        for call in (ours, formula)
    )
    assert_close(found, expected, rtol=2e-5)


def test_layers_take_sets_where_their_weights_are_no_more_than_tokens(monkeypatch):
    shapes = Shapes(jnp.float32, 128, 32, 96, 11 * 2048)
    of = Sets(number=64, per_token=1, tiles_per_token=11)
    assert default_reason(shapes, of) is None
    fewer = shapes._replace(assignments=11 * 2047)
    assert "64 * 32 numbers" in default_reason(fewer, of)
    rounded = shapes._replace(activations="int8")
    assert default_reason(rounded, of).startswith("Int8")
    monkeypatch.setattr(ops, "platform", lambda: "gpu")
    assert default_reason(shapes, of) == "Sets were measured on CPUs alone."


def layer_and_input(tokens, dtype=None, per_token=2, **how):
    layer = SparseTriXFFN(
        16,
        num_tiles=8,
        expansion=2,
        tiles_per_token=4,
        routing=RoutingConfig(source="hash", hash_sets=4, sets_per_token=per_token),
        dtype=dtype,
        **how,
    )
    x = jax.random.normal(jax.random.key(0), (tokens, 16))
    ids = jax.random.randint(jax.random.key(1), (tokens,), 0, 50)
    return layer, layer.init(jax.random.key(2), x, token_ids=ids), x, ids


@pytest.mark.parametrize(
    ("mode", "per_token"), [("ste", 1), ("ste", 2), ("soft", 1), ("none", 4)]
)
def test_a_layer_computes_the_sum_over_its_tiles(mode, per_token, monkeypatch):
    how = {"per_token": per_token, "ternary": TernaryConfig(mode=mode)}
    layer, variables, x, ids = layer_and_input(64, **how)

    @jax.jit
    def run(params, x):
        def loss(params, x):
            given = {**variables, "params": params}
            y, info, _ = layer.apply(given, x, token_ids=ids, progress=0.5)
            return (y**2).sum(), (y, info.tiles)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)

    taken = []

    def watched(*args):
        taken.append(args)
        return sets_ffn(*args)

    monkeypatch.setattr(layer_tiles.sets_ffn, "sets_ffn", watched)
    found = run(variables["params"], x)
    assert len(taken) == 1
    monkeypatch.setattr(layer_tiles.sets_ffn, "default_reason", lambda *_: "not now")
    run.clear_cache()
    expected = run(variables["params"], x)
    assert len(taken) == 1
    np.testing.assert_array_equal(found[0][1][1], expected[0][1][1])
    assert_close((found[0][1][0], found[1]), (expected[0][1][0], expected[1]), 5e-6)


@pytest.mark.parametrize("tokens", [5, 64])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_a_frozen_layer_is_the_trained_one_bit_for_bit(tokens, dtype):
    layer, variables, x, ids = layer_and_input(tokens, dtype)
    trained = jax.jit(layer.apply)(variables, x, token_ids=ids)[0]
    frozen = freeze(layer, variables, x, token_ids=ids)
    y = jax.jit(layer.apply)(frozen, x, token_ids=ids)[0]
    np.testing.assert_array_equal(y, trained)
