"""Which run of a setting comes next: a function of the results so far.

An arm's learning rate is swept by factors of two with the first seed, until the best
rate has a worse one on either side; further seeds train at the best.
"""

import shlex
from collections.abc import Iterator, Sequence

from experiments.quality.arms import Arm
from experiments.quality.design import SEEDS, Setting
from trix_jax.lm.experiment.results import Result
from trix_jax.lm.experiment.spec import Spec
from trix_jax.lm.experiment.tuning import at_rate, best_rate, sweep

PATCHED = "experiments.quality.patched"


def runs_to_come(setting: Setting, done: Sequence[Result]) -> Iterator[Spec]:
    """What can be trained now, in the order of the design. A run that waits for the
    loss of another, to know its rate, is not among them.
    """
    sweeping = set()
    for step in setting.order:
        arms = setting.groups[step.group]
        for spec in _sweep(setting, arms, done, is_first_look=step.seeds == 0):
            sweeping.add(spec.arm)
            yield spec
        for seed in SEEDS[: step.seeds]:
            for arm in arms:
                source = arm.rate_of or arm.name
                losses = sweep(done, source, SEEDS[0])
                rate = None if source in sweeping else best_rate(losses)
                if rate and seed not in at_rate(done, arm.name, rate):
                    yield spec_of(setting, arm, rate, seed)
    for name, rate, seeds in setting.also:
        for seed in SEEDS[:seeds]:
            if seed not in at_rate(done, name, rate):
                yield spec_of(setting, setting.arm(name), rate, seed)


def next_rate(losses: dict[float, float], start: float) -> float | None:
    """The rate to try next, by factors of two: `start`, then the neighbours of the best
    so far; None once both have been run and are worse, so that the optimum is inside.
    """
    best = best_rate(losses)
    if best is None or start not in losses:
        return start
    return next((r for r in (best / 2, best * 2) if r not in losses), None)


def spec_of(setting: Setting, arm: Arm, rate: float, seed: int) -> Spec:
    """A run, without its data."""
    more = f"--train.learning-rate {rate:g} --seed {seed}"
    flags = (setting.preset, *shlex.split(f"{arm.flags} {setting.flags} {more}"))
    patch = (PATCHED, arm.patch) if arm.patch else ()
    return Spec(setting.name, "", arm.name, seed, 0, flags, "", rate, patch)


def _sweep(
    setting: Setting, arms: Sequence[Arm], done: Sequence[Result], is_first_look: bool
) -> Iterator[Spec]:
    """Breadth first: all arms at their first rate, then at their second."""
    specs = []
    for arm in arms:
        losses = sweep(done, arm.name, SEEDS[0])
        if arm.rate_of is None and not (is_first_look and losses):
            if rate := next_rate(losses, arm.start):
                spec = spec_of(setting, arm, rate, SEEDS[0])
                specs.append((len(losses), spec))
    yield from (spec for _, spec in sorted(specs, key=lambda pair: pair[0]))
