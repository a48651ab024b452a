"""Files of a measurement: `bench.json`, `bench.md` and a plot each of ratios and of
growth.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from trix_jax.lm.bench.growth import KINDS

COLOURS = ("#0072B2", "#D55E00", "#009E73")  # Okabe and Ito (2008)
AIMS = {
    "forward_vs_dense": 20.0,
    "forward_vs_one_tile": 0.33,
    "train_vs_dense": 10.0,
    "decode_vs_dense": 15.0,
    "packed_vs_unpacked": 0.9,
    "packed_ratio": 15.0,
}


def write(result: dict[str, Any], folder: str | Path) -> list[Path]:
    """Writes the files and returns their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "bench.json", folder / "bench.md", folder / "ratios.png"]
    files[0].write_text(json.dumps(result, indent=1) + "\n")
    files[1].write_text(markdown(result))
    _ratios(result["table"], files[2])
    for axis, row in result.get("growth", {}).items():
        files.append(folder / f"growth_{axis}.png")
        _growth(axis, row, files[-1])
    return files


def markdown(result: dict[str, Any]) -> str:
    """The tables: aims, shapes, growth; ratios below 1 are where TriX loses."""
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    lines = [f"{result['device']}; {versions}; {_rounds(result['rounds'])}\n"]
    lines += [
        "| ratio | measured | range of the rounds | aim |",
        "|---|---:|---:|---:|",
    ]
    for name, aim in AIMS.items():
        low_high = result["ranges"].get(name)
        spread = f"{low_high[0]:.2f} to {low_high[1]:.2f}" if low_high else ""
        lines.append(f"| `{name}` | {result[name]:.2f} | {spread} | {aim:g} |")
    keys = [k for row in result["table"] for k in row]
    keys = list(dict.fromkeys(keys))
    lines += ["", _row(keys), "|---" * len(keys) + "|"]
    lines += [_row([_cell(row.get(k)) for k in keys]) for row in result["table"]]
    for axis, row in result.get("growth", {}).items():
        lines += ["", f"Against {axis} ({_others(row)}):", ""]
        lines += ["| | time grows as | memory grows as |", "|---|---|---|"]
        for kind in KINDS:
            t, m = row[kind]["seconds_exponent"], row[kind]["bytes_exponent"]
            lines.append(f"| {kind} | {axis}^{t:.2f} | {axis}^{m:.2f} |")
    for name, value in result.get("around", {}).items():
        lines.append(f"\n`{name}`: {_cell(value)}")
    return "\n".join(lines) + "\n"


def _rounds(count: int) -> str:
    """How often what is timed was: a decoded token is quick, a dense FFN is slow."""
    fewer = max(count // 2, 2)
    return (
        f"medians of {count} rounds forward, {fewer} in training, {10 * count} in decoding; "
        f"shapes with hierarchical columns {fewer}, against dense 2."
    )


def _row(cells) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _others(row: dict[str, Any]) -> str:
    return ", ".join(f"{value} {name}" for name, value in row["others"].items())


def _ratios(table: list[dict[str, Any]], path: Path) -> None:
    """Every ratio of every shape on one logarithmic axis; left of 1 TriX loses."""
    names = list(dict.fromkeys(k for row in table for k in row if "_vs_" in k))
    figure, ax = _figure(1.2 + 0.35 * len(names))
    for row in table:
        is_float32 = row["dtype"] == "float32"
        label = f"{row['tiles']} tiles, {row['tokens']} tokens, {row['dtype']}"
        points = [(row[k], names.index(k)) for k in names if k in row]
        ax.plot(*zip(*points, strict=True), "o" if is_float32 else "x", label=label)
    ax.axvline(1, color="#666666", linewidth=0.8)
    ax.set_xscale("log")
    ax.set_yticks(range(len(names)), [n.replace("_", " ") for n in names])
    ax.invert_yaxis()
    ax.set_xlabel("times faster than the other; left of 1 TriX loses")
    ax.legend(fontsize=7, frameon=False)
    _save(figure, path)


def _growth(axis: str, row: dict[str, Any], path: Path) -> None:
    figure, (left, right) = _figure(3.6, columns=2)
    for ax, cost, unit in ((left, "seconds", 1.0), (right, "bytes", 2.0**20)):
        for kind, colour in zip(KINDS, COLOURS, strict=True):
            values = np.array(row[kind][cost], float) / unit
            label = f"{kind}: {axis}^{row[kind][f'{cost}_exponent']:.2f}"
            ax.plot(row["sizes"], values, "o-", color=colour, label=label)
        ax.set(xscale="log", yscale="log", xlabel=axis)
        ax.set_xticks(row["sizes"], [str(size) for size in row["sizes"]])
        ax.minorticks_off()
        ax.legend(fontsize=8, frameon=False)
    left.set_ylabel("seconds a call")
    right.set_ylabel("MiB held")
    figure.suptitle(f"Cost against {axis} ({_others(row)})", fontsize=11)
    _save(figure, path)


def _figure(height: float, columns: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(8.0, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Axes = figure.subplots(1, columns)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=150)
