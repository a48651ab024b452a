"""REPORT.md: the original's four models with what was measured, from committed files.

python -m experiments.scale.page
"""

import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from experiments.scale.run import NAMES, read
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
    print(write(HERE))


def write(folder: Path) -> Path:
    """Writes the page and its figure from the folder's `results/`; returns the page."""
    runs = read_runs(folder / "results")
    modelled = read_json(folder / "results" / "modelled.json")
    draw(runs, modelled["rows"], folder / FIGURE)
    parts = [
        "# E1 to E4: is the lookup layer better than a dense one?\n",
        answer(runs, results.read(QUALITY)),
        "## The four models\n",
        models_table(runs, modelled["rows"]),
        NOTE,
        "## The hypothesis and its three reasons\n",
        reasons_table(runs),
        REASONS_NOTE,
        f"![Validation loss of every arm; modelled minutes of a run]({FIGURE})\n",
        *arms_tables(runs),
        "## What a run takes\n",
        needs_table(modelled["rows"]),
        needs_note(modelled),
        "## Data and commands\n",
        data_note(read_json(HERE / "code_packages.json")),
        COMMANDS,
    ]
    path = folder / "REPORT.md"
    write_whole(path, "\n".join(parts))
    return path


def read_runs(folder: Path) -> dict[str, list[Result]]:
    """The finished runs of every experiment."""
    every = {name: results.read(folder / f"{name}.json") for name in NAMES}
    return {name: [o for o in runs if o.is_finite] for name, runs in every.items()}


def answer(runs: Runs, quality: Sequence[Result]) -> str:
    """The verdict, what it rests on, and what is known from elsewhere."""
    word = of_claim(runs, HYPOTHESIS)
    done = sum(map(len, runs.values()))
    rates = [one for one in quality if one.arm == "lookup-16" and one.is_finite]
    best = min(rates, key=lambda one: one.val_loss).learning_rate
    losses = [one.val_loss for one in rates if one.learning_rate == best]
    nothing = [o for o in quality if o.arm == "lookup-16-nothing" and o.is_finite]
    rate = min(nothing, key=lambda one: one.val_loss).learning_rate
    none = [one.val_loss for one in nothing if one.learning_rate == rate]
    return (
        f"**A lower loss than a dense FFN of equal parameters: {word}.** "
        f"{done or 'No'} run{'' if done == 1 else 's'} of these experiments "
        f"{'is' if done == 1 else 'are'} finished.\n"
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
    "All arms of an experiment train at one rate, the original's; none is tuned.\n"
)
REASONS_NOTE = (
    "A difference is the arm less the other, paired by seed; below zero supports the claim. "
    "The arm `lookup` decides, `sparse` (the recommended layer) stands beside it. "
    "The gap is validation loss less training loss, dropout included. One seed decides nothing.\n"
)


def reasons_table(runs: Runs) -> str:
    """The verdict on each claim, then what every experiment says of it."""
    rows = []
    for claim in (HYPOTHESIS, *REASONS):
        rows.append([claim.name, claim.by, "", "", "", f"**{of_claim(runs, claim)}**"])
        for name, own in runs.items():
            rows += [row for row in _pair_rows(name, own, claim) if row[4]]
    head = "claim;decided by;experiment;arm less other;difference;verdict"
    return table(head.split(";"), rows, left=4)


def _pair_rows(name: str, own: Sequence[Result], claim: Claim) -> list[list[str]]:
    rows = []
    for arm, other in claim.pairs:
        found = {m: difference(own, arm, other, m) for m in claim.measures}
        text = ", ".join(f"{WORDS[m]} {shown(d)}" for m, d in found.items() if d)
        word = of_pair(own, (arm, other), claim.measures)
        rows.append(["", "", f"`{name}`", f"{arm} less {other}", text, word])
    return rows


def arms_tables(runs: Runs) -> list[str]:
    """Every arm of every experiment that has a finished run."""
    parts = []
    for name, own in runs.items():
        arms = sorted(by_arm(own).values(), key=mean_loss)
        rows = [
            [
                each[0].arm,
                str(len(each)),
                spread([one.val_loss for one in each]),
                f"{statistics.fmean(o.val_ppl or 0 for o in each):.1f}",
                f"{each[0].params_total:,}",
                f"{each[0].ffn_active:,}",
                f"{each[0].ffn_bits / 8e3:,.0f}",
                f"{statistics.fmean(o.seconds or 0 for o in each) / 60:,.0f}",
            ]
            for each in arms
        ]
        head = "arm;seeds;loss;perplexity;parameters;FFN MACs a token;FFN kB;minutes"
        if rows:
            parts += [f"## Arms of `{name}`\n", table(head.split(";"), rows)]
    return parts


def by_arm(own: Sequence[Result]) -> dict[str, list[Result]]:
    """Runs by arm, in the order they come."""
    found: dict[str, list[Result]] = {}
    for one in own:
        found.setdefault(one.arm, []).append(one)
    return found


def needs_table(modelled: Sequence[dict[str, Any]]) -> str:
    """Memory and time of the lookup and of all runs of an experiment."""
    rows = []
    for name in NAMES:
        own = {row["arm"]: row for row in modelled if row["experiment"] == name}
        specs, one = read(name).specs, own["lookup"]
        peak, core = one["peak_bytes"], one["core_hours"]
        cells = [f"`{name}`", str(len(specs)), f"{one['tokens'] / 1e6:,.0f}M"]
        cells += [f"{peak / MIB:,.0f}" if peak else "-"]
        if one["h100_minutes"] is None:
            cells += ["-", "-"]
        else:
            total = sum(own[spec.arm]["h100_minutes"] for spec in specs)
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
        core = f"Core hours follow from the speed of {modelled['core_from']}, on a core that others used too."
    return (
        "Tokens, memory and minutes are of one run of `lookup`. Memory is that of the step compiled for an "
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
    """`5.936 ± 0.053 (3)`, or a dash."""
    losses = [one.val_loss for one in own if one.arm == arm]
    return spread(losses) if losses else "-"


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
    size = (5 * (1 + len(done)), 4)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    panels = figure.subplots(1, 1 + len(done), squeeze=False)[0]
    for axes, (name, arms) in zip(panels, done.items(), strict=False):
        ordered = sorted(arms.values(), key=mean_loss, reverse=True)
        for at, each in enumerate(ordered):
            colour = CYCLE[each[0].is_dense]
            axes.plot([o.val_loss for o in each], [at] * len(each), "o", color=colour)
        axes.set_yticks(range(len(ordered)), [each[0].arm for each in ordered])
        axes.set_title(f"{name}: validation loss, nats a token", fontsize=10)
    rows = [r for r in modelled if r["arm"] == "lookup" and r["h100_minutes"]]
    names = [row["experiment"] for row in rows]
    panels[-1].barh(names, [row["h100_minutes"] for row in rows], color=CYCLE[0])
    panels[-1].set_title("lookup: minutes a run on an H100, modelled", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main()
