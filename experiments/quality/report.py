"""Every table and plot from the committed results.

    python -m experiments.quality.report

reads `results/*.json` and writes `REPORT.md` and `results/*.png`.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from experiments.quality import curve, doing_table, plots, results
from experiments.quality.arms import BEST, HIDDEN
from experiments.quality.design import SEEDS, SETTINGS, Setting
from experiments.quality.results import Result, Tuned, tuned
from experiments.quality.tables import (
    arms_table,
    dense_losses,
    dense_table,
    difference_table,
    mean_loss,
    sweep_table,
)
from experiments.quality.targets import targets_table

HERE = Path(__file__).parent
NANOGPT = ("dense-512", 1e-3, (1.85, 1.93))  # its README says 1.88
# What the targets call a way to route, and its arm.
CONTROLS = {
    "a learned router by token": f"{BEST}-learned",
    "a learned router by hidden state": f"{HIDDEN}-learned",
    "token hash": f"{HIDDEN}-hash",
    "frozen random by token": f"{BEST}-random",
    "frozen random by hidden state": f"{HIDDEN}-random",
}
PAIRED = "Differences are paired by seed: positive is worse."
COMPARED = (
    (
        "routes",
        BEST,
        f"Who chooses the tiles of {BEST}",
        f"{PAIRED} Arms with `embedding` look at the token's row of the embedding table, the others at the "
        "hidden state; the hash gives each token id a set of tiles and has no gate.",
    ),
    ("floats", BEST, "Ternary against float weights", PAIRED),
    (
        "ablations",
        BEST,
        f"Ablations of {BEST}",
        f"{PAIRED} What has no flag is in `patches.py`.",
    ),
    ("together", f"{BEST}-late", "With late quantization", PAIRED),
    ("lookups", "lookup-16", "Where the lookup loses", PAIRED),
    (
        "on-the-way",
        HIDDEN,
        f"From {HIDDEN} to {BEST}",
        f"{PAIRED} `token` replaces the hidden state by a fixed random vector of the token id, `hash-gated` gives "
        "hashed tiles the gates of their signatures, `half-hashed` takes two tiles by hash and two by signature.",
    ),
)
NOTE = (
    "Loss: mean over seeds of the last evaluation, with its 95% t-interval. A star marks a rate "
    "whose neighbours, a factor of two away, have not both been run. Active width: multiply-"
    "accumulates a token and layer over 2 D, routing scores included. Equivalent dense width: read "
    "off the curve, 95% by bootstrap over seeds; never extrapolated. Equal: the dense width with "
    "the arm's parameters, compute or bits (dense at 16), and the curve's loss there. Entropy (as "
    "a share of ln N) and dead tiles: the worst of all evaluations, layers and seeds.\n"
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=HERE, help="holds results/")
    folder = parser.parse_args(argv).folder
    parts = [
        "# Does it win?\n",
        "Made by `python -m experiments.quality.report` from `results/`; the plan is `design.py`.\n",
    ]
    for setting in SETTINGS.values():
        runs = results.read(folder / "results" / f"{setting.name}.json")
        if runs:
            parts += section(setting, runs, folder / "results")
    parts += doing_table.section(folder / "results")
    parts += protocol(folder / "results" / "original-protocol.json")
    text = "\n".join(parts)
    (folder / "REPORT.md").write_text(text, encoding="utf-8")


def section(setting: Setting, runs: Sequence[Result], folder: Path) -> list[str]:
    """What one setting says."""
    dense = {
        arm.one["width"]: arm
        for arm in of_groups(setting, runs, "dense-curve", "dense-wide")
    }
    arms = of_groups(setting, runs, "arms")
    parts = [
        f"## {setting.name}\n",
        f"{len(runs)} runs of `{f'{setting.preset} {setting.flags}'.strip()}`.\n",
    ]
    if len(dense) > 1 and arms:
        parts += on_the_curve(setting, arms, dense, folder)
        parts += targets(runs, arms, dense)
    for group, base, title, note in COMPARED:
        parts += compared(setting, runs, group, base, title, note)
    parts += seed_table(setting, runs)
    return [*parts, *sweeps(setting, runs, folder), *nanogpt(runs)]


def of_groups(setting: Setting, runs: Sequence[Result], *groups: str) -> list[Tuned]:
    """The arms of some groups that have runs, each at its best rate."""
    arms = [arm for group in groups for arm in setting.groups.get(group, ())]
    found = [tuned(runs, arm.name, arm.rate_of) for arm in arms]
    return [arm for arm in found if arm is not None]


def on_the_curve(setting, arms, dense, folder) -> list[str]:
    steps = curve.doublings(dense_losses(dense), [mean_loss(arm) for arm in arms])
    plots.losses_over_width(arms, dense, folder / f"{setting.name}-width.png")
    return [
        "### The instrument: the dense curve\n",
        dense_table(dense, steps),
        resolution(steps, dense),
        "### Arms on the curve\n",
        f"![Loss over width](results/{setting.name}-width.png)\n",
        arms_table(arms, dense),
        NOTE,
    ]


def resolution(steps: Sequence[curve.Doubling], dense: dict[int, Tuned]) -> str:
    """Whether the setting carries comparisons, in words."""
    few = [str(w) for w in sorted(dense) if len(dense[w].runs) < 3]
    open_ = [str(w) for w in sorted(dense) if not dense[w].is_bracketed]
    does = "carries" if curve.carries(steps) else "does not carry"
    text = (
        f"By the rule (every doubling from the first to the last that arms fall in is worth at "
        f"least three standard errors) this setting **{does}** comparisons."
    )
    if few:
        text += f" Provisional: fewer than three seeds at width {', '.join(few)}."
    if open_:
        text += f" Rates not yet bracketed at width {', '.join(open_)}."
    return text + "\n"


def targets(runs, arms, dense) -> list[str]:
    base = tuned(runs, BEST)
    if base is None:
        return []
    found = {name: tuned(runs, arm) for name, arm in CONTROLS.items()}
    present = {name: arm for name, arm in found.items() if arm is not None}
    return ["### Targets of the issue\n", targets_table(arms, present, base, dense)]


def compared(
    setting: Setting,
    runs: Sequence[Result],
    group: str,
    base_name: str,
    title: str,
    note: str,
) -> list[str]:
    """Every arm of a group against one, paired by seed."""
    base, rows = tuned(runs, base_name), []
    if base is None or group not in setting.groups:
        return []
    for arm in setting.groups[group]:
        found = tuned(runs, arm.name, arm.rate_of)
        if found and arm.name != base_name:
            rows.append(("inherited" if arm.rate_of else "its own", found))
    if left := not_run(setting, runs, group):
        note += f" Planned and not run: {', '.join(left)}."
    table = [difference_table(rows, base, "arm")] if rows else []
    return [f"### {title}\n", *table, f"{note}\n"]


def seed_table(setting: Setting, runs: Sequence[Result]) -> list[str]:
    arms = of_groups(setting, runs, "seed-table")
    if len(arms) != 2:
        return []
    first, second = arms
    return [
        f"### Is {first.arm} better than {second.arm}?\n",
        "The request says that Hierarchical-16 beats Sparse-4, by 13.4% of perplexity.\n",
        difference_table([("its own", first)], second, "arm"),
    ]


def not_run(setting: Setting, runs: Sequence[Result], group: str) -> list[str]:
    have = {run["arm"] for run in runs}
    return [arm.name for arm in setting.groups[group] if arm.name not in have]


def sweeps(setting: Setting, runs: Sequence[Result], folder: Path) -> list[str]:
    have = {run["arm"] for run in runs if run["seed"] == SEEDS[0]}
    names = list(dict.fromkeys(arm.name for g in setting.groups.values() for arm in g))
    groups = [setting.groups.get(group, ()) for group in ("arms", "routes")]
    panels = [
        [n for n in names if n in have and n.startswith("dense-")],
        *([arm.name for arm in group if arm.name in have] for group in groups),
    ]
    panels = [panel for panel in panels if panel]
    plots.losses_over_rate(runs, panels, SEEDS[0], folder / f"{setting.name}-rates.png")
    return [
        f"### The sweeps, seed {SEEDS[0]}\n",
        f"![Loss over learning rate](results/{setting.name}-rates.png)\n",
        sweep_table(runs, [n for n in names if n in have], SEEDS[0]),
    ]


def nanogpt(runs: Sequence[Result]) -> list[str]:
    arm, rate, (low, high) = NANOGPT
    found = results.at_rate(runs, arm, rate)
    if not found or found[min(found)]["setting"] != "shakespeare-char":
        return []
    losses = [run["val_loss"] for run in found.values()]
    each = ", ".join(f"{loss:.4f}" for loss in losses)
    inside = all(low <= loss <= high for loss in losses)
    return [
        "### nanoGPT's figure\n",
        f"Dense at its own rate of {rate:g}, {len(losses)} seeds: {each}; "
        f"{'all' if inside else 'not all'} within {low} to {high} (its README says 1.88).\n",
    ]


def protocol(path: Path) -> list[str]:
    """The footnote on the original's protocol, from `protocol.py`."""
    if not path.exists():
        return []
    runs = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        f"{run['arm']}: best {run['best_ppl']:.2f}, final {run['final_ppl']:.2f} (the original: {run['original_ppl']})"
        for run in runs
    ]
    return [
        "## Footnote: the original's protocol\n",
        f"{'; '.join(lines)}. An interpolated bigram on the same characters: {runs[0]['bigram_ppl']:.2f}. "
        "Worth little: 50,000 characters to learn from, 3,328 to be judged by, one seed.\n",
    ]


if __name__ == "__main__":
    main()
