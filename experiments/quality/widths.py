"""Arms on the dense curve, as the report shows them: tables, the figure, the targets."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
from matplotlib.figure import Figure

from experiments.quality import curve
from trix_jax.lm.experiment.plots import STYLES, finish
from trix_jax.lm.experiment.results import twin_widths
from trix_jax.lm.experiment.stats import paired, spread
from trix_jax.lm.experiment.tables import rate_of, table
from trix_jax.lm.experiment.tuning import Tuned
from trix_jax.lm.report.plots import spread as spread_apart

MARKERS = {"compute": "o", "bits": "D", "parameters": "s"}
SEEDS = 3  # fewer decide nothing
LEAST_ENTROPY = 0.7  # share of ln N
SPARSITY = 1.5  # equivalent over active width, at one tile a token
NEAR = 0.03  # nats from the parameter-equal dense LM
QUARTER = 0.25
NAME_POINTS = 11.0  # from one arm's name to the next, of ten points
THIN = "undecided: too few seeds"

Curve = Mapping[int, Tuned]  # width to the tuned dense LM


def losses_of(arm: Tuned) -> list[float]:
    return list(arm.losses.values())


def mean_loss(arm: Tuned) -> float:
    return fmean(losses_of(arm))


def dense_losses(dense: Curve) -> dict[int, list[float]]:
    return {width: losses_of(dense[width]) for width in sorted(dense)}


def twins(arm: Tuned, dense: Curve) -> dict[str, float]:
    """Dense widths with an arm's parameters, multiply-accumulates, and bits."""
    return twin_widths(arm.one, next(iter(dense.values())).one)


def dense_table(dense: Curve, steps: Sequence[curve.Doubling]) -> str:
    """The dense curve: loss at every width, and what the step to it is worth."""
    to = {step.wide: step for step in steps}
    rows = []
    for width in sorted(dense):
        one, step = dense[width], to.get(width)
        gain = f"{step.gain:.4f}" if step else ""
        worth = "" if step is None else curve.resolution_text(step)
        needed = "yes" if step and step.is_needed else ""
        cells = [str(width), rate_of(one), str(len(one.runs)), spread(losses_of(one))]
        rows.append([*cells, gain, worth, needed])
    head = "width,rate,seeds,validation loss,gain over the one before"
    head += ",in standard errors,arms fall here"
    return table(head.split(","), rows, left=0)


def arms_table(arms: Sequence[Tuned], dense: Curve) -> str:
    """Every arm as its equivalent dense width, beside its three twins on the curve."""
    rows = []
    for arm in sorted(arms, key=mean_loss):
        found = curve.equivalent_interval(dense_losses(dense), losses_of(arm))
        equal = [on_curve(dense, width) for width in twins(arm, dense).values()]
        cells = [arm.arm, rate_of(arm), str(len(arm.runs)), spread(losses_of(arm))]
        width = [f"{arm.one.active_width:.0f}", equivalent_text(found, dense)]
        alive = [f"{lowest_entropy(arm):.3f}", str(most_dead(arm))]
        rows.append([*cells, *width, *equal, *alive])
    head = "arm,rate,seeds,validation loss,active width,equivalent dense width"
    head += ",parameter-equal,compute-equal,bit-equal,lowest entropy,dead tiles"
    return table(head.split(","), rows)


def losses_over_width(arms: Sequence[Tuned], dense: Curve, path: Path) -> None:
    """Loss against width: the dense curve, and each arm at its active width, at the
    width of equal bits and at that of equal parameters.
    """
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    draw_dense(axes, dense)
    for arm, style in zip(arms, itertools.cycle(STYLES), strict=False):
        draw_arm(axes, arm, twins(arm, dense), *style)
    name_arms(axes, arms, [max(twins(arm, dense).values()) for arm in arms])
    for what, marker in MARKERS.items():
        face = "grey" if what == "compute" else "white"
        label = {"compute": "active width"}.get(what, f"width of equal {what}")
        axes.plot([], [], marker, color="grey", mfc=face, label=label)
    axes.set_xscale("log", base=2)
    shown = [2**i for i in range(3, 12)]
    axes.set_xticks(shown, [str(w) for w in shown])
    axes.minorticks_off()
    axes.set_xlim(12, 2300)
    axes.set_xlabel(
        "hidden width of a dense FFN; a symbol below the line beats its dense twin"
    )
    finish(axes)
    figure.savefig(path)


def draw_dense(axes, dense: Curve) -> None:
    """Means as a line, seeds as ticks, hollow where the rate is not bracketed yet."""
    means = {w: mean_loss(dense[w]) for w in sorted(dense)}
    axes.plot(*zip(*means.items(), strict=True), color="black", lw=2, label="dense")
    for width, arm in dense.items():
        losses = losses_of(arm)
        axes.plot([width] * len(losses), losses, "_", color="black", ms=10)
    hollow = {w: mean for w, mean in means.items() if not dense[w].is_bracketed}
    if hollow:
        label, style = "dense, rate not bracketed yet", {"mfc": "white", "ms": 5}
        points = zip(*hollow.items(), strict=True)
        axes.plot(*points, "o", color="black", label=label, **style)


def draw_arm(axes, arm: Tuned, equal: dict[str, float], colour: str, line: str) -> None:
    """A line at the mean loss, a symbol at each width in `equal`, seeds as ticks."""
    losses, mean = losses_of(arm), mean_loss(arm)
    span = [min(equal.values()), max(equal.values())]
    axes.plot(span, [mean] * 2, line, color=colour, lw=1)
    axes.plot([equal["compute"]] * len(losses), losses, "_", color=colour, ms=12)
    for what, marker in MARKERS.items():
        face = colour if what == "compute" else "white"
        axes.plot(equal[what], mean, marker, color=colour, mfc=face, ms=7)


def name_arms(axes, arms: Sequence[Tuned], ends: Sequence[float]) -> None:
    """Names where the lines end, apart from each other; the limits of the loss stay.

    Args:
        ends: the width at which each line ends.
    """
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    points = axes.bbox.height * 72 / axes.figure.dpi / (high - low)  # a nat
    wanted = np.asarray([mean_loss(arm) * points for arm in arms])
    for arm, end, at, moved, (colour, _) in zip(
        arms,
        ends,
        wanted,
        spread_apart(wanted, NAME_POINTS),
        itertools.cycle(STYLES),
        strict=False,
    ):
        place = {"xytext": (9, moved - at), "textcoords": "offset points"}
        axes.annotate(
            arm.arm, (end, mean_loss(arm)), color=colour, va="center", **place
        )


def targets_table(
    arms: Sequence[Tuned], controls: Mapping[str, Tuned], base: Tuned, dense: Curve
) -> str:
    """One row a target and arm or control. Widths of the curve with too few seeds are
    left out: an arm beyond the last one that has enough is only known to be above it.

    Args:
        controls: what routes instead on `base`'s tiles, by name; learned ones need not be
            beaten.
    """
    enough = {w: arm for w, arm in dense.items() if len(arm.runs) >= SEEDS}
    dense = enough if len(enough) > 1 else dense  # one width is no curve
    worst, dead = min(map(lowest_entropy, arms)), max(map(most_dead, arms))
    found = f"lowest share {worst:.3f}, most dead tiles in a layer {dead}"
    alive = status(worst >= LEAST_ENTROPY and dead == 0)
    rows = [["routing is alive in every arm, at every evaluation", found, alive]]
    rows += [against(name, control, base) for name, control in controls.items()]
    for arm in arms:
        rows += [*pays(arm, dense), *moonshot(arm, dense)]
    return table(["target", "found", "status"], rows, left=3)


def against(name: str, control: Tuned, base: Tuned) -> list[str]:
    """Signatures beat hash and random; a learned router does not beat them."""
    is_learned = "learned" in name
    target = f"{base.arm} beats {name}"
    if is_learned:
        target = f"{name} does not beat {base.arm}"
    difference = paired(control.losses, base.losses)
    if difference is None:
        return [target, "no common seed", "undecided"]
    found = f"{difference.mean:+.4f}, {difference.n} seeds"
    if difference.n < SEEDS:
        return [target, found, "undecided"]
    side = difference.side
    is_met = side != "below" if is_learned else side == "above"
    return [target, f"{found}, ± {difference.half:.4f}", status(is_met)]


def pays(arm: Tuned, dense: Curve) -> list[list[str]]:
    """Sparsity, at one tile a token, and ternary weights, for every arm."""
    found = curve.equivalent_interval(dense_losses(dense), losses_of(arm))
    text, rows = equivalent_text(found, dense), []

    def decided(least: float) -> str:
        return compared(found.low >= least, found.high < least, arm, dense)

    if arm.one.tiles_per_token == 1:
        least = SPARSITY * (arm.one.active_width or 0)
        what = f"{arm.arm}: equivalent width at least {SPARSITY} x active, {least:.0f}"
        rows.append([what, text, decided(least)])
    bits = twins(arm, dense)["bits"]
    what = f"{arm.arm}: equivalent width above the bit-equal {bits:.0f}"
    return [*rows, [what, text, decided(bits)]]


def moonshot(arm: Tuned, dense: Curve) -> list[list[str]]:
    """Within 0.03 nats of the parameter-equal dense LM, for arms with a quarter of its
    compute, routing scores apart: N of them take N / 2 of active width at most.
    """
    width = twins(arm, dense)["parameters"]
    scores = (arm.one.num_tiles or 0) / 2
    is_light = (arm.one.active_width or 0) <= QUARTER * width + scores
    found = curve.behind(dense_losses(dense), losses_of(arm), width)
    if not is_light or found is None:
        return []
    target = f"{arm.arm}: a quarter of the compute, within {NEAR} of the parameter-equal dense LM"
    text = f"{found.value:+.4f} nats ({found.low:+.4f} to {found.high:+.4f})"
    decided = compared(found.high <= NEAR, found.low > NEAR, arm, dense)
    return [[target, text, decided]]


def compared(is_met: bool, is_missed: bool, arm: Tuned, dense: Curve) -> str:
    """Where the interval lies, if the seeds of arm and curve suffice."""
    if min(len(one.runs) for one in (arm, *dense.values())) < SEEDS:
        return THIN
    return "met" if is_met else "missed" if is_missed else "undecided"


def status(is_met: bool) -> str:
    return "met" if is_met else "missed"


def lowest_entropy(arm: Tuned) -> float:
    return min(run.min_entropy_share or 0 for run in arm.runs.values())


def most_dead(arm: Tuned) -> int:
    return max(run.dead_tiles or 0 for run in arm.runs.values())


def on_curve(dense: Curve, width: float) -> str:
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
