"""Medians of functions that run in turn, and the sizes that are measured.

The functions of a comparison run one after the other, round after round, so that other
work on the machine meets all of them. A ratio is the median of the rounds' own ratios:
of neighbours in time, which a slow minute slows alike.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from trix_jax.typing import Array

Case = tuple[Any, ...]  # a function and its arguments


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured: T tokens of width D, N tiles of F.

    Attributes:
        small: further (T, N), where a layer may lose.
        many: (T, N) for flat beside hierarchical routing.
        beyond_cache: (T, N) whose unpacked weights exceed the last cache.
        dense_bytes: the dense FFN of equal parameters is left out above this size.
        grow: token counts, tile counts and widths of `growth`.
        grow_from: the T, N and D that stand still meanwhile.
        train_tiles: most tiles whose training is measured as they grow.
    """

    tokens: int = 8192
    width: int = 512
    tiles: int = 64
    tile_width: int = 128
    small: tuple[tuple[int, int], ...] = ((1024, 64), (64, 64))
    many: tuple[tuple[int, int], ...] = ((8192, 256), (8192, 1024), (8192, 4096))
    beyond_cache: tuple[int, int] = (1024, 256)
    dense_bytes: int = 2**29
    grow: tuple[tuple[int, ...], ...] = (
        (512, 1024, 2048, 4096, 8192),
        (16, 64, 256, 1024, 4096),
        (128, 256, 512, 1024),
    )
    grow_from: tuple[int, int, int] = (2048, 64, 256)
    train_tiles: int = 1024


def interleaved(cases: dict[str, Case], rounds: int) -> dict[str, list[float]]:
    """Seconds of each case in each round, run in turn, compiled before."""
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for call, *args in cases.values():
        jax.block_until_ready(call(*args))
    for _ in range(rounds):
        for name, (call, *args) in cases.items():
            began = time.perf_counter()
            jax.block_until_ready(call(*args))
            taken[name].append(time.perf_counter() - began)
    return taken


def ratio(taken: dict[str, list[float]], other: str, ours: str) -> float:
    """Median of `time of other / time of ours` over the rounds: greater is better."""
    pairs = zip(taken[other], taken[ours], strict=True)
    return statistics.median(a / b for a, b in pairs)


def spread(taken: dict[str, list[float]], other: str, ours: str) -> list[float]:
    """The least and the greatest of what `ratio` takes the median of."""
    pairs = zip(taken[other], taken[ours], strict=True)
    found = sorted(a / b for a, b in pairs)
    return [found[0], found[-1]]


def tokens(count: int, width: int, dtype: Any = jnp.float32) -> Array:
    """Random tokens."""
    return jax.random.normal(jax.random.key(3), (count, width), dtype)


def forward(model: Any) -> Callable:
    """The jitted output of a model, without what it says about its routing."""
    return jax.jit(lambda variables, x: _output(model.apply(variables, x)))


def train(model: Any) -> Callable:
    """The jitted gradient of a model's parameters, ternarization included."""

    def loss(params, rest, x):
        return jnp.sum(jnp.square(_output(model.apply({**rest, "params": params}, x))))

    return jax.jit(jax.grad(loss))


def _output(result: Any) -> Array:
    return result[0] if isinstance(result, tuple) else result
