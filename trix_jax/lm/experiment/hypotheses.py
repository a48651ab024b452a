"""The hypotheses of the original's plan, as data, and what runs say of them."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from trix_jax.lm.experiment.results import Result, twin
from trix_jax.lm.experiment.stats import Interval, paired, verdict

ROUTES = ("hash", "random")  # that no weights choose
# Ends of names of arms that stand beside another of the same tiles; whole names, beside
# `sparse`.
CONTROLS = (*ROUTES, "learned", "float")

TILES = ("num_tiles", "tile_width", "tiles_per_token")  # fields of a result

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


def answer(
    hypothesis: Hypothesis,
    found: Found,
    diverged: Collection[tuple[str, str]] = (),
) -> str:
    """What the runs say of a hypothesis: a verdict a pair of arms, and one of all.

    Args:
        diverged: arms of which a seed did, with which nothing is decided: the seeds that
            are left are the good ones.
    """
    rows, verdicts, pairs = [], set(), _pairs(hypothesis, found)
    for size, arm, other in pairs:
        values = (
            {run.seed: getattr(run, hypothesis.field) for run in found[size, name]}
            for name in (arm, other)
        )
        if difference := paired(*values):
            words = verdict(difference, "supported", "not supported", "undecided")
            gone = [name for name in (arm, other) if (size, name) in diverged]
            words = "undecided" if gone else words
            verdicts.add(words)
            words += f", a seed of {gone[0]} diverged" if gone else ""
            text = f"{difference.mean:+.4f}{_bounds(difference)}: {words}"
            rows.append(f"  - {size}, {arm} against {other}: {text}")
    if not rows:
        why = "the arms that would tell share no seed" if pairs else hypothesis.absent
        return f"**{hypothesis.claim}: undecided.** Not measured here: {why}."
    word = verdicts.pop() if len(verdicts) == 1 else "mixed"
    head = f"**{hypothesis.claim}: {word}.** Measured: {hypothesis.measured} (95% interval over seeds)."
    return "\n".join([head, *rows])


def _pairs(hypothesis: Hypothesis, found: Found) -> list[tuple[str, str, str]]:
    """Size, arm, and what it is compared with."""
    pairs, everyone = [], [runs[0] for runs in found.values()]
    for (size, arm), runs in found.items():
        end = arm.rpartition("-")[2]
        by_hash = end == "hash" and hypothesis.controls != ROUTES
        is_beside = end in CONTROLS and _base_of(size, arm, found) is not None
        if runs[0].is_dense or (is_beside and not by_hash):
            continue
        pairs += [
            (size, arm, other)
            for place, other in found
            if place == size
            and other.rpartition("-")[2] in hypothesis.controls
            and _base_of(size, other, found) == arm
            and found[size, other][0].val_tokens == runs[0].val_tokens
        ]
        if hypothesis.cost and (
            other := twin(runs[0], everyone, hypothesis.cost, hypothesis.within)
        ):
            pairs.append((size, arm, other.arm))
    return pairs


def _base_of(size: str, arm: str, found: Found) -> str | None:
    """The arm beside which this one stands, with the same tiles; None where none is."""
    base = arm.rpartition("-")[0] or "sparse"
    if (size, base) not in found:
        return None
    one, other = found[size, arm][0], found[size, base][0]
    alike = (getattr(one, name) == getattr(other, name) for name in TILES)
    return base if all(alike) else None


def _bounds(found: Interval) -> str:
    if found.n < 2:
        return ", one seed, no interval"
    return f" ({found.low:+.4f} to {found.high:+.4f}, {found.n} seeds)"
