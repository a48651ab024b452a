"""Arms at their best learning rate, from the results of a sweep over rates and seeds."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from trix_jax.lm.experiment.results import Result


class Tuned(NamedTuple):
    """An arm at its best rate.

    Attributes:
        runs: seed to run.
        is_bracketed: whether the rates a factor of two away have been run, with this
            arm, and are worse. A rate that another arm chose needs them too.
        diverged: seeds that have no loss at that rate.
    """

    arm: str
    rate: float
    runs: dict[int, Result]
    is_bracketed: bool
    diverged: tuple[int, ...] = ()

    @property
    def one(self) -> Result:
        """Any run: sizes and costs are the same in all."""
        return next(iter(self.runs.values()))

    @property
    def losses(self) -> dict[int, float]:
        """Seed to validation loss."""
        return {seed: run.val_loss for seed, run in self.runs.items()}


def sweep(results: Iterable[Result], arm: str, seed: int) -> dict[float, float]:
    """Rate to validation loss, of one arm and seed."""
    return {
        r.learning_rate: r.val_loss for r in results if r.arm == arm and r.seed == seed
    }


def at_rate(results: Iterable[Result], arm: str, rate: float) -> dict[int, Result]:
    """Seed to run, of one arm and rate."""
    return {r.seed: r for r in results if r.arm == arm and r.learning_rate == rate}


def best_rate(losses: dict[float, float]) -> float | None:
    """The rate of the lowest loss, of two the lower rate; None without one."""
    return min(losses, key=lambda rate: (losses[rate], rate), default=None)


def tuned(results: Sequence[Result], arm: str, like: str | None = None) -> Tuned | None:
    """An arm at the best rate of its sweep, or of the arm `like`; None without runs.

    Raises:
        ValueError: the results are of several samplers.
    """
    if len(samplers := {r.sampler for r in results}) > 1:
        raise ValueError(
            f"results must be of one sampler to be compared (`by_sampler`). Got {sorted(samplers)}."
        )
    seed = min((r.seed for r in results), default=0)
    losses = sweep(results, like or arm, seed)
    rate = best_rate({r: loss for r, loss in losses.items() if math.isfinite(loss)})
    if rate is None:
        return None
    every = at_rate(results, arm, rate)
    runs = {s: r for s, r in every.items() if r.is_finite}
    diverged = tuple(sorted(every.keys() - runs.keys()))
    own = sweep(results, arm, seed)
    is_bracketed = {rate / 2, rate * 2} <= set(own) and best_rate(own) == rate
    return Tuned(arm, rate, runs, is_bracketed, diverged) if runs else None
