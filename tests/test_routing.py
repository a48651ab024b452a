"""Routing as pure functions against hand tables, its losses, and its state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trix_jax import RoutingConfig, matching, routing

# Compiling is what takes the time here, and no test in this file asks for equal bits
# across programs.


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def floats(*rows):
    return jnp.asarray(rows, jnp.float32)


# Signatures and scores -------------------------------------------------------------------------------------------------


def test_signatures_of_a_hand_table():
    sums = floats([3.0, -4.0, 0.0, 0.0])
    unit = routing.signatures(sums, "sum")
    np.testing.assert_allclose(unit, [[1.2, -1.6, 0, 0]], rtol=1e-6)
    np.testing.assert_array_equal(routing.signatures(sums, "sign"), [[1, -1, 0, 0]])


def test_sign_signature_has_the_gradient_of_the_unit_one():
    sums, dy = normal(3, 5), normal(3, 5, seed=1)
    sign, unit = (
        jax.grad(lambda s, kind=kind: jnp.sum(routing.signatures(s, kind) * dy))(sums)
        for kind in ("sign", "sum")
    )
    np.testing.assert_allclose(sign, unit, rtol=1e-6)
    assert np.abs(unit).max() > 0.01


def test_match_is_the_cosine_times_root_d_for_unit_signatures():
    h, signature = normal(6, 8), routing.signatures(normal(4, 8, seed=1))
    h64, s64 = np.float64(h), np.float64(signature)
    cosine = (h64 / np.linalg.norm(h64, axis=1, keepdims=True)) @ (
        s64 / np.linalg.norm(s64, axis=1, keepdims=True)
    ).T
    # The 1e-6 inside rms_unit moves the result by about 5e-7 relatively.
    np.testing.assert_allclose(
        routing.match(h, signature, 2.0), 2 * 8**0.5 * cosine, rtol=4e-6, atol=4e-6
    )


@given(st.integers(0, 2**16), st.sampled_from(["sum", "sign"]))
def test_scaling_signatures_and_tokens_changes_no_route(seed, kind):
    chance = np.random.default_rng(seed)
    # At width 8 one set of six in 17 has two equal rows of signs, where tokens tie.
    h, sums = (jnp.asarray(chance.normal(size=(n, 32)), jnp.float32) for n in (32, 6))
    up_h, up_sums = (
        x * jnp.asarray(2.0 ** chance.uniform(-4, 4, (len(x), 1)), jnp.float32)
        for x in (h, sums)
    )
    score = routing.match(h, routing.signatures(sums, kind))
    best = jax.lax.top_k(score, 3)[0]
    # The 1e-6 inside rms_unit moves a score of a row scaled by 2^-4 by about 1e-4.
    is_clear = (best[:, :2] - best[:, 1:] > 1e-3).all(axis=1)
    assert is_clear.sum() > 24
    again = routing.match(up_h, routing.signatures(up_sums, kind))
    routes = [np.asarray(routing.select_tiles(s, 2))[is_clear] for s in (score, again)]
    np.testing.assert_array_equal(*routes)


# Selection -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([1, 3, 3, 2], [1, 2, 3]),
        ([5, 5, 5, 5], [0, 1, 2]),
        ([-0.0, 0.0, -0.0, 0.0], [0, 1, 2]),
        ([0, -1, 7, 7], [2, 3, 0]),
        ([-np.inf, 2, -np.inf, 1], [1, 3, 0]),
    ],
)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_select_tiles_puts_the_best_first_and_ties_to_the_lowest_index(
    scores, expected, k
):
    chosen = routing.select_tiles(floats(scores), k)
    np.testing.assert_array_equal(chosen, [expected[:k]])


@pytest.mark.parametrize("k", [0, 5])
def test_select_tiles_of_too_many_or_none_is_refused(k):
    with pytest.raises(ValueError, match=f"tiles_per_token={k} .* num_tiles=4"):
        routing.select_tiles(jnp.zeros((1, 4)), k)


@pytest.mark.parametrize("k", [1, 2])
def test_nan_scores_give_tiles_in_range(k):
    scores = jnp.full((3, 4), jnp.nan).at[1, 2].set(1.0)
    chosen = np.asarray(routing.select_tiles(scores, k))
    assert ((chosen >= 0) & (chosen < 4)).all()


def test_cluster_of_inverts_members():
    members = jnp.asarray([[4, 0], [1, 5], [3, 2]])
    np.testing.assert_array_equal(routing.cluster_of(members), [0, 1, 2, 2, 0, 1])


def test_open_tiles_are_those_of_the_chosen_clusters():
    members = jnp.asarray([[4, 0], [1, 5], [3, 2]])
    once = routing.open_tiles(jnp.asarray([[1], [0]]), members)
    np.testing.assert_array_equal(once, [[0, 1, 0, 0, 0, 1], [1, 0, 0, 0, 1, 0]])
    twice = routing.open_tiles(jnp.asarray([[1, 2], [0, 1]]), members)
    np.testing.assert_array_equal(twice, [[0, 1, 1, 1, 0, 1], [1, 1, 0, 0, 1, 1]])


# Scores of open tiles alone -------------------------------------------------------------------------------------------


MEMBERS = jnp.asarray([[7, 0], [5, 2], [1, 4], [3, 6]])


def masked(scores, clusters, k):
    allowed = routing.open_tiles(clusters, MEMBERS)
    return routing.select_tiles(jnp.where(allowed, scores, -jnp.inf), k)


@pytest.mark.parametrize("top", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 40])
def test_scores_inside_clusters_are_those_of_all_tiles(tokens, top):
    # Integers: sums are exact in any order, so that the scores are equal bit for bit.
    rng = np.random.default_rng(0)
    h, signature = (
        jnp.asarray(rng.integers(-3, 4, shape), jnp.float32)
        for shape in ((tokens, 16), (8, 16))
    )
    clusters = jnp.argsort(normal(tokens, 4), axis=-1)[:, :top]
    scores, tiles = jax.jit(routing.match_inside)(h, signature, clusters, MEMBERS)
    everywhere = jax.jit(routing.match)(h, signature)
    np.testing.assert_array_equal(
        scores, jnp.take_along_axis(everywhere, tiles, axis=-1)
    )
    np.testing.assert_array_equal(tiles, MEMBERS[clusters].reshape(tokens, -1))


@pytest.mark.parametrize(
    "k", [2, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 3))]
)
@pytest.mark.parametrize("kind", ["apart", "ties", "nan", "infinite"])
@pytest.mark.parametrize("few", [0, 8], ids=["sorted", "one by one"])
def test_selection_among_candidates_is_the_masked_selection(kind, k, few, monkeypatch):
    monkeypatch.setattr(matching, "FEW", few)
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(60, 8)).astype(np.float32)
    if kind == "ties":
        scores = np.round(scores)
    elif kind == "nan":
        scores[::2, 3] = np.nan
        scores[::3, 5] = np.nan
    elif kind == "infinite":
        scores[::2] = -np.inf
    scores = jnp.asarray(scores)
    clusters = jnp.argsort(normal(60, 4, seed=2), axis=-1)[:, :2]
    tiles = MEMBERS[clusters].reshape(60, -1)
    columns = routing.select_among(
        jnp.take_along_axis(scores, tiles, axis=-1), tiles, k
    )
    chosen = jnp.take_along_axis(tiles, columns, axis=-1)
    if kind == "infinite":  # masked, nothing tells such a tile from a closed one
        assert (jnp.sort(columns, axis=-1)[:, 1:] > jnp.sort(columns)[:, :-1]).all()
        chosen, scores = chosen[1::2], scores[1::2]
        clusters = clusters[1::2]
    np.testing.assert_array_equal(chosen, masked(scores, clusters, k))


# Gates -----------------------------------------------------------------------------------------------------------------


def test_gates_of_a_hand_table():
    scores = jnp.log(floats([1, 2, 4, 1]))
    tiles = jnp.asarray([[2, 1]])
    allowed = jnp.asarray([[False, True, True, False]])

    def gate(kind, *rest):
        return routing.gates(scores, tiles, kind, *rest)

    np.testing.assert_array_equal(gate("none"), [[1, 1]])
    np.testing.assert_allclose(gate("sigmoid"), [[4 / 5, 2 / 3]], rtol=1e-6)
    np.testing.assert_allclose(gate("softmax"), [[4 * 4 / 8, 4 * 2 / 8]], rtol=1e-6)
    np.testing.assert_allclose(gate("softmax", allowed), [[8 / 6, 4 / 6]], rtol=1e-6)
    np.testing.assert_allclose(gate("renormalized"), [[8 / 6, 4 / 6]], rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "k", "flows"),
    [
        ("none", 2, False),
        ("sigmoid", 1, True),
        ("softmax", 1, True),
        ("renormalized", 1, False),
        ("renormalized", 2, True),
    ],
)
def test_gate_lets_the_task_reach_the_scores(kind, k, flows):
    scores = normal(5, 4)
    tiles = routing.select_tiles(scores, k)
    weight = normal(5, k, seed=1)

    def total(s):
        return jnp.sum(routing.gates(s, tiles, kind) * weight)

    assert bool(np.abs(jax.grad(total)(scores)).max() > 1e-3) == flows


# Losses ----------------------------------------------------------------------------------------------------------------


def test_balance_loss_is_zero_at_even_use_and_n_minus_one_at_collapse():
    even = routing.balance_loss(jnp.zeros((6, 4)), jnp.full(4, 0.25))
    assert even == pytest.approx(0, abs=1e-6)
    collapsed = routing.balance_loss(
        jnp.zeros((6, 4)).at[:, 2].set(50.0), jnp.zeros(4).at[2].set(1.0)
    )
    assert collapsed == pytest.approx(3, abs=1e-6)


@pytest.mark.parametrize("mask", [None, jnp.arange(40) % 3 > 0])
def test_balance_loss_over_open_tiles_is_that_of_all_with_the_others_closed(mask):
    scores, share = normal(40, 8), jax.nn.softmax(normal(1, 8)[0])
    clusters = jnp.argsort(normal(40, 4, seed=2), axis=-1)[:, :2]
    tiles = MEMBERS[clusters].reshape(40, -1)

    def over_open(scores):
        own = jnp.take_along_axis(scores, tiles, axis=-1)
        return routing.balance_loss(own, share, mask, tiles=tiles)

    def over_all(scores):
        closed = jnp.where(routing.open_tiles(clusters, MEMBERS), scores, -jnp.inf)
        return routing.balance_loss(closed, share, mask)

    found, wanted = (jax.value_and_grad(f)(scores) for f in (over_open, over_all))
    np.testing.assert_allclose(found[0], wanted[0], atol=1e-6)
    np.testing.assert_allclose(found[1], wanted[1], atol=1e-7)
    assert np.abs(wanted[1]).max() > 1e-3


def test_balance_loss_pushes_the_crowded_tile_down():
    share = floats([0.7, 0.1, 0.1, 0.1])[0]
    gradient = jax.grad(lambda s: routing.balance_loss(s, share))(jnp.zeros((5, 4)))
    assert (gradient[:, 0] > 1e-3).all()
    assert (gradient[:, 1:] < -1e-4).all()


def test_diversity_loss_is_zero_for_orthogonal_and_one_for_equal_signatures():
    assert routing.diversity_loss(jnp.eye(4)) == 0
    assert routing.diversity_loss(jnp.ones((4, 3))) == pytest.approx(1, abs=1e-5)
    assert routing.diversity_loss(jnp.ones((1, 3))) == 0


@pytest.mark.parametrize("shape", [(40, 8), (8, 40), (2, 1)])
def test_diversity_loss_is_the_mean_squared_cosine_of_few_tiles_and_of_many(shape):
    signature = np.asarray(normal(*shape) + 0.3, np.float64)
    unit = signature / np.linalg.norm(signature, axis=1, keepdims=True)
    cosines = (unit @ unit.T)[~np.eye(len(unit), dtype=bool)]
    loss = routing.diversity_loss(jnp.float32(signature))
    np.testing.assert_allclose(loss, np.mean(cosines**2), rtol=1e-4)


def test_neither_loss_nor_diagnostic_holds_all_pairs_of_many_tiles():
    signature = normal(2500, 4)
    loss = jax.jit(jax.value_and_grad(routing.diversity_loss))
    cosine = jax.jit(routing.signature_cosine)
    for function in (loss, cosine):
        compiled = function.lower(signature).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 0.8 * 4 * 2500**2
    unit = np.asarray(signature / jnp.linalg.norm(signature, axis=1, keepdims=True))
    expected = (np.abs(unit @ unit.T).sum() - 2500) / (2500 * 2499)
    np.testing.assert_allclose(cosine(signature), expected, rtol=1e-4)


# Diagnostics -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "entropy", "max_load", "dead"),
    [
        ([5, 5, 5, 5], np.log(4), 1, 0),
        ([8, 0, 0, 0], 0, 4, 3),
        ([4, 4, 0, 0], np.log(2), 2, 2),
        # The threshold is a tenth of the mean load of 10: 1 is alive, 0 is dead.
        ([30, 9, 1, 0], -sum(p * np.log(p) for p in (0.75, 0.225, 0.025)), 3, 1),
    ],
)
def test_usage_diagnostics_of_hand_tables(counts, entropy, max_load, dead):
    counts = floats(counts)[0]
    assert routing.usage_entropy(counts) == pytest.approx(entropy, rel=1e-6, abs=1e-7)
    assert routing.max_load(counts) == pytest.approx(max_load, rel=1e-6)
    assert routing.dead_tiles(counts) == dead


def test_count_tiles_counts_tiles_without_tokens_too():
    counts = routing.count_tiles(jnp.asarray([[3, 1], [3, 0]]), 5)
    np.testing.assert_array_equal(counts, [1, 1, 0, 2, 0])


def test_tie_rate_is_the_share_of_tokens_with_two_best():
    scores = floats([1, 1, 0], [2, 1, 1], [3, 3, 3], [0, 1, 2])
    assert routing.tie_rate(scores) == 0.5


def test_stability_ignores_the_order_of_a_tokens_tiles():
    before = jnp.asarray([[0, 1], [2, 3], [0, 2]])
    after = jnp.asarray([[1, 0], [2, 1], [3, 1]])
    assert routing.stability(before, after) == 0.5
    assert routing.stability(before, before) == 1
    masked = jnp.full((5, 2), -1)
    padded = (jnp.concatenate([tiles, masked]) for tiles in (before, after))
    assert routing.stability(*padded) == 0.5
    assert routing.stability(masked, masked) == 0


def test_signature_cosine_of_opposite_tiles_is_one():
    signature = floats([1, 0], [-1, 0])
    assert routing.signature_cosine(signature) == pytest.approx(1, abs=1e-5)
    assert routing.signature_cosine(jnp.eye(3)) == 0


# Config ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"source": "router"}, "source must be one of .* Got 'router'"),
        ({"signature": "mean"}, "signature must be one of .* Got 'mean'"),
        ({"gate": "relu"}, "gate must be one of .* Got 'relu'"),
        ({"balance_weight": -0.1}, "balance_weight must not be negative. Got -0.1"),
        ({"diversity_weight": -1.0}, "diversity_weight must not be .* Got -1.0"),
        ({"score_scale": 0.0}, "score_scale must be positive. Got 0.0"),
    ],
)
def test_config_with_a_bad_value_names_argument_rule_and_value(
    wrong, message, no_type_hook
):
    with pytest.raises(ValueError, match=message):
        RoutingConfig(**wrong)
