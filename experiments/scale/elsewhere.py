"""What `experiments/quality` says of the same claims, on other text at tuned rates.

Arms are at the best rate of their sweep, and differences are paired by seed. A dense FFN
counts as equal within `NEAR` of the size that the claim asks for. A larger one that is
ahead decides nothing, nor does a smaller one that is behind.
"""

from collections.abc import Sequence
from typing import NamedTuple

from experiments.quality.lookups import SETTINGS as MORE
from experiments.quality.run import RESULTS
from experiments.scale.verdicts import (
    HYPOTHESIS,
    REASONS,
    Claim,
    Verdict,
    difference,
    of_pair,
)
from trix_jax.lm.experiment import results
from trix_jax.lm.experiment.results import Result, twin_widths
from trix_jax.lm.experiment.stats import Interval
from trix_jax.lm.experiment.tuning import at_rate, tuned

PLACES = {
    "shakespeare-char": "TinyShakespeare, AdamW",
    "shakespeare-char-muon": "TinyShakespeare, Muon",
    "english-256-muon": "English, width 256, Muon",
}
SHAKESPEARE = "shakespeare-char"
LOOKUP, PLANE, SPARSE = (
    "lookup-16",
    "lookup-16-grid-1-embedding",
    "sparse-16-top4-embedding",
)
NOTHING, FOUR = "lookup-16-nothing", "lookup-16-four-grid-1-embedding"
# The names of E1 to E4.
WORDS = {PLANE: "lookup-best", SPARSE: "sparse", LOOKUP: "lookup"}
NEAR = 0.1


class Evidence(NamedTuple):
    """A pair of arms of a setting.

    Attributes:
        share: of the dense FFN's width in that which the claim asks for; None where the
            other arm is no dense FFN.
    """

    setting: str
    arm: str
    other: str
    found: dict[str, Interval | None]
    share: float | None
    verdict: Verdict

    @property
    def place(self) -> str:
        return PLACES[self.setting]

    @property
    def pair(self) -> str:
        own, other = self.arm, self.other.replace(self.arm, WORDS[self.arm])
        return f"{WORDS[own]} less {other}"


EQUAL = {HYPOTHESIS.name: "parameters", REASONS[1].name: "compute"}
# The lookup's are of E1's question, those of the sparse tiles of its reasons.
PAIRS = {
    HYPOTHESIS.name: (
        (SHAKESPEARE, LOOKUP, "dense-64"),
        (SHAKESPEARE, LOOKUP, "dense-32"),
        (SHAKESPEARE, PLANE, "dense-32"),
    ),
    REASONS[0].name: (
        (SHAKESPEARE, SPARSE, f"{SPARSE}-random"),
        ("shakespeare-char-muon", SPARSE, f"{SPARSE}-random"),
    ),
    REASONS[1].name: (
        (SHAKESPEARE, SPARSE, "dense-128"),
        ("shakespeare-char-muon", SPARSE, "dense-128"),
        ("english-256-muon", SPARSE, "dense-256"),
    ),
    REASONS[2].name: (
        (SHAKESPEARE, SPARSE, f"{SPARSE}-float"),
        ("shakespeare-char-muon", SPARSE, f"{SPARSE}-float"),
    ),
}


def of_claim(claim: Claim) -> list[Evidence]:
    """What is known of a claim."""
    return [evidence(claim, read(s), s, *pair) for s, *pair in PAIRS[claim.name]]


def verdict_of(claim: Claim) -> Verdict:
    """What the pairs say together: those that decide must agree."""
    decided = {one.verdict for one in of_claim(claim)} - {"undecided"}
    return decided.pop() if len(decided) == 1 else "undecided"


def evidence(
    claim: Claim, runs: Sequence[Result], setting: str, arm: str, other: str
) -> Evidence:
    """A pair of arms at their best rates."""
    both = [*best(runs, arm), *best(runs, other)]
    found = {m: difference(both, arm, other, m) for m in claim.measures}
    verdict, share = of_pair(both, (arm, other), claim.measures), None
    if cost := EQUAL.get(claim.name):
        share = share_of(both, arm, other, cost)
        verdict = fair(verdict, share)
    return Evidence(setting, arm, other, found, share, verdict)


def best(runs: Sequence[Result], arm: str) -> list[Result]:
    """The runs of an arm at the best rate of its sweep, diverged ones too.

    Raises:
        ValueError: there are none.
    """
    found = tuned(runs, arm)
    if found is None:
        raise ValueError(f"arm={arm!r} must have a run. Got none.")
    return list(at_rate(runs, arm, found.rate).values())


def share_of(runs: Sequence[Result], arm: str, dense: str, cost: str) -> float:
    """The width of a dense FFN over that with as much of `cost` as the arm."""
    one, other = (next(r for r in runs if r.arm == name) for name in (arm, dense))
    assert other.width
    return other.width / twin_widths(one, other)[cost]


def fair(verdict: Verdict, share: float) -> Verdict:
    """The verdict, or none where the dense FFN's size may be what decides."""
    if share > 1 + NEAR and verdict == "not supported":
        return "undecided"
    if share < 1 - NEAR and verdict == "supported":
        return "undecided"
    return verdict


def read(setting: str) -> list[Result]:
    """The runs of a setting."""
    return results.read(RESULTS / f"{setting}.json")


def lookups_run() -> dict[str, int]:
    """How many runs the settings of many lookups a token have."""
    return {name: len(read(name)) for name in MORE}
