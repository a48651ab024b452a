"""The FFN on whole weights and its one backward pass, against JAX's own derivatives of
the formula. Hopper's products are in `kernels/test_grouped_hopper.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trix_jax.dispatch import make_plan
from trix_jax.grouped_ffn import Inputs, Shapes, grouped_ffn, suits_batches
from trix_jax.nn.activations import ACTIVATIONS

T, K, D, N, F = 23, 2, 5, 4, 3
ROWS = 4  # of a block
DY = jnp.asarray(np.random.default_rng(9).normal(size=(T, D)), jnp.float32)
MASK = jnp.arange(T) % 5 != 0


def drawn(seed=0, dtype=jnp.float32):
    """Inputs, and tiles of which one takes no token."""
    chance = np.random.default_rng(seed)
    shapes = (T, D), (T, K), (N, D, F), (N, F, D)
    inputs = Inputs(*(jnp.asarray(chance.normal(size=s), jnp.float32) for s in shapes))
    tiles = np.stack([chance.permutation([0, 1, 3])[:K] for _ in range(T)])
    return inputs._replace(x=inputs.x.astype(dtype)), jnp.asarray(tiles)


def ours(inputs, tiles, act, mask=None, implementation="xla"):
    plan = make_plan(tiles, N, ROWS, mask)
    return grouped_ffn(inputs, plan, act, implementation, mask)


def formula(inputs, tiles, act, mask=None):
    x, gates, up, down = inputs
    x = x if mask is None else jnp.where(mask[:, None], x, 0)
    h = jnp.einsum("td,tkdf->tkf", x, up[tiles])
    y = jnp.einsum("tkf,tkfd,tk->td", act(h), down[tiles], gates)
    return y if mask is None else jnp.where(mask[:, None], y, 0)


def with_gradient(call, inputs, tiles, act, mask=None):
    y, pull = jax.vjp(lambda inputs: call(inputs, tiles, act, mask), inputs)
    return y, pull(DY)[0]


def assert_close(found, expected, rtol=2e-6):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        bound = rtol * np.abs(b).max()
        assert bound > 0
        np.testing.assert_allclose(a, b, rtol=0, atol=bound)


@pytest.mark.parametrize(
    ("act", "mask"),
    [
        pytest.param("gelu", MASK, id="gelu, masked"),
        pytest.param("relu2", None, id="relu2", marks=pytest.mark.slow),
        *(
            pytest.param(act, MASK, id=act, marks=pytest.mark.slow)
            for act in ACTIVATIONS
        ),
    ],
)
def test_output_and_gradients_are_those_of_the_formula(act, mask):
    inputs, tiles = drawn()
    if mask is not None:  # what masked tokens hold reaches nothing
        inputs = inputs._replace(x=jnp.where(mask[:, None], inputs.x, jnp.nan))
    found, expected = (
        jax.jit(
            functools.partial(with_gradient, call, act=ACTIVATIONS[act], mask=mask)
        )(inputs, tiles)
        for call in (ours, formula)
    )
    assert_close(found, expected)
    assert not np.asarray(found[1].up[2]).any()  # the tile without a token


DERIVED = {
    "jvp": lambda f, inputs: jax.jvp(f, (inputs,), (inputs._replace(x=inputs.x + 1),)),
    "remat": lambda f, inputs: jax.vjp(jax.checkpoint(f), inputs)[1](DY),
    "vmap": lambda f, inputs: jax.vmap(
        lambda x: jax.vjp(f, inputs._replace(x=x))[1](DY)
    )(jnp.stack([inputs.x, inputs.x + 1])),
    "scan": lambda f, inputs: jax.grad(
        lambda inputs: jnp.sum(
            jax.lax.scan(
                lambda x, _: (x + 0.1 * f(inputs._replace(x=x)), None),
                inputs.x,
                length=2,
            )[0]
            * DY
        )
    )(inputs),
    "gradient penalty": lambda f, inputs: jax.grad(
        lambda inputs: sum(jnp.sum(leaf**2) for leaf in jax.vjp(f, inputs)[1](DY)[0])
    )(inputs),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DERIVED)
def test_transformed_it_is_the_formula_transformed(name):
    inputs, tiles = drawn()
    found, expected = (
        jax.jit(
            lambda inputs, call=call: DERIVED[name](
                lambda i: call(i, tiles, jax.nn.silu, MASK), inputs
            )
        )(inputs)
        for call in (ours, formula)
    )
    assert_close(found, expected, rtol=2e-5)


@pytest.mark.parametrize(
    ("shapes", "suits"),
    [
        ((128, 32, 96, 2048 * 11), True),
        ((128, 32, 96, 11), False),  # a decoded token
        ((512, 128, 64, 4 * 8192), True),
        ((512, 128, 64, 8192), False),  # a copy of 256 kB for 64 rows of 2.5 kB
        ((1024, 1024, 16, 4 * 8192), False),
    ],
)
def test_weights_are_copied_into_batches_where_they_are_small_beside_rows(
    shapes, suits
):
    assert suits_batches(Shapes(jnp.float32, *shapes)) is suits
    assert not suits_batches(Shapes(jnp.float32, *shapes, activations="int8"))
