"""Tables and the plot of the committed results: `python experiments/quality/report.py`."""

import json
import statistics
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "shakespeare-char.json"
COLOURS = ("#000000", "#0072b2", "#56b4e9", "#d55e00", "#009e73")
SWEPT = ("dense-512", "sparse-16-top4", "sparse-4", "hierarchical-16", "lookup-16")
NANOGPT_RATE = 1e-3


def main() -> None:
    runs = json.loads(RESULTS.read_text())
    by_arm = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        by_arm[run["arm"]][run["learning_rate"]][run["seed"]] = run
    best = {arm: best_rate(by_arm[arm]) for arm in SWEPT if arm in by_arm}
    plot(by_arm, best, HERE / "results" / "learning_rates.png")
    parts = [
        "Made by `python experiments/quality/report.py` from `results/`.\n",
        "![Loss over learning rate](results/learning_rates.png)\n",
        table_of_arms(by_arm, best),
        table_of_rates(by_arm),
        reproduction(by_arm["dense-512"][NANOGPT_RATE]),
        ablation(by_arm),
    ]
    (HERE / "REPORT.md").write_text(
        "# TinyShakespeare characters, nanoGPT's CPU shapes\n\n" + "\n".join(parts)
    )


def best_rate(rates: dict) -> float:
    """The rate with the lowest one-seed loss."""
    swept = {rate: runs[42]["val_loss"] for rate, runs in rates.items() if 42 in runs}
    return min(swept, key=lambda rate: swept[rate])


def table_of_arms(by_arm: dict, best: dict) -> str:
    rows = [
        "## Arms at their best rate\n",
        "| arm | rate | seeds | validation loss | active width | FFN bits | lowest "
        "entropy share | most dead tiles in a layer |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for arm, rate in sorted(
        best.items(), key=lambda item: mean(by_arm[item[0]], item[1])
    ):
        runs = list(by_arm[arm][rate].values())
        one = runs[0]
        entropy = (
            ""
            if arm == "dense-512"
            else f"{min(r['min_entropy_share'] for r in runs):.3f}"
        )
        dead = "" if arm == "dense-512" else str(max(r["dead_tiles"] for r in runs))
        rows.append(
            f"| {arm} | {rate:g}{edge(by_arm[arm], rate)} | {len(runs)} | {spread(runs)} | "
            f"{one['ffn_active'] / (2 * 128 * 4):.0f} | {one['ffn_bits']:,} | {entropy} | {dead} |"
        )
    return "\n".join(rows) + (
        "\n\nLoss: mean over seeds of the last evaluation, with the sample standard deviation. "
        "Active width: multiply-accumulates a token and layer over 2 D, routing scores included. "
        "Entropy and dead tiles: worst over all evaluations (every 500 steps) and layers. "
        "A star marks a rate whose neighbours in the grid have not both been run.\n"
    )


def edge(rates: dict, best: float) -> str:
    inside = {best / 2, best * 2} <= set(rates)
    return "" if inside else "*"


def mean(rates: dict, rate: float) -> float:
    return statistics.mean(run["val_loss"] for run in rates[rate].values())


def spread(runs: list[dict]) -> str:
    losses = [run["val_loss"] for run in runs]
    text = f"{statistics.mean(losses):.4f}"
    return text + (f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else "")


def table_of_rates(by_arm: dict) -> str:
    rates = sorted({rate for arm in SWEPT for rate in by_arm[arm]})
    rows = [
        "## The sweep, seed 42\n",
        "| arm | " + " | ".join(f"{rate:g}" for rate in rates) + " |",
        "|---|" + "---:|" * len(rates),
    ]
    for arm in SWEPT:
        cells = [by_arm[arm].get(rate, {}).get(42) for rate in rates]
        texts = [f"{run['val_loss']:.4f}" if run else "" for run in cells]
        rows.append(f"| {arm} | " + " | ".join(texts) + " |")
    return "\n".join(rows) + "\n"


def reproduction(runs: dict) -> str:
    losses = [run["val_loss"] for run in runs.values()]
    each = ", ".join(f"{loss:.4f}" for loss in losses)
    inside = all(1.85 <= loss <= 1.93 for loss in losses)
    return (
        "## nanoGPT's figure\n\n"
        f"Dense at its own rate of 1e-3, {len(losses)} seeds: {each}; "
        f"{'all' if inside else 'not all'} within 1.85 to 1.93 (its README says 1.88).\n"
    )


def ablation(by_arm: dict) -> str:
    rows = [
        "## The gate, sparse-16-top4 at 4e-3\n",
        "| gate | seeds | validation loss |",
        "|---|---:|---:|",
    ]
    arms = {"sigmoid": "sparse-16-top4"} | {
        gate: f"sparse-16-top4-gate-{gate}"
        for gate in ("softmax", "renormalized", "none")
    }
    for gate, arm in arms.items():
        if runs := list(by_arm[arm].get(4e-3, {}).values()):
            rows.append(f"| {gate} | {len(runs)} | {spread(runs)} |")
    return "\n".join(rows) + "\n"


def plot(by_arm: dict, best: dict, path: Path) -> None:
    figure = Figure(figsize=(8, 4.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    for arm, colour in zip(SWEPT, COLOURS, strict=True):
        points = sorted(
            (rate, runs[42]["val_loss"])
            for rate, runs in by_arm[arm].items()
            if 42 in runs
        )
        axes.plot(*zip(*points, strict=True), "o-", color=colour, lw=2, label=arm)
        if arm in best:
            losses = [run["val_loss"] for run in by_arm[arm][best[arm]].values()]
            axes.plot([best[arm]] * len(losses), losses, "_", color=colour, ms=12)
    axes.set_xscale("log", base=2)
    ticks = sorted({rate for arm in SWEPT for rate in by_arm[arm]})
    axes.set_xticks(ticks, [f"{rate:g}" for rate in ticks])
    axes.set_xlabel("peak learning rate")
    axes.set_title("Validation loss, nats a character", loc="left", fontsize=11)
    axes.grid(color="#e6e6e6")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
