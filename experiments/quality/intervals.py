"""Means with their uncertainty, over seeds.

References:
    Student, 1908, "The Probable Error of a Mean". Efron and Tibshirani, 1993, "An
    Introduction to the Bootstrap", sections 6.5 and 9.4 (bootstrapping residuals).
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student


class Interval(NamedTuple):
    """A mean of `n` values and the half width of its 95% interval; infinite for one
    value.
    """

    mean: float
    half: float
    n: int

    @property
    def excludes_zero(self) -> bool:
        return abs(self.mean) > self.half


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Computes `mean +- t(n - 1) * s / sqrt(n)`.

    Raises:
        ValueError: no values.
    """
    n = len(values)
    if not n:
        raise ValueError("values must not be empty. Got none.")
    mean = statistics.fmean(values)
    if n == 1:
        return Interval(mean, math.inf, 1)
    quantile = float(student.ppf((1 + confidence) / 2, n - 1))
    return Interval(mean, quantile * statistics.stdev(values) / math.sqrt(n), n)


def paired(arm: Mapping[int, float], base: Mapping[int, float]) -> Interval | None:
    """The interval of `arm - base` over the seeds that both have; None without any."""
    seeds = sorted(arm.keys() & base.keys())
    return t_interval([arm[s] - base[s] for s in seeds]) if seeds else None


def pooled_deviation(groups: Sequence[Sequence[float]]) -> float:
    """Standard deviation inside the groups, one for all: `sqrt(sum of squares / degrees
    of freedom)`; NaN where no group has two values.
    """
    squares = sum(sum((v - statistics.fmean(g)) ** 2 for v in g) for g in groups)
    freedom = sum(len(g) - 1 for g in groups)
    return math.sqrt(squares / freedom) if freedom else math.nan


def bootstrap_means(
    groups: Sequence[Sequence[float]], draws: int = 4000, seed: int = 0
) -> np.ndarray:
    """Means of all groups, `[draws, groups]`, their seeds drawn anew.

    With three seeds a group's own values say too little about their spread, so the
    residuals of all groups are drawn from, each inflated by `sqrt(n / (n - 1))`, which
    makes their variance that of the sample. A group of one value is drawn like the
    others.
    """
    residuals = np.concatenate(
        [
            (np.asarray(g) - np.mean(g)) * math.sqrt(len(g) / (len(g) - 1))
            for g in groups
            if len(g) > 1
        ]
        or [np.zeros(1)]
    )
    rng = np.random.default_rng(seed)
    drawn = [rng.choice(residuals, (draws, len(g))).mean(axis=1) for g in groups]
    return np.stack([np.mean(g) + d for g, d in zip(groups, drawn, strict=True)], 1)
