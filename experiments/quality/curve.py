"""The dense curve, and an arm's place on it.

    curve(width) = tuned dense loss, non-increasing, linear in log(width) between the
    widths that were trained
    equivalent(loss) = the narrowest width with curve(width) <= loss

An arm above the curve's left end is "below" the narrowest dense LM, one under its right
end "above" the widest: nothing is extrapolated.

References:
    Efron and Tibshirani, 1993, "An Introduction to the Bootstrap", sections 6.5 and 9.4
    (bootstrapping residuals). Student, 1908, "The Probable Error of a Mean",
    https://doi.org/10.2307/2331554.
"""

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

Losses = Mapping[int, Sequence[float]]  # width to the losses of its seeds
BELOW, ABOVE = 0.0, math.inf  # widths that stand for "off the curve"


class Estimate(NamedTuple):
    """A number, such as an equivalent dense width, with the 95% interval of a bootstrap
    over seeds.
    """

    value: float
    low: float
    high: float


class Doubling(NamedTuple):
    """What one step of width is worth.

    Attributes:
        gain: loss of `narrow` less that of `wide`.
        error: standard error of the gain, from the seeds' pooled deviation.
        is_needed: whether a loss of some arm falls in this step.
    """

    narrow: int
    wide: int
    gain: float
    error: float
    is_needed: bool

    @property
    def resolution(self) -> float:
        """Gain over its standard error."""
        return self.gain / self.error if self.error > 0 else math.nan


def monotone(losses: Sequence[float]) -> np.ndarray:
    """The non-increasing sequence nearest in least squares (pool adjacent violators)."""
    blocks: list[list[float]] = []  # sum and length
    for value in losses:
        blocks.append([value, 1])
        while len(blocks) > 1 and _mean(blocks[-2]) < _mean(blocks[-1]):
            total, length = blocks.pop()
            blocks[-1] = [blocks[-1][0] + total, blocks[-1][1] + length]
    return np.concatenate([[_mean(b)] * int(b[1]) for b in blocks])


def equivalent(widths: Sequence[int], losses: Sequence[float], loss: float) -> float:
    """The narrowest dense width that reaches `loss`; `BELOW` where the narrowest LM is
    better already, `ABOVE` where the widest is not as good.
    """
    curve, logs = monotone(losses), np.log2(widths)
    if loss > curve[0]:
        return BELOW
    if loss < curve[-1]:
        return ABOVE
    at = int(np.argmax(curve <= loss))  # the first width that reaches it
    if at == 0 or curve[at] == loss:
        return float(widths[at])
    share = (curve[at - 1] - loss) / (curve[at - 1] - curve[at])
    return float(2 ** (logs[at - 1] + share * (logs[at] - logs[at - 1])))


def neighbours(widths: Sequence[int], width: float) -> Sequence[int]:
    """The widths that a place on the curve is read off: one on it, or off its end."""
    at = int(np.searchsorted(widths, width))
    is_between = 0 < at < len(widths) and widths[at] != width
    return widths[at - 1 : at + 1] if is_between else [widths[min(at, len(widths) - 1)]]


def loss_at(
    widths: Sequence[int], losses: Sequence[float], width: float
) -> float | None:
    """The curve's loss at a width; None outside the widths that were trained, but for 1%
    of rounding.
    """
    if widths[-1] < width <= 1.01 * widths[-1]:
        width = widths[-1]
    if not widths[0] <= width <= widths[-1]:
        return None
    return float(np.interp(math.log2(width), np.log2(widths), monotone(losses)))


def equivalent_interval(
    dense: Losses, arm: Sequence[float], draws: int = 4000
) -> Estimate:
    """An arm's equivalent width; seeds of the arm and of every dense width are drawn
    anew together.
    """
    found = tuple((width, tuple(dense[width])) for width in sorted(dense))
    return _equivalent_interval(found, tuple(arm), draws)


@functools.lru_cache(maxsize=256)  # pages ask for a place again and again
def _equivalent_interval(
    dense: tuple[tuple[int, tuple[float, ...]], ...],
    arm: tuple[float, ...],
    draws: int,
) -> Estimate:
    widths = [width for width, _ in dense]
    groups = [losses for _, losses in dense]
    means = [float(np.mean(g)) for g in [*groups, arm]]
    drawn = [
        equivalent(widths, m[:-1], m[-1])
        for m in bootstrap_means([*groups, arm], draws)
    ]
    low, high = np.quantile(drawn, (0.025, 0.975), method="inverted_cdf")
    return Estimate(equivalent(widths, means[:-1], means[-1]), float(low), float(high))


def behind(
    dense: Losses, arm: Sequence[float], width: float, draws: int = 4000
) -> Estimate | None:
    """An arm's loss less the curve's at `width`, with its 95% interval; None where the
    curve does not reach.
    """
    widths = sorted(dense)
    groups = [*(dense[w] for w in widths), arm]

    def difference(means):
        there = loss_at(widths, means[:-1], width)
        return None if there is None else means[-1] - there

    middle = difference([float(np.mean(g)) for g in groups])
    if middle is None:
        return None
    drawn = [difference(means) for means in bootstrap_means(groups, draws)]
    low, high = np.quantile(np.array(drawn, float), (0.025, 0.975))
    return Estimate(middle, float(low), float(high))


def doublings(dense: Losses, arms: Sequence[float]) -> list[Doubling]:
    """What every step of width is worth, and which steps the arms' losses need."""
    widths = sorted(dense)
    deviation = pooled_deviation(list(dense.values()))
    means = {w: float(np.mean(dense[w])) for w in widths}
    steps = []
    for narrow, wide in pairwise(widths):
        inverse = 1 / len(dense[narrow]) + 1 / len(dense[wide])
        needed = any(means[wide] <= loss <= means[narrow] for loss in arms)
        error = deviation * math.sqrt(inverse)
        gain = means[narrow] - means[wide]
        steps.append(Doubling(narrow, wide, gain, error, needed))
    return steps


def carries(steps: Sequence[Doubling], least: float = 3.0) -> bool:
    """Whether every doubling from the first to the last that an arm falls in is worth
    at least three standard errors; False where no arm falls on the curve.
    """
    needed = [i for i, step in enumerate(steps) if step.is_needed]
    if not needed:
        return False
    inside = steps[needed[0] : needed[-1] + 1]
    return all(step.resolution >= least for step in inside)


def resolution_text(step: Doubling) -> str:
    return "unknown" if math.isnan(step.resolution) else f"{step.resolution:.1f}"


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
    makes their variance that of the sample, and by Student's t over the normal quantile
    at 97.5 %, for the `f = sum(n - 1)` degrees of freedom that they have. A group of one
    value is drawn like the others.
    """
    residuals = np.concatenate(
        [
            (np.asarray(g) - np.mean(g)) * math.sqrt(len(g) / (len(g) - 1))
            for g in groups
            if len(g) > 1
        ]
        or [np.zeros(1)]
    )
    freedom = sum(len(g) - 1 for g in groups)
    if freedom:
        from scipy.stats import norm as normal
        from scipy.stats import t as student

        residuals = residuals * (student.ppf(0.975, freedom) / normal.ppf(0.975))
    rng = np.random.default_rng(seed)
    drawn = [rng.choice(residuals, (draws, len(g))).mean(axis=1) for g in groups]
    return np.stack([np.mean(g) + d for g, d in zip(groups, drawn, strict=True)], 1)


def _mean(block: list[float]) -> float:
    return block[0] / block[1]
