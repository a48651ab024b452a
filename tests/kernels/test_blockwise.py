"""The FFN block after block, as CPUs run it, against one batched product."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optimized import jit

from trix_kernels.tile_ffn import blockwise, xla
from trix_kernels.tile_ffn.blockwise import Rows
from trix_kernels.weights import Packed, pack

N, D, F = 3, 8, 4
RELU = functools.partial(jnp.maximum, 0)
GROUPS = [2, pytest.param(1, marks=pytest.mark.slow)]
# Runs of equal tiles, with tiles that have no block; the last of five may be unused.
TILES = {"each": [0, 1, 1, 2, 2], "one": [1] * 5, "first and last": [0, 0, 0, 2, 2]}
SLOWLY = [pytest.param(name, marks=pytest.mark.slow) for name in TILES]


def integers(rng, *shape, high=2):
    return jnp.asarray(rng.integers(1 - high, high, shape), jnp.float32)


def problem(groups=1, seed=0):
    """Integers and powers of two: every product and sum is exact, in any order."""
    rng = np.random.default_rng(seed)
    pairs = []
    for rows, features in ((D, F), (F, D)):
        scale = rng.choice([0.5, 1.0, 2.0], (N, groups, features))
        q = integers(rng, N, rows, features)
        pairs.append((q, jnp.asarray(scale, jnp.float32)))
    return integers(rng, 5, 2, D, high=4), tuple(pairs)


def batched(x, pairs, tiles):
    (up, up_scale), (down, down_scale) = (
        jax.tree.map(lambda leaf: leaf[tiles], pair) for pair in pairs
    )

    def product(x, q, scale):
        groups = scale.shape[1]
        parts = zip(jnp.split(x, groups, -1), jnp.split(q, groups, 1), strict=True)
        return sum(a @ b * scale[:, g, None] for g, (a, b) in enumerate(parts))

    return product(RELU(product(x, up, up_scale)), down, down_scale)


@pytest.mark.parametrize(
    ("features", "cores", "expected"),
    [(128, 2, 2), (128, 8, 2), (512, 8, 8), (512, 1, 1), (512, 6, 4), (96, 8, 1)],
)
def test_lanes_are_a_power_of_two_wide_enough_and_no_more_than_cores(
    features, cores, expected, monkeypatch
):
    monkeypatch.setattr(blockwise.os, "cpu_count", lambda: cores)
    assert blockwise.lanes(features) == expected


@pytest.mark.parametrize("lane", [64, 2])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("used", [5, 4])
@pytest.mark.parametrize("pattern", ["each", *SLOWLY[1:]])
def test_blocks_in_turn_equal_all_at_once(pattern, used, groups, lane, monkeypatch):
    monkeypatch.setattr(blockwise, "LANE", lane)
    monkeypatch.setattr(blockwise.os, "cpu_count", lambda: 8)
    assert blockwise.lanes(D) == (4 if lane == 2 else 1)
    x, pairs = problem(groups)
    tiles = jnp.asarray(TILES[pattern], jnp.int32)
    rows = Rows(x, tiles, jnp.asarray([used], jnp.int32))
    packed = tuple(pack(*pair) for pair in pairs)
    expected = batched(x, pairs, tiles)[:used]
    assert np.any(expected)
    for weights in (pairs, packed):
        y = jit(lambda r, w: blockwise.forward(r, w, (F, D), RELU))(rows, weights)
        np.testing.assert_array_equal(y[:used], expected)
        assert not y[used:].any()


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("pattern", ["first and last", *SLOWLY[:2]])
def test_gradients_equal_those_of_all_at_once(pattern, groups):
    x, pairs = problem(groups)
    dy = integers(np.random.default_rng(1), *x.shape)
    tiles = jnp.asarray(TILES[pattern], jnp.int32)

    def ours(x, pairs):
        return jnp.sum(xla.tile_ffn(x, *pairs, tiles, (F, D), RELU) * dy)

    def naive(x, pairs):
        return jnp.sum(batched(x, pairs, tiles) * dy)

    got = jit(jax.grad(ours, (0, 1)))(x, pairs)
    expected = jax.grad(naive, (0, 1))(x, pairs)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.any(a)


@pytest.mark.slow
def test_packed_weights_pass_the_gradient_to_the_input():
    x, pairs = problem()
    tiles = jnp.asarray(TILES["each"], jnp.int32)
    packed = tuple(pack(*pair) for pair in pairs)

    def total(x, w):
        return jnp.sum(xla.tile_ffn(x, *w, tiles, (F, D), RELU))

    got = jit(jax.grad(total))(x, packed)
    np.testing.assert_array_equal(got, jax.grad(total)(x, pairs))
    assert np.any(got)


@pytest.mark.slow
def test_vmapped_blocks_equal_each_alone_forward_and_backward():
    (x, pairs), (other, _) = problem(), problem(seed=2)
    tiles = jnp.asarray([TILES["each"], TILES["one"]], jnp.int32)
    both = jnp.stack([x, other])

    def value(x, tiles):
        y = xla.tile_ffn(x, *pairs, tiles, (F, D), RELU)
        return jnp.sum(y * y), y

    run = jit(jax.vmap(jax.grad(value, has_aux=True)))
    dx, y = run(both, tiles)
    for i in range(2):
        dx_alone, alone = jit(jax.grad(value, has_aux=True))(both[i], tiles[i])
        np.testing.assert_array_equal(y[i], alone)
        np.testing.assert_array_equal(dx[i], dx_alone)


def test_rows_layout_keeps_features_that_do_not_fill_a_byte():
    q = integers(np.random.default_rng(3), 2, 5, 7)
    held = pack(q, jnp.ones((2, 1, 1)))
    assert held.bits.shape == (2, 5, 2)
    x = jnp.eye(5)[None]
    y = xla.of_blocks(Packed(*held), jnp.zeros(1, jnp.int32), 7)[0]
    np.testing.assert_array_equal(x @ y, q[:1])


def test_gradients_of_a_tile_whose_blocks_stand_apart_are_summed():
    x, pairs = problem()
    weights, x = tuple(Packed(*pack(*pair)) for pair in pairs), x[:3]

    def grads(order):
        def loss(scales):
            both = [w._replace(scale=s) for w, s in zip(weights, scales, strict=True)]
            return (xla.tile_ffn(x[order], *both, tile[order], (F, D), RELU) ** 2).sum()

        return jax.grad(loss)([w.scale.astype(jnp.float32) for w in weights])

    tile = jnp.asarray([0, 0, 1])
    together, apart = grads(jnp.asarray([0, 1, 2])), grads(jnp.asarray([0, 2, 1]))
    for one, other in zip(together, apart, strict=True):
        np.testing.assert_array_equal(one, other)
        assert np.abs(one[0]).max() > 0
