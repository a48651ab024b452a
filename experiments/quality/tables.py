"""The tables of the report, as Markdown, from tuned arms."""

import math
from collections.abc import Mapping, Sequence

from experiments.quality import curve
from experiments.quality.intervals import Interval, paired, t_interval
from experiments.quality.results import Result, Tuned, sweep

Curve = Mapping[int, Tuned]  # width to the tuned dense LM


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table whose first `left` columns are text and the others numbers."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    lines = [head, rule, *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def dense_losses(dense: Curve) -> dict[int, list[float]]:
    return {width: list(dense[width].losses.values()) for width in sorted(dense)}


def twins(arm: Result, dense: Result) -> dict[str, float]:
    """Dense widths with an arm's parameters, multiply-accumulates, and bits."""
    per_unit = dense["ffn_active"] / dense["width"]  # no biases: also parameters
    rest = dense["params_total"] - dense["ffn_active"]
    return {
        "parameters": (arm["params_total"] - rest) / per_unit,
        "compute": arm["active_width"],
        "bits": arm["ffn_bits"] / (dense["ffn_bits"] / dense["width"]),
    }


def dense_table(dense: Curve, steps: Sequence[curve.Doubling]) -> str:
    """The dense curve: loss at every width, and what the step to it is worth."""
    to = {step.wide: step for step in steps}
    rows = []
    for width in sorted(dense):
        one, step = dense[width], to.get(width)
        gain = f"{step.gain:.4f}" if step else ""
        worth = "" if step is None else resolution_text(step.resolution)
        needed = "yes" if step and step.is_needed else ""
        cells = [str(width), rate_of(one), str(len(one.runs)), loss_of(one)]
        rows.append([*cells, gain, worth, needed])
    head = "width,rate,seeds,validation loss,gain over the one before"
    head += ",in standard errors,arms fall here"
    return table(head.split(","), rows, left=0)


def arms_table(arms: Sequence[Tuned], dense: Curve) -> str:
    """Every arm as its equivalent dense width, beside its three twins on the curve."""
    rows = []
    for arm in sorted(arms, key=mean_loss):
        one = arm.one
        found = curve.equivalent_interval(
            dense_losses(dense), list(arm.losses.values())
        )
        equal = [
            twin(dense, width)
            for width in twins(one, next(iter(dense.values())).one).values()
        ]
        alive = [f"{lowest_entropy(arm):.3f}", str(most_dead(arm))]
        cells = [arm.arm, rate_of(arm), str(len(arm.runs)), loss_of(arm)]
        width = [f"{one['active_width']:.0f}", equivalent_text(found, dense)]
        rows.append([*cells, *width, *equal, *alive])
    head = "arm,rate,seeds,validation loss,active width,equivalent dense width"
    head += ",parameter-equal,compute-equal,bit-equal,lowest entropy,dead tiles"
    return table(head.split(","), rows)


def difference_table(arms: Sequence[tuple[str, Tuned]], base: Tuned, what: str) -> str:
    """Paired differences to the base; a positive one is worse than it."""
    rows = []
    for note, arm in arms:
        found = paired(arm.losses, base.losses)
        shift = "" if found is None else f"{found.mean:+.4f}"
        bound = "" if found is None or found.n < 2 else plus_minus(found)
        pairs = str(found.n if found else 0)
        rows.append(
            [
                arm.arm,
                note,
                rate_of(arm),
                pairs,
                loss_of(arm),
                shift,
                bound,
                verdict(found),
            ]
        )
    head = f"{what},its rate is,rate,pairs,validation loss,difference,95%,verdict"
    return table(head.split(","), rows, left=2)


def sweep_table(results: Sequence[Result], arms: Sequence[str], seed: int) -> str:
    """One-seed losses, arm by rate."""
    rates = sorted({r for arm in arms for r in sweep(results, arm, seed)})
    rows = []
    for arm in arms:
        losses = sweep(results, arm, seed)
        cells = [
            ""
            if r not in losses
            else f"{losses[r]:.4f}"
            if math.isfinite(losses[r])
            else "diverged"
            for r in rates
        ]
        rows.append([arm, *cells])
    return table(["arm", *(f"{r:g}" for r in rates)], rows)


def resolution_text(resolution: float) -> str:
    return "unknown" if math.isnan(resolution) else f"{resolution:.1f}"


def mean_loss(arm: Tuned) -> float:
    return t_interval(list(arm.losses.values())).mean


def lowest_entropy(arm: Tuned) -> float:
    return min(run["min_entropy_share"] for run in arm.runs.values())


def most_dead(arm: Tuned) -> int:
    return max(run["dead_tiles"] for run in arm.runs.values())


def loss_of(arm: Tuned) -> str:
    found = t_interval(list(arm.losses.values()))
    return f"{found.mean:.4f}" + (f" {plus_minus(found)}" if found.n > 1 else "")


def rate_of(arm: Tuned) -> str:
    return f"{arm.rate:g}" + ("" if arm.is_bracketed else "*")


def plus_minus(found: Interval) -> str:
    return f"± {found.half:.4f}"


def verdict(found: Interval | None) -> str:
    if found is None or found.n < 2:
        return "one seed"
    if not found.excludes_zero:
        return "undecided"
    return "worse" if found.mean > 0 else "better"


def twin(dense: Curve, width: float) -> str:
    """A width and the curve's loss there."""
    widths = sorted(dense)
    means = [mean_loss(dense[w]) for w in widths]
    found = curve.loss_at(widths, means, width)
    side = "below" if width < widths[0] else "above"
    loss = f"off the curve, {side}" if found is None else f"{found:.4f}"
    return f"{width:.0f}: {loss}"


def equivalent_text(found: curve.Estimate, dense: Curve) -> str:
    middle, low, high = (width_text(w, dense) for w in found)
    return middle if low == middle == high else f"{middle} ({low} to {high})"


def width_text(width: float, dense: Curve) -> str:
    if width == curve.BELOW:
        return f"below {min(dense)}"
    return f"above {max(dense)}" if width == curve.ABOVE else f"{width:.0f}"
