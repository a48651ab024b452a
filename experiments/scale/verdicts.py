"""What the runs say of the original's hypothesis and of its three reasons.

A pair of arms is compared by the difference over the seeds that both have. "Supported"
means that every measure of a pair lies below zero with its 95 % interval, "not
supported" that one lies above, "undecided" all else; one seed decides nothing, nor does
a pair of which a seed diverged.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from trix_jax.lm.experiment.results import Result
from trix_jax.lm.experiment.stats import Interval, paired

Verdict = Literal["supported", "not supported", "undecided"]
Runs = Mapping[str, Sequence[Result]]  # by experiment


class Claim(NamedTuple):
    """That an arm is below another one.

    Attributes:
        pairs: arm and other; the first is that of the original's layer, and decides.
        measures: fields of a result, all of which must be lower.
    """

    name: str
    by: str
    pairs: tuple[tuple[str, str], ...]
    measures: tuple[str, ...] = ("val_loss",)


HYPOTHESIS = Claim(
    "Lower loss than a dense FFN of equal parameters",
    "equal parameters",
    (("lookup", "dense"), ("sparse", "dense-sparse")),
)
REASONS = (
    Claim(
        "Routing specializes tiles",
        "random routes",
        (("lookup", "lookup-random"), ("sparse", "sparse-random")),
    ),
    Claim(
        "Sparse compute goes where it is needed",
        "equal compute",
        (("lookup", "dense-active"), ("sparse", "dense-sparse-active")),
    ),
    Claim(
        "Ternary weights regularize",
        "float tiles",
        (("lookup", "lookup-float"), ("sparse", "sparse-float")),
        ("val_loss", "train_val_gap"),
    ),
)


def difference(
    results: Sequence[Result], arm: str, other: str, measure: str = "val_loss"
) -> Interval | None:
    """The arm less the other, paired by seed; None where no seed is in both."""
    sides = [
        {
            one.seed: getattr(one, measure)
            for one in results
            if one.arm == name and one.is_finite and getattr(one, measure) is not None
        }
        for name in (arm, other)
    ]
    return paired(*sides)


def of_pair(
    results: Sequence[Result], pair: tuple[str, str], measures: Sequence[str]
) -> Verdict:
    """What an experiment says of a pair of arms."""
    if any(one.arm in pair and not one.is_finite for one in results):
        return "undecided"
    found = [difference(results, *pair, measure) for measure in measures]
    sides = [one.side if one and one.n > 1 else "undecided" for one in found]
    if "above" in sides:
        return "not supported"
    return "supported" if set(sides) == {"below"} else "undecided"


def of_claim(runs: Runs, claim: Claim) -> Verdict:
    """What all experiments say of the claim's first pair: those that decide must agree."""
    verdicts = {of_pair(r, claim.pairs[0], claim.measures) for r in runs.values()}
    decided = verdicts - {"undecided"}
    return decided.pop() if len(decided) == 1 else "undecided"
