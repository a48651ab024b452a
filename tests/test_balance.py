"""Selection biases that give every tile its share of the tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trix_jax import balance, routing

histogram = jax.jit(balance.margin_histogram)
BIN = balance.REACH / balance.CHOSEN


def scores_of(tokens, tiles, seed=0):
    """Scores with a preference that all tokens share, as signatures of one model have
    it.
    """
    rng = np.random.default_rng(seed)
    return jnp.asarray(
        rng.normal(size=(tokens, tiles)) + 4 * rng.normal(size=(1, tiles)), jnp.float32
    )


def middle(index):
    return (index + 0.5) * BIN - balance.REACH


def test_margins_of_a_hand_table():
    scores = jnp.asarray([[0.50, 0.30, 0.10]])
    tiles = routing.select_tiles(scores, 1)
    # Tile 0 stays chosen until it falls by 0.2 behind tile 1; the others must pass 0.5.
    expected = np.array([-0.2, 0.2, 0.4])
    hist = np.asarray(histogram(scores, tiles))
    np.testing.assert_array_equal(hist.sum(axis=1), 1)
    np.testing.assert_allclose(middle(hist.argmax(axis=1)), expected, atol=BIN / 2)


@pytest.mark.parametrize(
    "k", [2, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 5))]
)
def test_loads_are_the_counts_ties_and_all_tiles_included(k):
    scores = jnp.round(scores_of(200, 5))  # whole numbers tie often
    tiles = routing.select_tiles(scores, k)
    hist = histogram(scores, tiles)
    np.testing.assert_array_equal(hist.sum(axis=1), 200)
    np.testing.assert_array_equal(
        balance.loads(hist), routing.count_tiles(tiles, scores.shape[-1])
    )


def test_closed_tiles_and_nan_are_not_counted():
    scores = scores_of(20, 4).at[:5, 2].set(-jnp.inf).at[7].set(jnp.nan)
    hist = histogram(scores, routing.select_tiles(scores, 1))
    np.testing.assert_array_equal(hist.sum(axis=1), [19, 19, 14, 19])
    assert np.isfinite(hist).all()


def test_margins_of_open_tiles_alone_are_those_of_all_with_the_others_closed():
    scores, tiles = scores_of(50, 8), jnp.argsort(scores_of(50, 8, 1))[:, :4]
    some = jnp.take_along_axis(scores, tiles, axis=-1)
    columns = routing.select_tiles(some, 2)
    found = jax.jit(balance.margin_histogram, static_argnums=4)(
        some, columns, None, tiles, 8
    )
    closed = jnp.full_like(scores, -jnp.inf)
    closed = closed.at[jnp.arange(50)[:, None], tiles].set(some)
    chosen = jnp.take_along_axis(tiles, columns, axis=-1)
    np.testing.assert_array_equal(found, histogram(closed, chosen))
    assert found.sum() == 50 * 4


@pytest.mark.parametrize("k", [1, 3])
def test_repeated_steps_make_the_loads_even(k):
    scores, bias = scores_of(2000, 8), jnp.zeros(8)
    step = jax.jit(
        lambda bias: balance.step_bias(
            bias,
            balance.margin_histogram(
                scores + bias[None], routing.select_tiles(scores + bias[None], k)
            ),
            0.5,
        )
    )
    before = routing.count_tiles(routing.select_tiles(scores, k), 8)
    assert routing.dead_tiles(before) > 0
    for _ in range(60):
        bias = step(bias)
    after = routing.count_tiles(routing.select_tiles(scores + bias[None], k), 8)
    assert routing.max_load(after) < 1.1
    np.testing.assert_allclose(bias.mean(), 0, atol=1e-5)


def test_histograms_of_parts_add_up_to_that_of_the_whole():
    scores = scores_of(300, 6)
    tiles = routing.select_tiles(scores, 2)
    parts = sum(
        histogram(scores[i : i + 100], tiles[i : i + 100]) for i in (0, 100, 200)
    )
    np.testing.assert_array_equal(parts, histogram(scores, tiles))


def test_a_step_interpolates_inside_a_bin():
    hist = np.zeros((2, balance.BINS), np.float32)
    hist[0, balance.CHOSEN - 1] = 4  # has 4 tokens, all within one bin of losing them
    hist[1, balance.CHOSEN] = 8  # has none, 8 within one bin of choosing it
    bias = balance.step_bias(jnp.zeros(2), jnp.asarray(hist), 1.0)
    # The mean load is 2: half of the bin below 0 against a quarter of the bin above it,
    # centred.
    np.testing.assert_allclose(bias, [-0.375 * BIN, 0.375 * BIN], rtol=1e-5)


@pytest.mark.parametrize("load", [0.0, 7.0])
def test_tiles_alike_in_all_keep_their_bias(load):
    hist = jnp.full((3, balance.BINS), load)
    np.testing.assert_allclose(
        balance.step_bias(jnp.zeros(3), hist, 1.0), np.zeros(3), atol=1e-6
    )
