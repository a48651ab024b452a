"""What opens the report: the claim in one figure and one table of at most eight rows, from
the results of `claim.py`; and `claim.json`. The whole ladder is the appendix's.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median

from matplotlib.figure import Figure

from experiments.quality import curve
from experiments.quality.arms import Arm
from experiments.quality.claim import LADDER, WIDTHS, claim, held
from experiments.quality.design import SEEDS, Setting
from experiments.quality.worth import (
    Worth,
    candidates,
    choosing,
    claim_tree,
    dense_curve,
    worth,
)
from trix_jax.files import write_whole
from trix_jax.lm.experiment import results
from trix_jax.lm.experiment.plots import STYLES, finish
from trix_jax.lm.experiment.results import Result
from trix_jax.lm.experiment.tables import rate_of, table
from trix_jax.lm.experiment.tuning import Tuned, tuned

VOCABULARY = 4096
FIGURE = "claim.png"
MOST_ROWS = 8  # of the table that opens the page
HEAD = "arm,D,rate,seeds,validation loss,compute width,memory width,equivalent width,multiplier,seconds a step"
NOTE = (
    "W: the greater of the compute width (multiply-accumulates a token as served over 2 D, routing included) "
    "and the memory width (served FFN bits, and what routing stores, over 16 bits a weight). Equivalent width: "
    "the dense width of equal loss, read off the dense curve, 95% by bootstrap over seeds, never extrapolated. "
    "Seconds: the median step, on cores that other work may have shared. "
    f"Seed {SEEDS[0]} chose the rates; where others have run, they alone conclude, those that the curve has too. A star marks a rate whose "
    "neighbours have not both been run.\n"
)

Runs = Mapping[int, Sequence[Result]]  # by the model's width


def read(folder: Path) -> dict[int, list[Result]]:
    """The results of every width that has some."""
    found = {
        d: results.read(folder / "results" / f"{claim(d).name}.json") for d in WIDTHS
    }
    return {d: runs for d, runs in found.items() if runs}


def section(folder: Path) -> list[str]:
    """The figure and the table, and `claim.json` beside the results; nothing before
    there are a curve and tiles on it.
    """
    runs = on_a_curve(folder)
    if not runs:
        return []
    tree = claim_tree(runs, VOCABULARY)
    write_whole(
        folder / "results" / "claim.json",
        json.dumps(tree, indent=1, allow_nan=False) + "\n",
    )
    draw(runs, folder / "results" / FIGURE)
    most = MOST_ROWS // len(runs)
    rows = [row for d, found in runs.items() for row in rows_of(d, found)[:most]]
    return [
        "## What are tiles worth?\n",
        f"![Loss over W](results/{FIGURE})\n",
        table(HEAD.split(","), rows),
        NOTE,
    ]


def ladders(folder: Path) -> list[str]:
    """Every number of tiles, and the dense curve, of each width of the model."""
    parts = []
    for d, found in on_a_curve(folder).items():
        dense = dense_curve(claim(d), found)
        widths = ", ".join(f"{w}: {fmean(dense[w]):.4f}" for w in sorted(dense))
        rows = table(HEAD.split(","), rows_of(d, found))
        parts += [f"## The ladder, D = {d}\n", rows, f"Dense: {widths}.\n"]
    return parts


def on_a_curve(folder: Path) -> dict[int, list[Result]]:
    """The widths of the model that have a dense curve, and tiles on it."""
    return {d: found for d, found in read(folder).items() if places(d, found)}


def places(d: int, runs: Sequence[Result]) -> list[tuple[Arm, Tuned, Worth]]:
    """The arms that the claim may be made with, if they have a place on the curve."""
    setting, found = claim(d), []
    for arm in candidates(d):
        one = tuned(runs, arm.name, arm.rate_of)
        place = worth(setting, runs, arm, VOCABULARY)
        if one is not None and place is not None:
            found.append((arm, one, place))
    return found


def chosen(d: int, runs: Sequence[Result]) -> str:
    """The arm of the greatest multiplier, by the seed that chooses."""

    def multiplier(arm: Arm) -> float:
        place = worth(claim(d), runs, arm, VOCABULARY, choosing)
        assert place is not None
        return place.multiplier.value

    return max((arm for arm, *_ in places(d, runs)), key=multiplier).name


def untuned(setting: Setting, runs: Sequence[Result], arm: Arm, place: Worth) -> str:
    """Which rates behind a place on the curve are not bracketed, in words."""
    widths = sorted(dense_curve(setting, runs))
    beside = curve.neighbours(widths, place.equivalent.value)
    dense = [a for a in setting.groups["dense-curve"] if width_in(a.name) in beside]
    found = [tuned(runs, one.name, one.rate_of) for one in (arm, *dense)]
    names = [f"`{one.arm}`" for one in found if one and not one.is_bracketed]
    return f", rates not bracketed of {' and '.join(names)}" if names else ""


def width_in(name: str) -> int:
    """The width of a dense FFN, by its name."""
    return int(name.rpartition("-")[2])


def rows_of(d: int, runs: Sequence[Result]) -> list[list[str]]:
    """A row an arm, greatest multiplier first."""
    rows = []
    for arm, one, place in sorted(
        places(d, runs), key=lambda row: -row[2].multiplier.value
    ):
        seconds = [
            run.tokens / run.steps / run.tokens_per_second
            for run in one.runs.values()
            if run.tokens and run.tokens_per_second
        ]
        rows.append(
            [
                arm.name,
                str(d),
                rate_of(one),
                str(place.seeds),
                f"{place.loss:.4f}",
                f"{place.width.compute:.0f}",
                f"{place.width.memory:.0f}",
                estimate_text(place.equivalent, 0),
                estimate_text(place.multiplier, 2),
                f"{median(seconds):.2f}" if seconds else "",
            ]
        )
    return rows


def estimate_text(found: curve.Estimate, digits: int) -> str:
    """A number with its interval; "below" and "above" for what is off the curve."""

    def text(value: float) -> str:
        if value == curve.BELOW:
            return "below"
        return "above" if value == curve.ABOVE else f"{value:.{digits}f}"

    middle, low, high = map(text, found)
    return middle if low == middle == high else f"{middle} ({low} to {high})"


def draw(runs: Runs, path: Path) -> None:
    """Loss over W, a panel a width of the model: the dense curve and what is on it."""
    figure = Figure(figsize=(5 * len(runs), 4), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(runs), squeeze=False)[0]
    for axes, (d, found) in zip(panels, runs.items(), strict=True):
        dense = dense_curve(claim(d), found)
        line = sorted((w, fmean(losses)) for w, losses in dense.items())
        axes.plot(*zip(*line, strict=True), "o-", color="black", label="dense")
        on_it = places(d, found)
        steps = {held(number).name for number in LADDER}
        colour = STYLES[0][0]
        points = [(p.width.greater, p.loss) for arm, _, p in on_it if arm.name in steps]
        if points:
            axes.plot(
                *zip(*points, strict=True), "D-", color=colour, label="tiles, held"
            )
        for (arm, _, place), (colour, _) in zip(
            [row for row in on_it if row[0].name not in steps],
            STYLES[1:],
            strict=False,
        ):
            axes.plot(
                place.width.greater, place.loss, "s", color=colour, label=arm.name
            )
        axes.set_xscale("log", base=2)
        ticks = [w for w, _ in line]
        axes.set_xticks(ticks, [str(w) for w in ticks])
        axes.minorticks_off()
        axes.set_xlabel(f"D = {d}: W, as the width of a dense FFN of 16 bits")
        finish(axes)
    figure.savefig(path)
