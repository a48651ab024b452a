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

from experiments.scale import elsewhere
from experiments.scale.elsewhere import Evidence
from experiments.scale.needs import needs_note, needs_table
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
FIGURE = "results/report.png"
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
        answer(runs),
        "## The four models\n",
        models_table(runs, modelled["rows"]),
        NOTE,
        lookups_note(),
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


def answer(runs: Runs) -> str:
    """The verdicts, what they rest on, and how many runs there are."""
    every = [one for own in runs.values() for one in own]
    done = sum(one.is_finite for one in every)
    lost = len(every) - done
    known = elsewhere.of_claim(HYPOTHESIS)
    own, *_, plane = known
    shakespeare = elsewhere.read(elsewhere.SHAKESPEARE)
    losses = [
        statistics.fmean(one.val_loss for one in elsewhere.best(shakespeare, arm))
        for arm in (elsewhere.LOOKUP, elsewhere.NOTHING)
    ]
    return (
        f"**A lower loss than a dense FFN of equal parameters: {own.verdict} on TinyShakespeare, tuned; "
        f"{of_claim(runs, HYPOTHESIS)} on {where_decided(runs)}.**\n\n"
        f"- TinyShakespeare: the original's lookup layer ends {away(own)} a dense FFN with {own.share:.2f} of its FFN's "
        f"parameters, at {losses[0]:.3f}; a model without any FFN ends at {losses[1]:.3f}. `lookup-best` ends "
        f"{away(plane)} one with {plane.share:.2f} times its parameters: {plane.verdict}.\n"
        f"- E1 to E4: {done or 'no'} run{'' if done == 1 else 's'} "
        f"{'is' if done == 1 else 'are'} finished{f', {lost} diverged' if lost else ''}. "
        "No run is on FineWeb-Edu or on The Stack: English Wikipedia and Python packages stand for them.\n"
    )


def where_decided(runs: Runs) -> str:
    """The experiments that say it; all where none does."""
    pair, measures = HYPOTHESIS.pairs[0], HYPOTHESIS.measures
    names = [
        n for n, own in runs.items() if of_pair(own, pair, measures) != "undecided"
    ]
    if len(names) in (0, len(runs)):
        return "E1 to E4"
    return f"{', '.join(f'`{name}`' for name in names)}, untuned"


def away(one: Evidence) -> str:
    """`0.277 ± 0.040 nats above`."""
    found = one.found["val_loss"]
    assert found
    side = "above" if found.mean > 0 else "below"
    return f"{abs(found.mean):.3f} ± {found.half:.3f} nats {side}"


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
    rows.append(shakespeare_row())
    head = "model;asked;used;parameters;lookup;lookup-best;dense;lookup less dense;lower loss"
    return table(head.split(";"), rows, left=3)


def shakespeare_row() -> list[str]:
    """The same of the tuned lookup layers of `experiments/quality`."""
    known, runs = (
        elsewhere.of_claim(HYPOTHESIS)[0],
        elsewhere.read(elsewhere.SHAKESPEARE),
    )
    arms = (known.arm, elsewhere.PLANE, known.other)
    losses = [spread([o.val_loss for o in elsewhere.best(runs, arm)]) for arm in arms]
    size = f"{elsewhere.best(runs, known.arm)[0].params_total / 1e6:.1f}M"
    used = f"width 128, tuned (`{known.setting}`)"
    gap = shown(known.found["val_loss"])
    return ["TinyShakespeare", "-", used, size, *losses, gap, known.verdict]


def lookups_note() -> str:
    """What `lookup-best` is, and what has not run."""
    runs = elsewhere.read(elsewhere.SHAKESPEARE)
    (four,) = elsewhere.best(runs, elsewhere.FOUR)
    plane = elsewhere.best(runs, elsewhere.PLANE)
    (alike,) = (one for one in plane if one.seed == four.seed)
    many, clusters = (
        f"`{name}`: {f'{n} runs' if n else 'not run'}"
        for name, n in elsewhere.lookups_run().items()
    )
    return (
        f"`lookup-best` is the best lookup of {len(plane)} seeds: one cell a spline, by token. Four in parallel are ahead "
        f"at their one seed: {four.val_loss:.3f} beside {alike.val_loss:.3f} on TinyShakespeare. Many lookups a token, of "
        f"256 to 4,096 found by clusters, are {many}. Clusters beside flat routes are {clusters}.\n"
    )


NOTE = (
    "Loss in nats a token, mean over seeds with half the 95 % interval; a dash has not run. "
    "`lookup` is as asked, `dense` has the parameters of `lookup` (on TinyShakespeare fewer). "
    "All arms of E1 to E4 train at one rate, the original's (`e4-small`: that of E1); none is tuned. "
    "`e1-one-epoch` has that rate with 4,096 tokens a step, a sixteenth of the original's.\n"
)
REASONS_NOTE = (
    "The lookup's runs are E1 to E4; the sparse tiles' (four of sixteen, by token) are tuned ones of "
    "`experiments/quality`. A difference is the arm less the other, paired by seed; below zero supports the reason. In "
    "brackets is the dense FFN's compute over the arm's. The gap is validation loss less training loss, dropout "
    "included. One seed decides nothing. [ARMS.md](ARMS.md) has every arm and pair.\n"
)
ARMS_NOTE = (
    "No run is on FineWeb-Edu or on The Stack. Losses are in nats a token, means over seeds with half the 95 % "
    "interval. All arms train at the original's rate (`e4-small`: at that of E1); none is tuned. `e1-one-epoch` has "
    "that rate with 4,096 tokens a step, a sixteenth of the original's. TinyShakespeare, and English of width 256, "
    "are tuned runs of `experiments/quality`; in brackets is a dense FFN's width over the one that would be equal.\n"
)


def reasons_table(runs: Runs) -> str:
    """The verdicts on each reason, of the lookup and of the sparse tiles."""
    rows = []
    for claim in REASONS:
        arm, other = claim.pairs[0]
        own = [(f"`{n}`", shown_of(r, (arm, other), claim)) for n, r in runs.items()]
        told = "; ".join(f"{name} {text}" for name, text in own if text) or "not run"
        word = of_claim(runs, claim)
        reason = f"{claim.name}: {claim.by}"
        rows.append([reason, f"{arm} less {other}", told, f"**{word}**"])
        known = elsewhere.of_claim(claim)
        others = dict.fromkeys(one.pair.partition(" less ")[2] for one in known)
        told = "; ".join(f"{one.place} {told_of(one)}" for one in known)
        word = elsewhere.verdict_of(claim)
        rows.append(["", f"sparse less {', '.join(others)}", told, f"**{word}**"])
    return table("reason: decided by;pair;difference;verdict".split(";"), rows, left=3)


def shown_of(own: Sequence[Result], pair: tuple[str, str], claim: Claim) -> str:
    """The differences of a pair, nothing where no seed has both."""
    found = {m: difference(own, *pair, m) for m in claim.measures}
    named = {m: f"{WORDS[m]} " if len(found) > 1 else "" for m in found}
    return ", ".join(f"{named[m]}{shown(d)}" for m, d in found.items() if d)


def told_of(one: Evidence) -> str:
    """The same of a pair elsewhere; a gap that no run has is said."""
    named = {m: f"{WORDS[m]} " if len(one.found) > 1 else "" for m in one.found}
    cells = (f"{named[m]}{shown(d, 'not kept')}" for m, d in one.found.items())
    share = f" ({one.share:.2f})" if one.share else ""
    return ", ".join(cells) + share


def pair_rows(runs: Runs, claim: Claim) -> list[list[str]]:
    """Experiment and pair, difference, verdict; of what has run, here and elsewhere."""
    rows = []
    for name, own in runs.items():
        for pair in claim.pairs:
            word = of_pair(own, pair, claim.measures)
            if text := shown_of(own, pair, claim):
                rows.append([f"`{name}`: {' less '.join(pair)}", text, word])
    for one in elsewhere.of_claim(claim):
        rows.append([f"{one.place}: {one.pair}", told_of(one), one.verdict])
    return rows


def arms_parts(runs: Runs) -> list[str]:
    """Every claim with all of its pairs, and every arm of every experiment."""
    parts = []
    for claim in (HYPOTHESIS, *REASONS):
        head = ["experiment: pair", "difference", "verdict"]
        parts += [f"## {claim.name}\n", table(head, pair_rows(runs, claim))]
    for name, own in runs.items():
        if own:
            parts += [f"## Arms of `{name}`\n", arms_table(own)]
    return parts


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


def shown(found: Interval | None, absent: str = "-") -> str:
    """A difference with its interval."""
    if found is None:
        return absent
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
    lows, highs = zip(*(row["h100_minutes"] for row in rows), strict=True)
    widths = [max(high - low, low / 50) for low, high in zip(lows, highs, strict=True)]
    last.barh(names, widths, left=lows, color=CYCLE[0])
    last.set_xlim(left=0)
    for axes in panels[1 + len(done) :]:
        axes.set_axis_off()
    last.set_title("lookup: minutes a run on an H100, modelled", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main()
