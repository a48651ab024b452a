"""The figures of experiments and sweeps. In an experiment's TriX arms are blue to green,
dense ones orange to brown, controls grey.
"""

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from trix_jax.lm.experiment.results import Result
from trix_jax.lm.experiment.tuning import sweep
from trix_jax.lm.report import plots
from trix_jax.lm.report.record import RunRecord

TRIX = ("#0072B2", "#009E73", "#56B4E9", "#332288")
DENSE = ("#D55E00", "#E69F00", "#882255", "#AA4499")
CONTROLS = {"hash": "#999999", "random": "#666666", "learned": "#333333"}
# Of a sweep's arms, which are more than there are colours.
CYCLE = "#0072b2 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9".split()
STYLES = [(colour, line) for line in ("-", "--", ":") for colour in CYCLE]
COSTS = {
    "params_total": "parameters",
    "ffn_active": "FFN multiply-accumulates a token",
    "ffn_bits": "FFN bits as served",
    "seconds": "seconds of training, evaluations and compilation included",
}
FLOOR_NAMES = {1: "unigram", 2: "bigram", 3: "trigram"}

Arms = Mapping[str, Sequence[Result]]
Found = Mapping[tuple[str, str], Sequence[Result]]  # by size and arm


def costs(path: Path, found: Found, floors: Mapping[str, Mapping[int, float]]) -> None:
    """Loss of every arm against what it costs: mean and range over seeds; arms of
    several sizes are joined, and then the unit is bits per byte, if all are known.
    """
    sizes = list(dict.fromkeys(size for size, _ in found))
    is_ladder = len(sizes) > 1
    has_bits = is_ladder and _all_bits(found.values())
    unit = "val_bits_per_byte" if has_bits else "val_loss"
    colours = colours_of(found)
    figure, axes = plots.new_figure(7.4, rows=2, columns=2)
    for ax, (cost, words) in zip(axes, COSTS.items(), strict=True):
        for arm, colour in colours.items():
            mine = [runs for (_, name), runs in found.items() if name == arm]
            _points(ax, mine, cost, colour, unit, is_ladder)
        ax.set_xscale("log")
        _log_axis(ax)
        ax.set_xlabel(words, fontsize=9)
    if not is_ladder:
        _join_dense(list(axes[:3]), found)
        _floor_lines(axes, found, floors.get(sizes[0], {}))
    words = "bits per byte" if has_bits else "nats per token"
    plots.set_title(axes[0], f"Validation loss, {words}")
    _legend_below(figure, axes[0], colours, is_marked=True)
    plots.save(figure, path)


def curves(path: Path, arms: Arms, floors: Mapping[int, float]) -> None:
    """Validation loss over tokens: a line a seed, the arm's name at its end."""
    figure, (ax,) = plots.new_figure(4.6)
    colours, labels = colours_of({("", arm): runs for arm, runs in arms.items()}), []
    highest = 0.0
    for arm, runs in arms.items():
        for one in runs:
            evals = one.evaluations or []
            tokens, losses = plots.columns(evals, "tokens", "val_loss")
            ax.plot(tokens, losses, "o-", ms=3, lw=1.4, color=colours[arm], alpha=0.85)
            highest = max(highest, float(losses.max()))
        mean = statistics.mean(one.val_loss for one in runs)
        labels.append(plots.Label(mean, f"{arm}  {mean:.3f}", colours[arm], "bold"))
    for order, loss in floors.items():
        if loss < highest:
            ax.axhline(loss, color=plots.GREY, lw=0.8, ls=(0, (4, 3)), alpha=0.7)
            name = FLOOR_NAMES.get(order, f"{order}-gram")
            labels.append(plots.Label(loss, f"{name}  {loss:.3f}"))
    plots.set_title(ax, "Validation loss, nats per token (dashed: counting n-grams)")
    last = max(one.tokens or 0 for runs in arms.values() for one in runs)
    plots.set_tokens_axis(ax, float(last))
    plots.label_ends(ax, labels)
    plots.save(figure, path)


def steps(path: Path, records: Mapping[str, RunRecord], colours: Mapping[str, str]):
    """Training loss, gradient norm, learning rate, speed, memory and least entropy over
    tokens: a run of every arm.
    """
    figure, axes = plots.new_figure(7.6, rows=3, columns=2)
    panels = {
        "loss": "Training loss, nats per token",
        "grad_norm": "Gradient norm before clipping",
        "lr": "Learning rate",
        "tokens_per_second": "Tokens per second",
        "memory_bytes": "Peak memory, MiB",
    }
    for arm, record in records.items():
        tokens = plots.columns(record.steps, "tokens")[0]
        for ax, name in zip(axes, panels, strict=False):
            values = plots.columns(record.steps, name)[0]
            values = values / plots.MIB if name == "memory_bytes" else values
            plots.draw_smoothed(ax, tokens, values, colours[arm])
        if record.steps[0]["routing_entropy"]:
            entropy = np.asarray([line["routing_entropy"] for line in record.steps])
            tiles = len(record.evals[-1]["tile_usage"][0])
            share = plots.entropy_share(entropy, tiles).min(axis=1)
            plots.draw_smoothed(axes[5], tokens, share, colours[arm])
    titles = [*panels.values(), "Entropy share, lowest layer"]
    last = max(record.steps[-1]["tokens"] for record in records.values())
    for ax, title in zip(axes, titles, strict=True):
        plots.set_title(ax, title)
        plots.set_tokens_axis(ax, float(last))
    axes[5].set_ylim(0, 1.05)
    axes[3].set_ylim(bottom=0)
    axes[3].yaxis.set_major_formatter(EngFormatter(sep=""))
    axes[4].set_ylim(bottom=0)
    _legend_below(figure, axes[0], {arm: colours[arm] for arm in records})
    plots.save(figure, path)


def rates(
    path: Path, results: Sequence[Result], panels: Sequence[Sequence[str]], seed: int
) -> None:
    """Losses of a sweep against the learning rate, one seed, a panel a set of arms."""
    figure = Figure(figsize=(12, 4.6), dpi=150, layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, arms in zip(grid, panels, strict=True):
        styles = itertools.cycle([("black", "-"), *STYLES])
        for arm, (colour, line) in zip(arms, styles, strict=False):
            losses = sweep(results, arm, seed)
            at = sorted(losses)
            style = {"color": colour, "linestyle": line, "label": arm}
            axes.plot(at, [losses[r] for r in at], marker="o", **style)
        axes.set_xscale("log", base=2)
        ticks = sorted({r for arm in arms for r in sweep(results, arm, seed)})
        axes.set_xticks(ticks, [f"{r:g}" for r in ticks])
        axes.minorticks_off()
        axes.set_xlabel("peak learning rate")
        finish(axes)
    figure.savefig(path)


def finish(axes: Any) -> None:
    """The look of a sweep's panel."""
    axes.set_title("Validation loss, nats a token", loc="left", fontsize=11)
    axes.grid(color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def colours_of(found: Found) -> dict[str, str]:
    """A colour an arm, in the order they come."""
    colours: dict[str, str] = {}
    for (_, arm), runs in found.items():
        if arm in colours:
            continue
        if arm in CONTROLS:
            colours[arm] = CONTROLS[arm]
            continue
        family = DENSE if runs[0].is_dense else TRIX
        taken = sum(colour in family for colour in colours.values())
        colours[arm] = family[taken % len(family)]
    return colours


def _points(
    ax: Axes, groups: list, cost: str, colour: str, unit: str, is_ladder: bool
) -> None:
    xs, ys = [], []
    for runs in groups:
        values = [getattr(run, unit) for run in runs]
        x, mean = _mean_cost(runs, cost), statistics.mean(values)
        ax.plot([x, x], [min(values), max(values)], color=colour, lw=1.5, zorder=3)
        xs.append(x)
        ys.append(mean)
    marker = _marker(groups[0][0].arm)
    line = "-" if is_ladder else ""
    ax.plot(xs, ys, f"{marker}{line}", color=colour, ms=7, lw=1.2, zorder=4)


def _all_bits(groups: Iterable[Sequence[Result]]) -> bool:
    """Whether every run knows its bits per byte."""
    return all(r.val_bits_per_byte is not None for runs in groups for r in runs)


def _mean_cost(runs: Sequence[Result], cost: str) -> float:
    return float(statistics.mean(getattr(run, cost) for run in runs))


def _legend_below(
    figure: Figure, ax: Axes, colours: Mapping[str, str], is_marked: bool = False
) -> None:
    handles = [
        ax.plot([], [], _marker(arm) if is_marked else "-", color=colour, label=arm)[0]
        for arm, colour in colours.items()
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=6, frameon=False, fontsize=9
    )


def _join_dense(axes: Sequence[Axes], found: Found) -> None:
    """A line through the dense arms: the curve of widths."""
    dense = [runs for runs in found.values() if runs[0].is_dense]
    for ax, cost in zip(axes, COSTS, strict=False):
        points = sorted(
            (getattr(runs[0], cost), statistics.mean(r.val_loss for r in runs))
            for runs in dense
        )
        if len(points) > 1:
            ax.plot(*zip(*points, strict=True), color=DENSE[0], lw=1, alpha=0.5)


def _floor_lines(axes: Any, found: Found, floors: Mapping[int, float]) -> None:
    """Floors that lie near the points; the others would squeeze them."""
    losses = [r.val_loss for runs in found.values() for r in runs]
    low, high = min(losses), max(losses)
    margin = max(0.5, high - low)
    for order, loss in floors.items():
        if low - margin <= loss <= high + margin:
            for ax in axes:
                ax.axhline(loss, color=plots.GREY, lw=0.8, ls=(0, (4, 3)), alpha=0.7)
                ax.annotate(
                    FLOOR_NAMES.get(order, f"{order}-gram"),
                    (0.99, loss),
                    xycoords=("axes fraction", "data"),
                    ha="right",
                    va="bottom",
                    fontsize=8,
                    color=plots.GREY,
                )


def _marker(arm: str) -> str:
    if arm in CONTROLS:
        return "x"
    return "s" if arm.startswith("dense") else "o"


def _log_axis(ax: Axes) -> None:
    """Round numbers on a log axis that spans a factor of two at least, so that what is
    equal looks equal.
    """
    ax.margins(x=0.12)
    low, high = ax.get_xlim()
    wider = max(1.0, (2 * low / high) ** 0.5)
    ax.set_xlim(low / wider, high * wider)
    spans = high / low
    near = (1, 1.4, 2, 3, 5, 7)  # two at least, wherever a factor of two lies
    marks = near if spans < 6 else (1, 3) if spans < 100 else (1,)
    ax.xaxis.set_major_locator(LogLocator(10, subs=marks))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.xaxis.set_minor_formatter(NullFormatter())
