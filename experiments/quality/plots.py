"""The two plots of a setting: arms on the dense curve, and the sweeps."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from experiments.quality.intervals import t_interval
from experiments.quality.results import Result, Tuned, sweep
from experiments.quality.tables import Curve, twins

COLOURS = "#0072b2 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9".split()
STYLES = [(colour, line) for line in ("-", "--", ":") for colour in COLOURS]
MARKERS = {"compute": "o", "bits": "D", "parameters": "s"}


def losses_over_width(arms: Sequence[Tuned], dense: Curve, path: Path) -> None:
    """Loss against width: the dense curve, and each arm at its active width, at the
    width of equal bits and at that of equal parameters.
    """
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    draw_dense(axes, dense)
    for arm, style in zip(arms, itertools.cycle(STYLES), strict=False):
        draw_arm(axes, arm, twins(arm.one, next(iter(dense.values())).one), *style)
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
    finish(axes, figure, path)


def draw_dense(axes, dense: Curve) -> None:
    """Means as a line, seeds as ticks, hollow where the rate is not bracketed yet."""
    means = {w: t_interval(list(dense[w].losses.values())).mean for w in sorted(dense)}
    axes.plot(*zip(*means.items(), strict=True), color="black", lw=2, label="dense")
    for width, arm in dense.items():
        losses = list(arm.losses.values())
        axes.plot([width] * len(losses), losses, "_", color="black", ms=10)
    hollow = {w: mean for w, mean in means.items() if not dense[w].is_bracketed}
    if hollow:
        label, style = "dense, rate not bracketed yet", {"mfc": "white", "ms": 5}
        points = zip(*hollow.items(), strict=True)
        axes.plot(*points, "o", color="black", label=label, **style)


def draw_arm(axes, arm: Tuned, equal: dict[str, float], colour: str, line: str) -> None:
    """A line at the mean loss, a symbol at each width in `equal`, seeds as ticks."""
    found = t_interval(list(arm.losses.values()))
    span = [min(equal.values()), max(equal.values())]
    axes.plot(span, [found.mean] * 2, line, color=colour, lw=1)
    at = [equal["compute"]] * found.n
    axes.plot(at, list(arm.losses.values()), "_", color=colour, ms=12)
    for what, marker in MARKERS.items():
        face = colour if what == "compute" else "white"
        axes.plot(equal[what], found.mean, marker, color=colour, mfc=face, ms=7)
    place = {"xytext": (9, 0), "textcoords": "offset points", "va": "center"}
    axes.annotate(arm.arm, (span[1], found.mean), color=colour, **place)


def losses_over_rate(
    results: Sequence[Result], panels: Sequence[Sequence[str]], seed: int, path: Path
) -> None:
    """One-seed losses against the learning rate, a panel a set of arms."""
    figure = Figure(figsize=(12, 4.6), dpi=150, layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, arms in zip(grid, panels, strict=True):
        styles = itertools.cycle([("black", "-"), *STYLES])
        for arm, (colour, line) in zip(arms, styles, strict=False):
            losses = sweep(results, arm, seed)
            rates = sorted(losses)
            style = {"color": colour, "linestyle": line, "label": arm}
            axes.plot(rates, [losses[r] for r in rates], marker="o", **style)
        axes.set_xscale("log", base=2)
        ticks = sorted({r for arm in arms for r in sweep(results, arm, seed)})
        axes.set_xticks(ticks, [f"{r:g}" for r in ticks])
        axes.minorticks_off()
        axes.set_xlabel("peak learning rate")
        finish(axes)
    figure.savefig(path)


def finish(axes, figure: Figure | None = None, path: Path | None = None) -> None:
    axes.set_title("Validation loss, nats a token", loc="left", fontsize=11)
    axes.grid(color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    if figure and path:
        figure.savefig(path)
