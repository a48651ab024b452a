"""What opens the report: the claim in one figure and one table of at most eight rows, from
the results of `claim.py`; and `claim.json`. The whole ladder is the appendix's.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from experiments.quality import beside, claim_figure, curve
from experiments.quality.arms import Arm
from experiments.quality.claim import LADDER, WIDTHS, claim, held
from experiments.quality.claim_words import (
    estimate_text,
    tiles_in_words,
    worth_in_words,
)
from experiments.quality.design import SEEDS, Setting
from experiments.quality.worth import (
    Worth,
    best_at_all_widths,
    candidates,
    choosing,
    claim_tree,
    dense_curve,
    model_of,
    rank,
    worth,
)
from trix_jax.files import write_whole
from trix_jax.lm.experiment import results
from trix_jax.lm.experiment.results import Result
from trix_jax.lm.experiment.tables import rate_of, table
from trix_jax.lm.experiment.tuning import Tuned, tuned

VOCABULARY = 4096
FIGURE = "claim.png"
MOST_ROWS = 8  # of the table that opens the page
HEAD = (
    "FFN,D,rate,seeds,loss,bits a byte,compute width,memory width,equivalent width,"
    "multiplier,over compute,over memory,by pairs"
)
NOTE = (
    "Equivalent width: the dense width of equal loss, never extrapolated; `below` and `above` are off the curve. "
    "Multiplier: equivalent width over W, with its 95 %. "
    f"Seed {SEEDS[0]} chose the rates; where others have run, they alone conclude. "
    "A star marks a rate whose neighbours have not both been run.\n"
)
W = (
    "W, the width that an FFN takes, is the greater of compute a token and served memory, as the hidden width of a "
    "16-bit dense FFN."
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
    runs = in_order(on_a_curve(folder))
    if not runs:
        return []
    tree = claim_tree(runs, VOCABULARY)
    write_whole(
        folder / "results" / "claim.json",
        json.dumps(tree, indent=1, allow_nan=False) + "\n",
    )
    panels = {d: points(d, found) for d, found in runs.items()}
    claim_figure.draw(panels, folder / "results" / FIGURE)
    most, names, rows = MOST_ROWS // len(runs), named(runs), []
    for d, found in runs.items():
        rows += rows_of(d, found, names[d])[:most]
    return [
        "## What are tiles worth?\n",
        f"![Loss over W](results/{FIGURE})\n",
        table(HEAD.split(","), rows),
        NOTE,
        beside.ASSUMED,
    ]


def costs(folder: Path) -> list[str]:
    """What the page speaks of, beside the dense FFNs of its curve."""
    runs = in_order(on_a_curve(folder))
    names = named(runs)
    return beside.section(
        {
            d: (found, names[d], words_of(d, names[d]), place_of(d, found, names[d]))
            for d, found in runs.items()
        }
    )


def ladders(folder: Path) -> list[str]:
    """Every number of tiles, and the dense curve, of each width of the model."""
    parts = []
    for d, found in on_a_curve(folder).items():
        dense = dense_curve(claim(d), found)
        widths = ", ".join(
            f"{w}: {fmean(dense[w]):.4f} ({len(dense[w])})" for w in sorted(dense)
        )
        rows = table(HEAD.split(","), rows_of(d, found))
        said = f"Dense, in brackets the seeds that conclude: {widths}.\n"
        parts += [f"## The ladder, D = {d}\n", rows, said]
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
    """The arm of the greatest multiplier, by the seed that chooses; of those beyond the
    curve, and others that tie, the one of least loss.
    """

    def of_seed(arm: Arm) -> tuple[bool, float, float]:
        place = worth(claim(d), runs, arm, VOCABULARY, choosing)
        assert place is not None
        return rank(place)

    return max((arm for arm, *_ in places(d, runs)), key=of_seed).name


def named(runs: Runs) -> dict[int, str]:
    """The arm that the page speaks of at each width of the model: that of `claim.json`;
    before one has run at all of its widths, the best of each.
    """
    same = best_at_all_widths(runs, VOCABULARY)
    return {
        d: same[d].arm if d in same else chosen(d, found) for d, found in runs.items()
    }


def place_of(d: int, runs: Sequence[Result], name: str) -> Worth:
    """Where an arm that has a place is on the curve."""
    place = worth(claim(d), runs, claim(d).arm(name), VOCABULARY)
    assert place is not None
    return place


def in_order(runs: Runs) -> dict[int, Sequence[Result]]:
    """The widths of the model, those first whose best arm has most seeds."""
    names = named(runs)
    seeds = {d: place_of(d, found, names[d]).seeds for d, found in runs.items()}
    return {d: runs[d] for d in sorted(runs, key=lambda d: (-seeds[d], -d))}


def words_of(d: int, name: str) -> str:
    """What an arm is, in words."""
    return tiles_in_words(model_of(claim(d), claim(d).arm(name), VOCABULARY))


def said(runs: Runs) -> dict[int, str]:
    """What the page says of tiles at each width of the model."""
    found, seen = {}, set()
    for d, name in named(in_order(runs)).items():
        place = place_of(d, runs[d], name)
        words = words_of(d, name)
        text = worth_in_words(d, "the same" if words in seen else words, place)
        seen.add(words)
        rates = untuned(claim(d), runs[d], claim(d).arm(name), place)
        found[d] = " ".join([f"**{text[0]}**", *text[1:], *rates])
    return found


def points(d: int, runs: Sequence[Result]) -> list[claim_figure.Point]:
    """What the figure shows; the ladder has one label."""
    steps = {held(number).name for number in LADDER}
    return [
        claim_figure.Point(
            "4 ternary tiles by signatures that are held"
            if arm.name in steps
            else words_of(d, arm.name),
            place,
        )
        for arm, _, place in places(d, runs)
    ]


def untuned(
    setting: Setting, runs: Sequence[Result], arm: Arm, place: Worth
) -> list[str]:
    """Which rates behind a place on the curve are not bracketed, in a sentence."""
    beside = curve.neighbours(sorted(place.read.dense), place.equivalent.value)
    dense = [a for a in setting.groups["dense-curve"] if width_in(a.name) in beside]
    found = [tuned(runs, one.name, one.rate_of) for one in (arm, *dense)]
    names = [f"`{one.arm}`" for one in found if one and not one.is_bracketed]
    return [f"Rates not bracketed: {', '.join(names)}."] if names else []


def width_in(name: str) -> int:
    """The width of a dense FFN, by its name."""
    return int(name.rpartition("-")[2])


def rows_of(d: int, runs: Sequence[Result], first: str = "") -> list[list[str]]:
    """A row an arm: `first`, then greatest multiplier first."""
    rows = []
    for arm, one, place in sorted(
        places(d, runs),
        key=lambda row: (row[0].name != first, -row[2].multiplier.value),
    ):
        value, width = place.equivalent.value, place.width
        over = [estimate_text(alone(value / w), 2) for w in width]
        rows.append(
            [
                f"{words_of(d, arm.name)} (`{arm.name}`)",
                str(d),
                rate_of(one),
                str(place.seeds),
                f"{place.loss:.4f}",
                beside.bits(one, place.read.own),
                *(f"{w:.0f}" for w in width),
                estimate_text(place.equivalent, 0),
                estimate_text(place.multiplier, 2),
                *over,
                beside.by_pairs(d, runs, one, place),
            ]
        )
    return rows


def alone(value: float) -> curve.Estimate:
    """A number without an interval."""
    return curve.Estimate(value, value, value)
