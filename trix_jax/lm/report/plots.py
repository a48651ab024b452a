"""The figures of reports: matplotlib's objects on the Agg canvas, no global state.

Lines carry their names at their ends instead of a legend; the colours are Okabe and
Ito's (2008, https://jfly.uni-koeln.de/color), layers run along viridis. Every function
takes lines of `metrics.jsonl` (`steps`, `evals`) and writes one PNG.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
ARM_COLOURS = {"trix": BLUE, "dense": ORANGE, "dense_w": GREEN}
ARM_NAMES = {
    "trix": "TriX",
    "dense": "dense twin",
    "dense_w": "dense of equal cost",
}
GRAM_NAMES = {1: "unigram", 2: "bigram", 3: "trigram", 4: "4-gram", 5: "5-gram"}
HEALTHY_SHARE = 0.7  # of ln N: the entropy below which routing counts as collapsing
DEAD = 0.1  # of an even share: below it a tile counts as dead
WIDTH = 8.0  # inches; at 150 dots an inch, a third more than a page of GitHub shows
MIB = 2**20

Lines = Sequence[dict[str, Any]]


class Label(NamedTuple):
    """Words at the right edge of a plot, at the height `y` of what they name."""

    y: float
    text: str
    colour: str = GREY
    weight: str = "normal"


def val_losses(path: Path, arms: Mapping[str, Lines], floors: Mapping[int, float]):
    """Validation loss of every arm over tokens, and what counting n-grams achieves."""
    figure, (ax,) = new_figure(4.8)
    labels = _draw_floors(ax, floors)
    for arm, evals in arms.items():
        tokens, losses = columns(evals, "tokens", "val_loss")
        colour, name = ARM_COLOURS[arm], ARM_NAMES[arm]
        # TriX thin over a wide twin: both show where they coincide.
        width, above = (2.0, 3) if arm == "trix" else (3.0, 2)
        ax.plot(
            tokens, losses, "o-", color=colour, lw=width, ms=2 * width, zorder=above
        )
        labels.append(Label(losses[-1], f"{name}  {losses[-1]:.3f}", colour, "bold"))
    set_title(ax, "Validation loss, nats per token (dashed: counting n-grams)")
    set_tokens_axis(ax, float(max(evals[-1]["tokens"] for evals in arms.values())))
    label_ends(ax, labels)
    save(figure, path)


def savings(path: Path, active: Mapping[str, int], sizes: Mapping[str, int]):
    """Multiply-accumulates of the arms; bytes of TriX before and after packing."""
    figure, axes = new_figure(1.7, columns=2)
    names = [ARM_NAMES[arm] for arm in active]
    colours = [ARM_COLOURS[arm] for arm in active]
    rounded = [EngFormatter(places=1, sep="")(value) for value in active.values()]
    _bars(axes[0], names, list(active.values()), rounded, colours)
    set_title(axes[0], "FFN multiply-accumulates per token")
    stored = [sizes["ffn_float32"], sizes["ffn_packed"]]
    kibibytes = [f"{value / 1024:,.0f} KiB" for value in stored]
    _bars(axes[1], ["float32", "packed"], stored, kibibytes, [GREY, BLUE])
    set_title(axes[1], "FFN weights of TriX")
    save(figure, path)


def losses(
    path: Path,
    steps: Lines,
    evals: Lines,
    moments: Sequence[tuple[float, str]] = (),
    floors: Mapping[int, float] | None = None,
    twin: Lines = (),
):
    """Training and validation loss of one run over tokens, and over steps above.

    Args:
        moments: tokens at which something changed, and what.
        floors: what counting n-grams achieves, by order.
        twin: evaluations of another run.
    """
    figure, (ax,) = new_figure(4.2)
    tokens, raw = columns(steps, "tokens", "loss")
    last = draw_smoothed(ax, tokens, raw, GREY)
    at, values = columns(evals, "tokens", "val_loss")
    ax.plot(at, values, color=BLUE, linewidth=2, marker="o", markersize=4)
    end = Label(values[-1], f"validation  {values[-1]:.3f}", BLUE, "bold")
    labels = [
        end,
        Label(last, f"training  {last:.3f}"),
        *_draw_floors(ax, floors or {}),
    ]
    if twin:
        others, theirs = columns(twin, "tokens", "val_loss")
        ax.plot(others, theirs, color=ORANGE, linewidth=1.5, zorder=1)
        labels.append(Label(theirs[-1], f"beside it  {theirs[-1]:.3f}", ORANGE))
    end = max(tokens[-1], at[-1], *(line["tokens"] for line in twin))
    _draw_moments(ax, [moment for moment in moments if moment[0] <= end])
    set_tokens_axis(ax, end)
    each = tokens[-1] / steps[-1]["step"]
    above = ax.secondary_xaxis(
        "top", functions=(lambda x: x / each, lambda x: x * each)
    )
    above.tick_params(color="#999999", labelsize=8)
    above.set_xlabel("steps", fontsize=9)
    set_title(ax, "Loss, nats per token (training: faint, and its running mean)")
    label_ends(ax, labels)
    save(figure, path)


def _draw_floors(ax: Axes, floors: Mapping[int, float]) -> list[Label]:
    for loss in floors.values():
        ax.axhline(loss, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.7)
    return [
        Label(loss, f"{GRAM_NAMES.get(order, f'{order}-gram')}  {loss:.3f}")
        for order, loss in floors.items()
    ]


def _draw_moments(ax: Axes, moments: Sequence[tuple[float, str]]) -> None:
    for tokens, words in moments:
        ax.axvline(tokens, color=GREEN, linewidth=0.8, linestyle=(0, (1, 2)))
        where = {"transform": ax.get_xaxis_transform(), "rotation": 90}
        font = {"fontsize": 8, "color": GREEN, "ha": "right", "va": "top"}
        ax.text(tokens, 0.98, words, **where, **font)


def tile_usage(path: Path, usage: Sequence[Sequence[float]]):
    """Share of the assignments of each tile in each layer, over an even share."""
    shares = np.asarray(usage, float)
    layers, tiles = shares.shape
    load = shares * tiles
    figure, (ax,) = new_figure(1.15 + 0.42 * layers)
    high = max(2.0, float(load.max()))
    image = ax.pcolormesh(load, cmap="Blues", vmin=0, vmax=high, edgecolors="white")
    image.set_linewidth(2 if tiles <= 32 else 0.8)
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    shown = range(0, tiles, math.ceil(tiles / 16))
    ax.set_xticks([tile + 0.5 for tile in shown], [str(tile) for tile in shown])
    names = [f"layer {layer}" for layer in range(layers)]
    ax.set_yticks(np.arange(layers) + 0.5, names)
    ax.invert_yaxis()
    ax.set_xlabel("tile", fontsize=9)
    for (layer, tile), value in np.ndenumerate(load):
        text = "×" if value < DEAD else f"{value:.1f}" if tiles <= 16 else ""
        font = {"size": 8, "color": "white" if value > 0.6 * high else "#222222"}
        ax.text(tile + 0.5, layer + 0.5, text, ha="center", va="center", **font)
    set_title(ax, "Load of each tile (1 = an even share, × = dead)")
    if tiles > 16:
        bar = figure.colorbar(image, ax=ax, pad=0.015, fraction=0.03)
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0, labelsize=8)
    save(figure, path)


def routing_health(path: Path, steps: Lines, evals: Lines, tiles: int):
    """Entropy, stability and the auxiliary losses over tokens, a line a layer."""
    figure, axes = new_figure(5.6, rows=2, columns=2)
    tokens, balance, diversity = columns(
        steps, "tokens", "aux_balance", "aux_diversity"
    )
    entropy = entropy_share([line["routing_entropy"] for line in steps], tiles).T
    axes[0].set_ylim(min(0.65, entropy.min() - 0.03), 1.02)
    axes[0].axhline(HEALTHY_SHARE, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
    _layers(axes[0], tokens, entropy)
    set_title(axes[0], f"Entropy of tile use / ln {tiles} (dashed: {HEALTHY_SHARE})")
    axes[1].set_ylim(0, 1.02)
    if moved := [line for line in evals if line["routing_stability"]]:
        stability = np.asarray([line["routing_stability"] for line in moved], float).T
        _layers(axes[1], columns(moved, "tokens")[0], stability, marker="o")
    else:
        words, middle = "needs two evaluations", (0.5, 0.5)
        axes[1].text(
            *middle, words, color=GREY, ha="center", transform=axes[1].transAxes
        )
    set_title(axes[1], "Share of assignments kept")
    draw_smoothed(axes[2], tokens, balance, BLUE)
    set_title(axes[2], "Balance loss, all layers")
    draw_smoothed(axes[3], tokens, diversity, BLUE)
    set_title(axes[3], "Diversity loss, all layers")
    for ax in axes:
        set_tokens_axis(ax, float(max(tokens[-1], evals[-1]["tokens"])))
    save(figure, path)


def resources(path: Path, steps: Lines):
    """Tokens a second and memory over tokens."""
    figure, axes = new_figure(2.9, columns=2)
    tokens, speed, memory = columns(
        steps, "tokens", "tokens_per_second", "memory_bytes"
    )
    median = float(np.median(speed))
    axes[0].plot(tokens, speed, color=BLUE, linewidth=0.8, alpha=0.8)
    axes[0].axhline(median, color=ORANGE, linewidth=1.5)
    axes[0].yaxis.set_major_formatter(EngFormatter(sep=""))
    set_title(axes[0], f"Training tokens per second (median {median:,.0f})")
    axes[1].plot(tokens, memory / MIB, color=BLUE, linewidth=1.5)
    set_title(axes[1], f"Peak memory, MiB (last {memory[-1] / MIB:,.0f})")
    for ax, top in ((axes[0], np.quantile(speed, 0.99)), (axes[1], max(memory) / MIB)):
        ax.set_ylim(0, 1.15 * top or 1.0)
        set_tokens_axis(ax, tokens[-1])
    save(figure, path)


def new_figure(height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    """A figure of the pages' width and its axes, in rows."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes:
        ax.set_axisbelow(True)
        ax.grid(color="#e6e6e6", linewidth=0.8)
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color("#999999")
        ax.tick_params(color="#999999", labelsize=9)
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG without a date, so that the same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=150, metadata={"Software": None})


def set_title(ax: Axes, text: str) -> None:
    """A title above the left end of the axes."""
    ax.set_title(text, loc="left", fontsize=10.5, color="#222222")


def set_tokens_axis(ax: Axes, last: float) -> None:
    """Training tokens along x, from 0 to a little past `last`."""
    ax.set_xlim(0, 1.02 * last)
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.set_xlabel("training tokens", fontsize=9)


def columns(lines: Lines, *names: str) -> list[np.ndarray]:
    """The values of each name, one a line."""
    return [np.asarray([line[name] for line in lines], float) for name in names]


def draw_smoothed(ax: Axes, tokens: np.ndarray, values: np.ndarray, colour) -> float:
    """Plots values faintly and their running mean over them; returns the mean's end."""
    window = max(1, len(values) // 40)
    mean = np.convolve(values, np.full(window, 1 / window), mode="valid")
    ax.plot(tokens, values, color=colour, linewidth=0.6, alpha=0.3)
    middles = tokens[window // 2 :][: len(mean)]
    ax.plot(middles, mean, color=colour, linewidth=1.5)
    return float(mean[-1])


def _bars(ax: Axes, names, values, texts, colours) -> None:
    ax.barh(names, values, color=colours, height=0.6)
    ax.invert_yaxis()
    ax.grid(visible=False)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.tick_params(length=0, labelbottom=False)
    ax.set_xlim(0, 1.3 * max(values))
    for row, (value, text) in enumerate(zip(values, texts, strict=True)):
        ax.text(value, row, f" {text}", va="center", fontsize=9.5)


def _layers(ax: Axes, tokens, rows: np.ndarray, marker: str | None = None) -> None:
    """A line a layer, labelled at its end; of many layers only the first and last."""
    ramp = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.72, len(rows)))
    labels = []
    for layer, (row, colour) in enumerate(zip(rows, ramp, strict=True)):
        if marker:
            ax.plot(tokens, row, color=colour, lw=1.5, marker=marker, markersize=3)
            end = float(row[-1])
        else:
            end = draw_smoothed(ax, tokens, row, colour)
        if len(rows) <= 6 or layer in (0, len(rows) - 1):
            labels.append(Label(end, f"layer {layer}", colour))
    label_ends(ax, labels, size=8.0)


def label_ends(ax: Axes, labels: Sequence[Label], size: float = 9.5) -> None:
    """Writes labels beside the right edge, apart from each other, each with a leader.

    They stand at fractions of the y axis, whose limits stay as they are from here on.
    """
    low, high = ax.get_ylim()
    ax.set_ylim(low, high)
    wanted = np.asarray([(label.y - low) / (high - low) for label in labels])
    gap = 1.5 * size / 72 * ax.figure.dpi / ax.bbox.height
    for label, start, end in zip(labels, wanted, spread(wanted, gap), strict=True):
        where = {"color": label.colour, "transform": ax.transAxes}
        ax.plot((1, 1.03), (start, end), linewidth=0.7, clip_on=False, **where)
        font = {"fontsize": size, "fontweight": label.weight}
        ax.text(1.035, end, label.text, va="center", **font, **where)


def entropy_share(entropy: Any, tiles: int) -> np.ndarray:
    """`entropy / ln(tiles)`; 1 for a single tile."""
    entropy = np.asarray(entropy, float)
    return entropy / math.log(tiles) if tiles > 1 else np.ones_like(entropy)


def spread(wanted: np.ndarray, gap: float) -> np.ndarray:
    """The least-squares nearest places to `wanted` that keep order and a `gap` apart.

    Isotonic regression of `wanted - gap * rank`: neighbours that are too close become
    one block around their mean (pool adjacent violators).
    """
    order = np.argsort(wanted, kind="stable")
    ranks = gap * np.arange(len(order))
    blocks: list[tuple[float, int]] = []
    for value in wanted[order] - ranks:
        total, count = float(value), 1
        while blocks and blocks[-1][0] / blocks[-1][1] > total / count:
            total, count = total + blocks[-1][0], count + blocks[-1][1]
            blocks.pop()
        blocks.append((total, count))
    means = [total / count for total, count in blocks for _ in range(count)]
    placed = np.empty(len(order))
    placed[order] = np.asarray(means) + ranks
    return placed
