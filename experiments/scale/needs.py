"""What a run takes: the table of `modelled.json` and what its numbers are."""

from collections.abc import Sequence
from typing import Any

from experiments.scale.run import NAMES
from trix_jax.lm.experiment.tables import table

MIB = 2**20
DIGITS_UNDER = 20  # numbers that get a digit after the point


def needs_table(modelled: Sequence[dict[str, Any]]) -> str:
    """Memory and time of the lookup and its twin, and of all runs of an experiment."""
    rows = []
    for name in NAMES:
        own = {row["arm"]: row for row in modelled if row["experiment"] == name}
        pair = own["lookup"], own["dense"]
        peak = pair[0]["peak_bytes"]
        cells = [f"`{name}`", str(sum(row["runs"] for row in own.values()))]
        cells += [f"{pair[0]['tokens'] / 1e6:,.0f}M"]
        cells += [f"{peak / MIB:,.0f}" if peak else "-"]
        if pair[0]["h100_minutes"] is None:
            cells += ["-"] * 3
        else:
            each = [(row["runs"], row["h100_minutes"]) for row in own.values()]
            total = [sum(n * minutes[end] for n, minutes in each) for end in (0, 1)]
            ranges = [*(row["h100_minutes"] for row in pair), total]
            cells += [range_of(*minutes) for minutes in ranges]
        rows.append([*cells, *map(core_cell, pair)])
    head = "experiment;runs;tokens;peak MiB;H100 minutes, lookup;dense;all runs;core hours, lookup;dense"
    return table(head.split(";"), rows)


def range_of(low: float, high: float) -> str:
    """`1.0 to 1.3`, or one number where both ends are the same."""
    return " to ".join(dict.fromkeys(map(number, (low, high))))


def number(value: float) -> str:
    return f"{value:,.1f}" if value < DIGITS_UNDER else f"{value:,.0f}"


def core_cell(row: dict[str, Any]) -> str:
    """Core hours, bold where they are measured."""
    hours = row["core_hours"]
    if hours is None:
        return "-"
    return (
        f"**{hours:,.2f}**" if row["core_hours_from"] == "measured" else number(hours)
    )


def needs_note(modelled: dict[str, Any]) -> str:
    """What the numbers of the table are."""
    time = f"half a minute to compile, assumed, and {modelled['slack']:.0f} times the least time"
    if modelled["wait_seconds"] is None:
        time += f", as `{modelled['slack_from']}` measured."
    else:
        time += (
            f", or that time and {1e3 * modelled['wait_seconds']:.0f} ms a micro-batch. Both are what runs of "
            f"`{modelled['slack_from']}` took, seven at a time on an H100: if they filled it, and if each waited for "
            "something else. E1 to E4 have not run on a GPU."
        )
    core = "Nothing has been timed on a core."
    if modelled["core_from"]:
        core = (
            f"Core hours in bold are **measured** in `{modelled['core_from']}`: the fastest seed's whole run, "
            "on a core that others used too. The others are modelled by the multiply-accumulates a second of the same arm there."
        )
    return (
        "Tokens and memory are of `lookup`, memory as compiled for an H100. "
        f"Minutes are **modelled**, evaluations included: {time} {core}\n"
    )
