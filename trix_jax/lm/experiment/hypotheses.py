"""The hypotheses of the original's plan, as data, and what runs say of them."""

from collections.abc import Sequence
from typing import NamedTuple

from trix_jax.lm.experiment.results import Result, twin
from trix_jax.lm.experiment.stats import Interval, paired, verdict

ROUTES = ("hash", "random")  # that no weights choose
# Arms beside which another stands: ends of their names, or whole names of those on the
# tiles of `sparse`.
CONTROLS = (*ROUTES, "learned", "float")

Found = dict[tuple[str, str], list[Result]]  # by size and arm


class Hypothesis(NamedTuple):
    """A claim about TriX arms, each beside another run of its size: the claim is that
    TriX is lower.

    Attributes:
        field: of a result, what is compared.
        cost: whose dense twin the other is; none for controls alone.
        within: share by which the twin's cost may be off.
        controls: what the other may be besides: `lookup-float` beside `lookup`.
        absent: why nothing is compared.
    """

    claim: str
    measured: str
    absent: str
    field: str = "val_loss"
    cost: str = ""
    within: float = 0.02
    controls: tuple[str, ...] = ()


HYPOTHESES = (
    Hypothesis(
        "Lower perplexity than a parameter-equivalent dense FFN",
        "validation loss, TriX minus its parameter-equal twin",
        "no dense twin with as many parameters has finished",
        cost="params_total",
    ),
    Hypothesis(
        "Emergent routing specializes by input",
        "validation loss, routing by weights minus a control on the same tiles",
        "needs an arm and the same with -hash or -random, which route the same tiles",
        controls=ROUTES,
    ),
    Hypothesis(
        "Sparse computation puts capacity where it is needed",
        "validation loss, TriX minus the dense FFN of its active compute",
        "no dense twin with as many multiply-accumulates has finished",
        cost="ffn_active",
        within=0.1,
    ),
    Hypothesis(
        "Ternary structure regularizes",
        "train-validation gap, TriX minus the same with float weights, or its parameter-equal twin",
        "neither an arm with -float nor a dense twin with as many parameters has finished",
        field="train_val_gap",
        cost="params_total",
        controls=("float",),
    ),
)


def by_arm(results: Sequence[Result]) -> Found:
    """Runs by size and arm, in the order they come."""
    found: Found = {}
    for result in results:
        found.setdefault((result.size or "", result.arm), []).append(result)
    return found


def answer(hypothesis: Hypothesis, found: Found) -> str:
    """What the runs say of a hypothesis: a verdict a pair of arms, and one of all."""
    rows, verdicts = [], set()
    for size, arm, other in _pairs(hypothesis, found):
        values = (
            {run.seed: getattr(run, hypothesis.field) for run in found[size, name]}
            for name in (arm, other)
        )
        if difference := paired(*values):
            words = verdict(difference, "supported", "not supported", "undecided")
            verdicts.add(words)
            text = f"{difference.mean:+.4f}{_bounds(difference)}: {words}"
            rows.append(f"  - {size}, {arm} against {other}: {text}")
    if not rows:
        return f"**{hypothesis.claim}: undecided.** Not measured here: {hypothesis.absent}."
    word = verdicts.pop() if len(verdicts) == 1 else "mixed"
    head = f"**{hypothesis.claim}: {word}.** Measured: {hypothesis.measured} (95% interval over seeds)."
    return "\n".join([head, *rows])


def _pairs(hypothesis: Hypothesis, found: Found) -> list[tuple[str, str, str]]:
    """Size, arm, and what it is compared with."""
    pairs, everyone = [], [runs[0] for runs in found.values()]
    for (size, arm), runs in found.items():
        if runs[0].is_dense or is_control(arm):
            continue
        for control in hypothesis.controls:
            names = (f"{arm}-{control}", *([control] if arm == "sparse" else []))
            there = [one for one in names if (size, one) in found]
            pairs += [
                (size, arm, one)
                for one in there
                if found[size, one][0].val_tokens == runs[0].val_tokens
            ]
        if hypothesis.cost and (
            other := twin(runs[0], everyone, hypothesis.cost, hypothesis.within)
        ):
            pairs.append((size, arm, other.arm))
    return pairs


def is_control(arm: str) -> bool:
    """Whether an arm is there to be compared with."""
    return arm.rpartition("-")[2] in CONTROLS


def _bounds(found: Interval) -> str:
    if found.n < 2:
        return ", one seed, no interval"
    return f" ({found.low:+.4f} to {found.high:+.4f}, {found.n} seeds)"
