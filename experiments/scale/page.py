"""The pages of this folder, from committed files.

    python -m experiments.scale.page

REPORT.md has the original's four models with what was measured, and the verdicts, in at
most 1,200 words; ARMS.md every arm and every pair.
"""

import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from experiments.scale.run import NAMES
from experiments.scale.verdicts import (
    HYPOTHESIS,
    REASONS,
    Claim,
    Runs,
    difference,
    of_claim,
    of_pair,
)
from trix_jax.files import read_json, write_whole
from trix_jax.lm.experiment import results
from trix_jax.lm.experiment.plots import CYCLE
from trix_jax.lm.experiment.results import Result
from trix_jax.lm.experiment.stats import Interval, spread
from trix_jax.lm.experiment.tables import mean_loss, table

HERE = Path(__file__).parent
QUALITY = HERE.parent / "quality" / "results" / "shakespeare-char.json"
FIGURE = "results/report.png"
MIB = 2**20
# What the original takes a lower loss from, in the words of its measures.
WORDS = {"val_loss": "loss", "train_val_gap": "gap"}
SEVERAL = 2


class Model(NamedTuple):
    """A row of the original's table.

    Attributes:
        asked: the original's data.
        used: ours, by experiment.
    """

    name: str
    asked: str
    used: dict[str, str]


MODELS = (
    Model(
        "E1, trix-tiny",
        "FineWeb-Edu, 5M x 10",
        {
            "e1": "Wikipedia, 5M x 10",
            "e1-one-epoch": "Wikipedia, 5M, one epoch",
        },
    ),
    Model("E2, trix-small", "FineWeb-Edu, 50M x 4", {"e2": "Wikipedia, 25M x 8"}),
    Model("E3, trix-medium", "FineWeb-Edu, 500M x 2", {"e3": "Wikipedia, 60M x 16.7"}),
    Model(
        "E4, trix-code",
        "The Stack v2, 250M x 3",
        {
            "e4": "Python packages, 50M x 15",
            "e4-small": "Python packages, 5M, shrunk, one epoch",
        },
    ),
)


def main() -> None:
    """Writes them."""
    print(write(HERE))


def write(folder: Path) -> Path:
    """Writes the pages and the figure from the folder's `results/`; returns the first."""
    runs = read_runs(folder / "results")
    modelled = read_json(folder / "results" / "modelled.json")
    draw(runs, modelled["rows"], folder / FIGURE)
    parts = [
        "# E1 to E4: is the lookup layer better than a dense one?\n",
        answer(runs, results.read(QUALITY)),
        "## The four models\n",
        models_table(runs, modelled["rows"]),
        NOTE,
        "## The three reasons\n",
        reasons_table(runs),
        REASONS_NOTE,
        f"![Validation loss of every arm; modelled minutes of a run]({FIGURE})\n",
        "## What a run takes\n",
        needs_table(modelled["rows"]),
        needs_note(modelled),
        "## Data and commands\n",
        data_note(read_json(HERE / "code_packages.json")),
        COMMANDS,
    ]
    arms = ["# Every arm of E1 to E4\n", ARMS_NOTE, *arms_parts(runs)]
    write_whole(folder / "ARMS.md", "\n".join(arms))
    path = folder / "REPORT.md"
    write_whole(path, "\n".join(parts))
    return path


def read_runs(folder: Path) -> dict[str, list[Result]]:
    """The runs of every experiment that are finished or diverged."""
    return {name: results.read(folder / f"{name}.json") for name in NAMES}


def answer(runs: Runs, quality: Sequence[Result]) -> str:
    """The verdict, what it rests on, and what is known from elsewhere."""
    word = of_claim(runs, HYPOTHESIS)
    every = [one for own in runs.values() for one in own]
    done = sum(one.is_finite for one in every)
    lost = len(every) - done
    rates = [one for one in quality if one.arm == "lookup-16" and one.is_finite]
    best = min(rates, key=lambda one: one.val_loss).learning_rate
    losses = [one.val_loss for one in rates if one.learning_rate == best]
    nothing = [o for o in quality if o.arm == "lookup-16-nothing" and o.is_finite]
    rate = min(nothing, key=lambda one: one.val_loss).learning_rate
    none = [one.val_loss for one in nothing if one.learning_rate == rate]
    return (
        f"**A lower loss than a dense FFN of equal parameters: {word}.** "
        f"{done or 'No'} run{'' if done == 1 else 's'} of these experiments "
        f"{'is' if done == 1 else 'are'} finished{f', {lost} diverged' if lost else ''}.\n"
        "No run is on FineWeb-Edu or on The Stack: English Wikipedia and Python packages stand for them.\n"
        "On TinyShakespeare, where rates are tuned, the original's lookup layer ends at "
        f"{statistics.fmean(losses):.3f} nats, and a model without any FFN at "
        f"{statistics.fmean(none):.3f}.\n"
    )


def models_table(runs: Runs, modelled: Sequence[dict[str, Any]]) -> str:
    """The original's table, with what was measured beside what was asked."""
    params = {(row["experiment"], row["arm"]): row["params"] for row in modelled}
    rows = []
    for model in MODELS:
        for name, used in model.used.items():
            own = runs[name]
            cells = [losses_of(own, arm) for arm in ("lookup", "lookup-best", "dense")]
            gap = shown(difference(own, "lookup", "dense"))
            word = of_pair(own, HYPOTHESIS.pairs[0], HYPOTHESIS.measures)
            size = f"{params[name, 'lookup'] / 1e6:.1f}M"
            asked = [model.name, model.asked, f"{used} (`{name}`)", size]
            rows.append([*asked, *cells, gap, word])
    head = "model;asked;used;parameters;lookup;lookup-best;dense;lookup less dense;lower loss"
    return table(head.split(";"), rows, left=3)


NOTE = (
    "Loss in nats a token, mean over seeds with half the 95 % interval; a dash has not run. "
    "`lookup` is as asked, `lookup-best` the best lookup known, `dense` has the parameters of `lookup`. "
    "All arms of an experiment train at one rate, the original's (`e4-small`: that of E1); none is tuned.\n"
)
REASONS_NOTE = (
    "A difference is the arm less the other, paired by seed; below zero supports the reason. "
    "The gap is validation loss less training loss, dropout included. One seed decides nothing. "
    "[ARMS.md](ARMS.md) has every arm, and the same of the recommended layer.\n"
)
ARMS_NOTE = (
    "No run is on FineWeb-Edu or on The Stack. Losses are in nats a token, means over seeds with half the 95 % "
    "interval. All arms train at the original's rate (`e4-small`: at that of E1); none is tuned.\n"
)


def reasons_table(runs: Runs) -> str:
    """The verdict on each reason, and what every experiment says of the lookup."""
    rows = []
    for claim in REASONS:
        word, first = f"**{of_claim(runs, claim)}**", claim.pairs[:1]
        rows.append([claim.name, claim.by, "", "", word])
        rows += [["", "", *row] for row in pair_rows(runs, claim, first)]
    return table(
        "reason;decided by;experiment: pair;difference;verdict".split(";"), rows, left=3
    )


def pair_rows(
    runs: Runs, claim: Claim, pairs: Sequence[tuple[str, str]]
) -> list[list[str]]:
    """Experiment and pair, difference, verdict; of what has run."""
    rows = []
    for name, own in runs.items():
        for arm, other in pairs:
            found = {m: difference(own, arm, other, m) for m in claim.measures}
            named = {m: f"{WORDS[m]} " if len(found) > 1 else "" for m in found}
            text = ", ".join(f"{named[m]}{shown(d)}" for m, d in found.items() if d)
            word = of_pair(own, (arm, other), claim.measures)
            if text:
                rows.append([f"`{name}`: {arm} less {other}", text, word])
    return rows


def arms_parts(runs: Runs) -> list[str]:
    """Every claim with all of its pairs, and every arm of every experiment."""
    parts = []
    for claim in (HYPOTHESIS, *REASONS):
        if rows := pair_rows(runs, claim, claim.pairs):
            head = ["experiment: pair", "difference", "verdict"]
            parts += [f"## {claim.name}\n", table(head, rows)]
    for name, own in runs.items():
        if own:
            parts += [f"## Arms of `{name}`\n", arms_table(own)]
    return parts or ["No run is finished.\n"]


def arms_table(own: Sequence[Result]) -> str:
    """The arms of an experiment, lowest loss first."""
    rows = [
        [
            each[0].arm,
            f"{len(each)}{lost_of(own, each[0].arm)}",
            spread([one.val_loss for one in each]),
            f"{statistics.fmean(o.val_ppl or 0 for o in each):.1f}",
            f"{statistics.fmean(o.train_val_gap or 0 for o in each):+.3f}",
            f"{each[0].params_total:,}",
            f"{each[0].ffn_active:,}",
            f"{each[0].ffn_bits / 8e3:,.0f}",
            f"{statistics.fmean(o.seconds or 0 for o in each) / 60:,.0f}",
        ]
        for each in sorted(by_arm(own).values(), key=mean_loss)
    ]
    none_left = {one.arm for one in own} - by_arm(own).keys()
    rows += [[arm, f"0{lost_of(own, arm)}", *["-"] * 7] for arm in sorted(none_left)]
    head = "arm;seeds;loss;perplexity;gap;parameters;FFN MACs a token;FFN kB;minutes"
    return table(head.split(";"), rows)


def by_arm(own: Sequence[Result]) -> dict[str, list[Result]]:
    """Runs that have a loss, by arm, in the order they come."""
    found: dict[str, list[Result]] = {}
    for one in own:
        if one.is_finite:
            found.setdefault(one.arm, []).append(one)
    return found


def lost_of(own: Sequence[Result], arm: str) -> str:
    """` (1 diverged)`, of an arm; nothing where none did."""
    lost = sum(one.arm == arm and not one.is_finite for one in own)
    return f" ({lost} diverged)" if lost else ""


def needs_table(modelled: Sequence[dict[str, Any]]) -> str:
    """Memory and time of the lookup and of all runs of an experiment."""
    rows = []
    for name in NAMES:
        own = {row["arm"]: row for row in modelled if row["experiment"] == name}
        one = own["lookup"]
        peak, core = one["peak_bytes"], one["core_hours"]
        cells = [f"`{name}`", str(sum(row["runs"] for row in own.values()))]
        cells += [f"{one['tokens'] / 1e6:,.0f}M"]
        cells += [f"{peak / MIB:,.0f}" if peak else "-"]
        if one["h100_minutes"] is None:
            cells += ["-", "-"]
        else:
            total = sum(row["runs"] * row["h100_minutes"] for row in own.values())
            cells += [f"{one['h100_minutes']:,.1f}", f"{total:,.0f}"]
        rows.append([*cells, f"{core:,.1f}" if core else "-"])
    head = "experiment;runs;tokens;peak MiB;H100 minutes;all runs;core hours"
    return table(head.split(";"), rows)


def needs_note(modelled: dict[str, Any]) -> str:
    """What the numbers of the table are."""
    slack = f"{modelled['slack']:.1f} times the least step"
    if modelled["slack_from"] == "assumed":
        slack += ", which is assumed: nothing has run on a GPU"
    else:
        slack += f", as `{modelled['slack_from']}` measured"
    core = "Nothing has been timed on a core."
    if modelled["core_from"]:
        core = (
            "Core hours are modelled too, by the median multiply-accumulates a second over the arms of "
            f"{modelled['core_from']}, on a core that others used too; single arms differ from it."
        )
    return (
        "Tokens, memory, minutes and core hours are of one run of `lookup`. Memory is that of the step compiled for an "
        "H100; a dash was not compiled. Minutes are **modelled**, compilation not counted: "
        f"{slack}. {core}\n"
    )


def data_note(packages: Sequence[dict[str, Any]]) -> str:
    """Where the text comes from."""
    counts = Counter(one["licence"] for one in packages)
    licences = ", ".join(f"{name} {n}" for name, n in counts.most_common())
    val = ", ".join(one["name"] for one in packages if one["side"] == "val")
    size = sum(one["bytes"] for one in packages) / 1e6
    return (
        "Wikipedia is a folder of parquet files with a column `text`. The code is "
        f"{len(packages)} packages, {size:,.0f} MB ({licences}); `code_packages.json` has the "
        f"licence of each. Validation is whole packages: {val}.\n"
    )


COMMANDS = """```sh
python -m experiments.scale.run e1 --data FOLDER --runs DIR --slots 4   # a GPU; also e2, e3
python -m experiments.scale.run e1-one-epoch --data FOLDER --runs DIR   # a CPU, one core a run
python -m experiments.scale.code_corpus CODE                            # downloads the packages
python -m experiments.scale.run e4 --data CODE --runs DIR               # a GPU; e4-small on a CPU
python -m experiments.scale.modelled                                    # memory and time
python -m experiments.scale.page                                        # this page
```
"""


def losses_of(own: Sequence[Result], arm: str) -> str:
    """`5.936 ± 0.053 (3)`, or a dash, and how many seeds diverged."""
    losses = [one.val_loss for one in by_arm(own).get(arm, ())]
    return (spread(losses) if losses else "-") + lost_of(own, arm)


def shown(found: Interval | None) -> str:
    """A difference with its interval."""
    if found is None:
        return "-"
    if found.n < SEVERAL:
        return f"{found.mean:+.4f} (one seed)"
    return f"{found.mean:+.4f} ± {found.half:.4f}"


def draw(runs: Runs, modelled: Sequence[dict[str, Any]], path: Path) -> None:
    """Losses by arm, a panel an experiment that has run, and the minutes of a run."""
    done = {name: by_arm(own) for name, own in runs.items() if own}
    across, down = min(3, 1 + len(done)), 1 + len(done) // 3
    figure = Figure(figsize=(5 * across, 4 * down), dpi=90, layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flat
    for axes, (name, arms) in zip(panels, done.items(), strict=False):
        ordered = sorted(arms.values(), key=mean_loss, reverse=True)
        for at, each in enumerate(ordered):
            colour = CYCLE[each[0].is_dense]
            axes.plot([o.val_loss for o in each], [at] * len(each), "o", color=colour)
        axes.set_yticks(range(len(ordered)), [each[0].arm for each in ordered])
        axes.set_title(f"{name}: validation loss, nats a token", fontsize=10)
    rows = [r for r in modelled if r["arm"] == "lookup" and r["h100_minutes"]]
    names, last = [row["experiment"] for row in rows], panels[len(done)]
    last.barh(names, [row["h100_minutes"] for row in rows], color=CYCLE[0])
    for axes in panels[1 + len(done) :]:
        axes.set_axis_off()
    last.set_title("lookup: minutes a run on an H100, modelled", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main()
