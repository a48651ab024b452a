"""Means over seeds, how sure they are, and what they decide.

A difference is paired by seed. It lies on a side of zero where the 95% interval of its
mean does, and is undecided where the interval holds zero or there are fewer than two
seeds.

References:
    Student, 1908, "The Probable Error of a Mean", https://doi.org/10.2307/2331554.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

Side = Literal["below", "above", "undecided"]


class Interval(NamedTuple):
    """The mean of `n` values and the half width of its interval, infinite for one
    value.
    """

    mean: float
    half: float
    n: int

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    @property
    def side(self) -> Side:
        """The side of zero on which the whole interval lies."""
        return "below" if self.high < 0 else "above" if self.low > 0 else "undecided"


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
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
    from scipy.stats import t as student

    quantile = float(student.ppf((1 + confidence) / 2, n - 1))
    return Interval(mean, quantile * statistics.stdev(values) / math.sqrt(n), n)


def paired(arm: Mapping[int, float], base: Mapping[int, float]) -> Interval | None:
    """The interval of `arm - base` over the seeds that both have; None without any."""
    seeds = sorted(arm.keys() & base.keys())
    return interval([arm[s] - base[s] for s in seeds]) if seeds else None


def verdict(found: Interval | None, below: str, above: str, alone: str) -> str:
    """A difference in words.

    Args:
        below, above: what it means that the interval lies there.
        alone: what fewer than two seeds decide.
    """
    if found is None or found.n < 2:
        return alone
    return {"below": below, "above": above}.get(found.side, "undecided")


def spread(values: Sequence[float]) -> str:
    """`1.7590 ± 0.0084`, or one value alone."""
    found = interval(values)
    bound = f" ± {found.half:.4f}" if found.n > 1 else ""
    return f"{found.mean:.4f}{bound}"
