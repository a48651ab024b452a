"""`ternarize` against an oracle in numpy, its straight-through gradient, and the
schedules.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optimized import jit

from trix_jax import routing, ternary
from trix_jax.ternary import (
    TernaryConfig,
    expand_scale,
    flip_rate,
    hard_ternary,
    is_straight_through,
    ternarize,
    whole,
    zero_fraction,
)

jit_ternarize = jit(ternarize, static_argnums=1)
jit_hard = jit(hard_ternary, static_argnums=1)

EVERY_HARD_CONFIG = [
    TernaryConfig(rule=rule, granularity=granularity)
    for rule in ("absmean", "threshold", "fixed")
    for granularity in ("tile", "channel", "group")
]


def named(config):
    return f"{config.rule}-{config.granularity}-{config.threshold}"


def weights(*shape, seed=0, std=0.6):
    return np.random.default_rng(seed).normal(0, std, shape).astype(np.float32)


def oracle(w, config):
    """One matrix at a time, one scale at a time."""
    q, scales = np.zeros_like(w), []
    rows, columns = w.shape
    group = config.group_size if config.granularity == "group" else rows
    group = min(group, rows)
    step = columns if config.granularity == "tile" else 1
    if config.rule == "fixed":
        edge = config.threshold or 0.5
        return np.sign(w) * (np.abs(w) > edge), np.ones((1, 1), np.float32)
    for row in range(0, rows, group):
        for column in range(0, columns, step):
            part = np.s_[row : row + group, column : column + step]
            size = np.abs(w[part].astype(np.float64))
            if config.rule == "absmean":
                scale = np.float32(jnp.bfloat16(size.mean()))
                q[part] = np.clip(np.round(w[part] / scale), -1, 1)
            else:
                kept = size > (config.threshold or 0.7) * size.mean()
                scale = np.float32(jnp.bfloat16(size[kept].mean()))
                q[part] = np.sign(w[part]) * kept
            scales.append(scale)
    return q, np.asarray(scales).reshape(rows // group, -1)


@pytest.mark.parametrize(
    "config",
    [
        *EVERY_HARD_CONFIG,
        TernaryConfig(rule="threshold", threshold=1.2),
        TernaryConfig(rule="fixed", threshold=0.3),
    ],
    ids=named,
)
def test_ternarize_matches_the_oracle(config):
    w = weights(2, 256, 6)
    q, scale = jit_ternarize(w, config)
    assert set(np.unique(q)) == {-1, 0, 1}
    np.testing.assert_array_equal(scale, np.asarray(scale.astype(jnp.bfloat16)))
    for n in range(2):
        q_n, scale_n = oracle(w[n], config)
        np.testing.assert_array_equal(q[n], q_n)
        np.testing.assert_array_equal(scale[n], scale_n)
    hard = jit_hard(w, config)
    np.testing.assert_array_equal(hard.q, q)
    np.testing.assert_array_equal(hard.scale, scale)


@pytest.mark.parametrize(
    ("granularity", "rows", "expected"),
    [
        ("tile", 256, (3, 1, 1)),
        ("channel", 256, (3, 1, 5)),
        ("group", 256, (3, 2, 5)),
        ("group", 128, (3, 1, 5)),
        ("group", 100, (3, 1, 5)),
    ],
)
def test_scale_has_the_shape_of_its_granularity(granularity, rows, expected):
    config = TernaryConfig(granularity=granularity)
    assert jit_ternarize(weights(3, rows, 5), config).scale.shape == expected


def test_group_granularity_of_a_ragged_contraction_is_refused():
    with pytest.raises(ValueError, match=r"200 .* group_size=128"):
        ternarize(jnp.ones((200, 4)), TernaryConfig(granularity="group"))


@pytest.mark.parametrize("rule", ["absmean", "threshold", "fixed"])
def test_ternarize_leaves_real_zeros(rule):
    q, _ = jit_ternarize(weights(1, 64, 64), TernaryConfig(rule=rule))
    assert 0.2 < zero_fraction(q) < 0.8
    assert float(zero_fraction(q)) == pytest.approx(np.mean(np.asarray(q) == 0))


@pytest.mark.parametrize("granularity", ["tile", "channel", "group"])
@pytest.mark.parametrize("rule", ["absmean", "threshold"])
def test_gradient_is_that_of_the_latent_matmul(rule, granularity):
    config = TernaryConfig(rule=rule, granularity=granularity)
    x, w, dy = weights(5, 256), weights(256, 3, seed=1), weights(5, 3, seed=2)

    def quantized(w):
        q, scale = ternarize(w, config)
        half = 256 // scale.shape[0]
        y = sum(
            (x[:, g * half :][:, :half] @ q[g * half :][:half]) * scale[g, None]
            for g in range(scale.shape[0])
        )
        return jnp.sum(y * dy)

    gradient = jit(jax.grad(quantized))(w)
    # The scale is divided by and multiplied with: two roundings, and five for the sum
    # over tokens.
    exact = x.astype(np.float64).T @ dy
    bound = 8 * np.finfo(np.float32).eps * (np.abs(x).T @ np.abs(dy))
    assert np.all(np.abs(gradient - exact) <= bound)


def test_gradient_of_the_fixed_rule_stops_at_the_clip():
    w = jnp.asarray([[-1.6, -1.0, 0.0, 0.4, 1.4, 1.6]])
    gradient = jax.grad(lambda w: ternarize(w, TernaryConfig(rule="fixed")).q.sum())(w)
    np.testing.assert_array_equal(gradient, [[0, 1, 1, 1, 1, 0]])


@pytest.mark.parametrize("config", EVERY_HARD_CONFIG, ids=named)
def test_ternarize_agrees_with_and_without_jit(config):
    x, w = jnp.asarray(weights(4, 256)), jnp.asarray(weights(256, 8, seed=1))
    eager, jitted = ternarize(w, config), jit_ternarize(w, config)
    np.testing.assert_array_equal(eager.q, jitted.q)
    np.testing.assert_array_equal(eager.scale, jitted.scale)
    if eager.scale.shape[0] == 1:

        def product(w):
            return (x @ ternarize(w, config).q) * ternarize(w, config).scale

        np.testing.assert_array_equal(product(w), jit(product)(w))


@pytest.mark.parametrize(
    "rule",
    [
        "absmean",
        *(pytest.param(r, marks=pytest.mark.slow) for r in ("threshold", "fixed")),
    ],
)
def test_soft_staircase_tends_to_the_hard_one(rule):
    w = weights(1, 64, 32)
    hard = jit_hard(w, TernaryConfig(rule=rule)).q
    gaps = []
    for temperature in (1.0, 0.1, 1e-4):
        config = TernaryConfig(mode="soft", rule=rule, temperature=temperature)
        gaps.append(float(jnp.abs(jit_ternarize(w, config).q - hard).mean()))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-3


def test_soft_staircase_is_smooth_odd_and_has_three_levels():
    config = TernaryConfig(mode="soft", temperature=0.02)
    w = jnp.asarray([[-1.5, -0.2, 0.0, 0.2, 1.5, 1.0, -1.0]])  # mean |w| = 0.77
    q = jit_ternarize(w, config).q
    np.testing.assert_allclose(q, [[-1, 0, 0, 0, 1, 1, -1]], atol=1e-6)
    np.testing.assert_array_equal(jit_ternarize(-w, config).q, -q)


def test_soft_staircase_has_its_own_gradient():
    config = TernaryConfig(mode="soft", temperature=0.1)
    w = weights(1, 40)
    gradient = jit(jax.grad(lambda w: ternarize(w, config).q.sum()))(w)
    scale = np.float64(jnp.bfloat16(np.abs(w).mean()))

    def slope(x):
        return np.cosh(x / 0.1) ** -2 / 0.1

    u = w / scale
    expected = (slope(u - 0.5) + slope(u + 0.5)) / 2 / scale
    # float32 of u / temperature, up to 50 here, doubled by the square of cosh and again
    # by 1 - tanh^2.
    bound = 4 * 50 * np.finfo(np.float32).eps / 0.1 / scale
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=bound)


def test_progressive_starts_real_turns_soft_monotonically_and_ends_ternary():
    config = TernaryConfig(
        mode="progressive", full_precision_fraction=0.25, hard_fraction=0.75
    )
    w = weights(1, 32, 16)
    hard = jit_hard(w, config)

    def at(progress):
        return jit_ternarize(w, config, progress)

    for progress in (0.0, 0.2):
        q, scale = at(progress)
        np.testing.assert_allclose(q * scale, w, rtol=3e-7)
    gaps = [float(jnp.abs(at(p).q - hard.q).mean()) for p in (0.25, 0.4, 0.55, 0.7)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 2 * gaps[-1] > 0
    for progress in (0.75, 1.0):
        np.testing.assert_array_equal(at(progress).q, hard.q)


def test_ste_after_a_real_start_is_hard_from_the_fraction_on():
    config = TernaryConfig(full_precision_fraction=0.5)
    w = weights(1, 8, 8)
    q, scale = jit_ternarize(w, config, 0.49)
    np.testing.assert_allclose(q * scale, w, rtol=3e-7)
    hard = jit_hard(w, config).q
    np.testing.assert_array_equal(jit_ternarize(w, config, 0.5).q, hard)


def test_mode_none_keeps_the_weights():
    w = jnp.asarray(weights(2, 4, 3))
    q, scale = ternarize(w, TernaryConfig(mode="none"))
    np.testing.assert_array_equal(q, w)
    np.testing.assert_array_equal(scale, np.ones((2, 1, 1)))


def test_hard_ternary_of_mode_none_is_refused():
    with pytest.raises(ValueError, match="mode='none'"):
        hard_ternary(jnp.ones((4, 4)), TernaryConfig(mode="none"))


@pytest.mark.parametrize("mode", ["ste", "soft", "progressive"])
@pytest.mark.parametrize("rule", ["absmean", "threshold", "fixed"])
def test_all_zero_weights_give_zero_and_finite_gradients(rule, mode):
    config = TernaryConfig(mode=mode, rule=rule)

    def total(w):
        q, scale = ternarize(w, config)
        return jnp.sum(q * scale)

    w = jnp.zeros((4, 3))
    value, gradient = jit(jax.value_and_grad(total))(w)
    assert value == 0
    assert np.isfinite(gradient).all()


def test_flip_rate_counts_changed_values():
    before = jnp.asarray([[-1.0, 0.0, 1.0, 1.0]])
    after = jnp.asarray([[-1.0, 1.0, -1.0, 1.0]])
    assert flip_rate(before, after) == 0.5
    assert flip_rate(before, before) == 0


def test_expand_scale_repeats_each_group_over_its_rows():
    scale = jnp.asarray([[1.0, 2.0], [3.0, 4.0]])
    expected = [[1, 2], [1, 2], [1, 2], [3, 4], [3, 4], [3, 4]]
    np.testing.assert_array_equal(expand_scale(scale, 6), expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "hard"}, "mode must be one of .* Got 'hard'"),
        ({"rule": "median"}, "rule must be one of .* Got 'median'"),
        ({"granularity": "row"}, "granularity must be one of .* Got 'row'"),
        ({"group_size": 64}, "group_size must be at least 128.* Got 64"),
        ({"mode": "soft", "temperature": 0.0}, "temperature must be pos.* Got 0.0"),
        (
            {"mode": "progressive", "temperature": 0.01},
            "final_temperature <= temperature.* Got 0.05 and 0.01",
        ),
        (
            {"mode": "progressive", "final_temperature": 0.0},
            "0 < final_temperature.* Got 0.0",
        ),
        (
            {"mode": "progressive", "hard_fraction": 1.5},
            "hard_fraction <= 1.* Got 0.0 and 1.5",
        ),
        (
            {"mode": "progressive", "full_precision_fraction": 0.9},
            "full_precision_fraction.* Got 0.9 and 0.8",
        ),
        ({"full_precision_fraction": 1.5}, "full_precision_fraction.* Got 1.5"),
        ({"threshold": 0.7}, "threshold .* belongs to .* Got 0.7"),
        ({"rule": "fixed", "threshold": 0.0}, "threshold is positive.* Got 0.0"),
    ],
)
def test_config_with_a_bad_value_names_argument_rule_and_value(
    wrong, message, no_type_hook
):
    with pytest.raises(ValueError, match=message):
        TernaryConfig(**wrong)


@pytest.mark.parametrize(
    "right",
    [
        {"full_precision_fraction": 0.9},
        {"mode": "soft", "temperature": 0.04},
        {"mode": "none", "hard_fraction": 0.0, "full_precision_fraction": 0.5},
    ],
)
def test_a_config_is_not_refused_over_what_its_mode_does_not_read(right):
    TernaryConfig(**right)


@pytest.mark.parametrize("rule", ["absmean", "threshold"])
def test_a_nan_weight_leaves_its_tile_without_a_scale(rule):
    w = jnp.asarray(weights(2, 8, 3)).at[1, 2, 0].set(jnp.nan)
    q, scale = jit_ternarize(w, TernaryConfig(rule=rule))
    np.testing.assert_array_equal(np.isnan(scale[:, 0, 0]), [False, True])
    assert np.isfinite(q[0]).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("rule", ["absmean", "threshold"])
def test_scales_of_many_narrow_weights_are_those_of_float32(rule, dtype):
    config = TernaryConfig(rule=rule)
    w = jnp.asarray(weights(1, 512, 512), dtype)  # the sum of all is beyond float16
    q, scale = jit_ternarize(w, config)
    expected_q, expected = jit_ternarize(w.astype(jnp.float32), config)
    assert q.dtype == scale.dtype == w.dtype
    np.testing.assert_array_equal(scale.astype(jnp.float32), expected)
    assert np.mean(q.astype(jnp.float32) != expected_q) < 1e-3


@pytest.mark.parametrize("is_sign", [pytest.param(True, marks=pytest.mark.slow), False])
def test_second_derivatives_through_the_straight_path_are_those_of_what_it_follows(
    is_sign,
):
    x = jnp.asarray([0.3, -1.2, 0.7])
    v = jnp.asarray([1.0, 2.0, -1.0])

    def written_out(x):
        u = routing.rms_unit(x) if is_sign else x
        q = jnp.sign(x) if is_sign else jnp.round(x)
        return u + jax.lax.stop_gradient(q - u)

    def ours(x):
        if is_sign:
            return routing.signatures(x, "sign")
        return ternary.straight_through(jnp.round(x), x)

    def product(function):
        def loss(x):
            return jnp.sum(function(x) ** 3)

        return jax.jvp(jax.grad(loss), (x,), (v,))[1]

    expected = product(written_out)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(product(ours), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"rule": "threshold", "granularity": "channel"},
        {"full_precision_fraction": 0.7},
    ],
)
def test_whole_weights_send_gradients_to_latent_ones_as_they_are(how):
    config = TernaryConfig(**how)
    w, dw = jax.random.normal(jax.random.key(0), (2, 2, 8, 6))

    def of(latent):
        def pulled(w):
            return whole(ternarize(w, config, 0.5), latent(w))

        y, pull = jax.vjp(pulled, w)
        return y, pull(dw)[0]

    (y, direct), (expected, indirect) = of(lambda w: w), of(lambda w: None)
    assert is_straight_through(config)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(direct, dw)
    np.testing.assert_allclose(indirect, dw, rtol=1e-6)  # times and over the scale


@pytest.mark.parametrize("how", [{"mode": "soft"}, {"rule": "fixed"}, {"mode": "none"}])
def test_other_gradients_are_not_straight_through(how):
    assert not is_straight_through(TernaryConfig(**how))
