"""TriX beside the dense FFNs of its curve: differences paired by seed, and what each takes
in bits, parameters and seconds.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from experiments.quality import curve
from experiments.quality.claim import claim
from experiments.quality.worth import (
    Worth,
    compared_seeds,
    difference,
    seeds_text,
)
from trix_jax.files import read_json
from trix_jax.lm.experiment.results import Result, twin_widths
from trix_jax.lm.experiment.stats import Interval
from trix_jax.lm.experiment.tables import table
from trix_jax.lm.experiment.tuning import Tuned, tuned

STEPS = Path(__file__).parents[1] / "speed" / "measured" / "steps.json"
EQUAL = 0.02  # the share by which the dense FFN of equal parameters may be off
HEAD = (
    "FFN,D,seeds,loss,bits a byte,FFN parameters,tiles less it,95%,seconds a step,"
    "seconds in all,tiles there after"
)
ASSUMED = (
    "By pairs: the loss less that of the curve's neighbours, and the lower bound by them alone. The interval takes "
    "FFNs as independent, with one spread for all; pairs take differences as normal, with their own.\n"
)
Shown = Mapping[int, tuple[Sequence[Result], str, str, Worth]]


def section(shown: Shown) -> list[str]:
    """A table of the tiles and the dense FFNs of their curve.

    Args:
        shown: by width of the model: runs, the arm of the tiles, what it is in words, and
            its place.
    """
    rows, missing = [], []
    for d, (runs, name, words, place) in shown.items():
        one = _tuned(d, runs, name)
        dense = dense_arms(d, runs)
        equal = equal_parameters(one, dense)
        rows += rows_of(d, one, words, place, dense, equal)
        if equal and nearest(equal, dense) is None:
            missing.append(f"{equal:.0f} at D = {d}")
    if not rows:
        return []
    device = read_json(STEPS)["settings"]["wikipedia-128"]["device"]
    note = (
        "`tiles there after`: when the tiles are at the dense FFN's last loss, linear between evaluations. "
        f"Seconds: `experiments/speed/steps.py` on an idle machine ({device})."
    )
    if missing:
        note += f" Not run: the dense FFN of equal parameters, {', '.join(missing)}."
    return [
        "## What do they take, beside dense FFNs?\n",
        table(HEAD.split(","), rows),
        f"{note}\n",
    ]


def _tuned(d: int, runs: Sequence[Result], name: str) -> Tuned:
    found = tuned(runs, name, claim(d).arm(name).rate_of)
    assert found is not None
    return found


def dense_arms(d: int, runs: Sequence[Result]) -> dict[int, Tuned]:
    """The dense FFNs of the curve that have runs, by width."""
    arms = claim(d).groups["dense-curve"]
    found = (tuned(runs, arm.name, arm.rate_of) for arm in arms)
    every = {one.one.width: one for one in found if one and one.one.width}
    return {width: every[width] for width in sorted(every)}


def rows_of(
    d: int,
    one: Tuned,
    words: str,
    place: Worth,
    dense: Mapping[int, Tuned],
    equal: float | None,
) -> list[list[str]]:
    """The tiles, then every dense FFN."""
    seeds, any_dense = list(place.read.own), next(iter(dense.values()))
    own = [words, *_outcome(d, one, seeds, any_dense), "", "", *_seconds(d, one), ""]
    rows = [own]
    twin = nearest(equal, dense) if equal else None
    for width, other in dense.items():
        found, seeds = difference(one, other), compared_seeds(one, other)
        name = f"dense {width}" + (" (equal parameters)" if width == twin else "")
        cells = _outcome(d, other, seeds or list(other.losses), any_dense)
        pair = [f"{found.mean:+.4f}", _half(found)] if found else ["", ""]
        there = _there(d, one, other, seeds)
        rows.append([name, *cells, *pair, *_seconds(d, other), there])
    return rows


def _outcome(d: int, one: Tuned, seeds: Sequence[int], dense: Tuned) -> list[str]:
    """D, seeds, loss, bits and parameters."""
    loss = fmean(one.losses[seed] for seed in seeds)
    count = parameters(one.one, dense.one)
    size = "" if count is None else f"{count:,}"
    return [str(d), seeds_text(seeds), f"{loss:.4f}", bits(one, seeds), size]


def bits(one: Tuned, seeds: Iterable[int]) -> str:
    """Mean bits a byte of these seeds; nothing where one is not known."""
    known = [one.runs[seed].val_bits_per_byte for seed in seeds]
    found = [value for value in known if value is not None]
    return f"{fmean(found):.4f}" if found and len(found) == len(known) else ""


def parameters(run: Result, dense: Result) -> int | None:
    """Of the FFNs, what the model of a dense run has beside them left out."""
    if not (run.params_total and dense.params_total and dense.ffn_active):
        return None
    return run.params_total - (dense.params_total - dense.ffn_active)


def equal_parameters(one: Tuned, dense: Mapping[int, Tuned]) -> float | None:
    """The dense width of as many parameters; None where they are not recorded."""
    other = next(iter(dense.values())).one
    if parameters(one.one, other) is None or one.one.active_width is None:
        return None
    return twin_widths(one.one, other)["parameters"]


def nearest(width: float, dense: Mapping[int, Tuned]) -> int | None:
    """The dense width that has run and is about this one."""
    found = min(dense, key=lambda other: abs(other - width))
    return found if abs(found / width - 1) <= EQUAL else None


def seconds_a_step(d: int, arm: str) -> float | None:
    """As measured; None where it was not."""
    measured = read_json(STEPS)["settings"].get(claim(d).name, {"arms": {}})
    return measured["arms"][arm]["seconds"] if arm in measured["arms"] else None


def _seconds(d: int, one: Tuned) -> list[str]:
    """Of a step, and of all."""
    seconds, steps = seconds_a_step(d, one.arm), one.one.steps
    if seconds is None:
        return ["", ""]
    return [f"{seconds:.3f}", f"{seconds * steps:,.0f}" if steps else ""]


def _there(d: int, one: Tuned, other: Tuned, seeds: Sequence[int]) -> str:
    """When the tiles are at a dense FFN's loss."""
    runs = [one.runs[seed] for seed in seeds]
    if not runs or any(not run.evaluations for run in runs):
        return ""
    steps = steps_to(runs, fmean(other.losses[seed] for seed in seeds))
    if steps is None:
        return "not there"
    seconds = seconds_a_step(d, one.arm)
    time = "" if seconds is None else f", {steps * seconds:,.0f} s"
    return f"{steps:,.0f} steps{time}"


def steps_to(runs: Sequence[Result], loss: float) -> float | None:
    """The steps after which the mean validation loss of these runs is at `loss`, linear
    between evaluations; None where it never is, the first where it is below at once.
    """
    evaluations = [run.evaluations or [] for run in runs]
    before = None
    for lines in zip(*evaluations, strict=True):
        step, mean = lines[0]["step"], fmean(line["val_loss"] for line in lines)
        if mean <= loss:
            if before is None:
                return step
            share = (before[1] - loss) / (before[1] - mean)
            return before[0] + share * (step - before[0])
        before = step, mean
    return None


def by_pairs(d: int, runs: Sequence[Result], one: Tuned, place: Worth) -> str:
    """The differences to the neighbours on the curve, and the multiplier's lower bound by
    them alone: the widest that the tiles are better than, over W; where there is none, less
    than the narrower neighbour over W.
    """
    dense = dense_arms(d, runs)
    beside = curve.neighbours(sorted(place.read.dense), place.equivalent.value)
    pairs = {width: difference(one, dense[width]) for width in sorted(dense)}
    each = [
        f"{found.mean:+.4f}{_half(found, ' ')} at {width}"
        for width in beside
        if (found := pairs[width]) is not None
    ]
    first = pairs[beside[0]]
    if place.equivalent.value == curve.BELOW or first is None or first.n < 2:
        return ", ".join(each)
    better = [
        w
        for w, found in pairs.items()
        if found and found.n > 1 and found.side == "below"
    ]
    sign, width = ("≥", better[-1]) if better else ("≤", beside[0])
    return f"{', '.join(each)}: low {sign} {width / place.width.greater:.2f}"


def _half(found: Interval, before: str = "") -> str:
    return f"{before}± {found.half:.4f}" if found.n > 1 else ""
