"""The figure that opens the report: loss over W, a panel a width of the model. Each arm
is drawn against the dense curve of the seeds that it is read off.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from experiments.quality.curve import BELOW, monotone
from experiments.quality.design import SEEDS
from experiments.quality.worth import Reading, Worth, seeds_text
from trix_jax.lm.experiment.plots import CYCLE, finish

COLOURS = (*CYCLE, "#882255", "#44aa99", "#999933", "#332288")
MARKERS = "sD^vPXo"
CONCLUDING = ("-", ":", "-.")  # of curves of other seeds than the one that chose


class Point(NamedTuple):
    """An arm on a panel.

    Attributes:
        label: the same in all panels.
    """

    label: str
    place: Worth


def draw(panels: Mapping[int, Sequence[Point]], path: Path) -> None:
    """Loss over W, and a thin line from there to the dense width of equal loss: its
    length is the multiplier. It is dotted where that is beyond the curve.

    Args:
        panels: by width of the model.
    """
    figure = Figure(figsize=(5.2 * len(panels), 5), dpi=150, layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    every = itertools.chain.from_iterable(panels.values())
    styles = styles_of([point.label for point in every])
    for axes, (d, points) in zip(grid, panels.items(), strict=True):
        draw_curves(axes, points)
        for point in points:
            draw_point(axes, point, *styles[point.label])
        set_width_axis(axes, points)
        axes.set_xlabel(f"D = {d}: W, as the hidden width of a dense FFN of 16 bits")
        finish(axes)
    legend(figure, styles, panels)
    figure.savefig(path)


def styles_of(labels: Sequence[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker of its own for each label, in the order they come."""
    pairs = zip(itertools.cycle(COLOURS), itertools.cycle(MARKERS), strict=False)
    return dict(zip(dict.fromkeys(labels), pairs, strict=False))


def readings(points: Sequence[Point]) -> list[Reading]:
    """The dense curves that the points are read off, each once: of most seeds first, that
    of the seed that chose last.
    """
    found = {repr(sorted(p.place.read.dense.items())): p.place.read for p in points}
    return sorted(found.values(), key=lambda read: (is_one_seed(read), -len(read.own)))


def draw_curves(axes: Any, points: Sequence[Point]) -> None:
    """A curve a set of seeds; no dot at a width that has none of them, and whose loss is
    that of other seeds.
    """
    lines = itertools.cycle(CONCLUDING)
    for read in readings(points):
        widths = sorted(read.dense)
        means = monotone([fmean(read.dense[w].values()) for w in widths])
        is_first = is_one_seed(read)
        colour, face = ("#777777", "white") if is_first else ("black", "black")
        line = "--" if is_first else next(lines)
        many = "" if len(read.own) == 1 else "s"
        label = f"dense, seed{many} {seeds_text(read.own)}"
        look = {"color": colour, "mfc": face, "ms": 5, "label": label}
        own = [i for i, w in enumerate(widths) if read.dense[w].keys() & read.own]
        axes.plot(widths, means, f"o{line}", markevery=own, lw=1.4, **look)


def draw_point(axes: Any, point: Point, colour: str, marker: str) -> None:
    """The arm at its W; hollow where the seed that chooses alone has run."""
    place = point.place
    width, loss = place.width.greater, place.loss
    end = min(place.equivalent.value, max(place.read.dense))
    line = ":" if end < place.equivalent.value else "-"
    if end > BELOW:
        axes.plot([width, end], [loss] * 2, line, color=colour, lw=0.8)
    face = "white" if is_one_seed(place.read) else colour
    axes.plot(width, loss, marker, color=colour, mfc=face, ms=8, zorder=3)


def is_one_seed(read: Reading) -> bool:
    """Whether it is the seed that chooses that says all."""
    return set(read.own) == {SEEDS[0]}


def set_width_axis(axes: Any, points: Sequence[Point]) -> None:
    """Powers of two, as far as there are dense FFNs or tiles."""
    shown = [point.place.width.greater for point in points]
    shown += [width for point in points for width in point.place.read.dense]
    first, last = math.floor(math.log2(min(shown))), math.ceil(math.log2(max(shown)))
    ticks = [2**power for power in range(first, last + 1)]
    axes.set_xscale("log", base=2)
    axes.set_xlim(ticks[0] / 1.1, ticks[-1] * 1.1)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()


def legend(
    figure: Figure,
    styles: Mapping[str, tuple[str, str]],
    panels: Mapping[int, Sequence[Point]],
) -> None:
    """The arms, below all panels."""
    axes, handles = figure.axes[0], []
    for label, (colour, marker) in styles.items():
        handles += axes.plot([], [], marker, color=colour, label=label)
    text = "as far as the dense curve of its seeds (dots)"
    handles += axes.plot([], [], "-", color="grey", lw=0.8, label=text)
    if any(is_one_seed(p.place.read) for points in panels.values() for p in points):
        text = f"hollow: seed {SEEDS[0]} alone"
        handles += axes.plot([], [], "s", color="grey", mfc="white", label=text)
    look = {"frameon": False, "fontsize": 6.5, "ncols": 2}
    figure.legend(handles=handles, loc="outside lower center", **look)
