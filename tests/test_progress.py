"""Schedules turn at the step that their share of training says."""

import jax
import jax.numpy as jnp
import pytest

from trix_jax import routing, ternary
from trix_jax.progress import reached
from trix_jax.ternary import TernaryConfig


@pytest.mark.parametrize("steps", [50, 100, 700, 5000, 10_000, 50_000, 1_000_000])
def test_schedules_turn_at_their_step_of_compiled_training(steps):
    """`step / steps` compiled is a product: 30 of 100 steps come out below 0.3."""

    numbers = [
        n for n in (5, 10, 15, 20, 29, 30, 40, 60, 80, 95) if n * steps % 100 == 0
    ]
    shares = [n / 100 for n in numbers]
    turned = jax.jit(
        lambda number: jnp.stack([reached(number / steps, s) for s in shares])
    )
    for i, number in enumerate(numbers):
        at = number * steps // 100
        assert turned(at)[i]
        assert not turned(at - 1)[i]


@pytest.mark.parametrize(
    ("config", "at"),
    [
        (TernaryConfig(full_precision_fraction=0.3), 30),
        (TernaryConfig(mode="progressive", hard_fraction=0.8), 80),
    ],
)
def test_weights_become_ternary_at_their_step(config, at):
    w = jax.random.normal(jax.random.key(0), (8, 8))
    q = jax.jit(lambda step: ternary.ternarize(w, config, step / 100).q)
    is_hard = [
        bool(jnp.isin(q(step), jnp.asarray([-1, 0, 1])).all()) for step in (at - 1, at)
    ]
    assert is_hard == [False, True]


def test_addresses_are_held_at_their_step():
    config = routing.RoutingConfig(hold_after=0.3)
    due = jax.jit(lambda step: routing.is_due(config, step / 100))
    assert [bool(due(step)) for step in (29, 30)] == [False, True]
