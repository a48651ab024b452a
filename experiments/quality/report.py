"""APPENDIX.md and its figures: every table of every setting, from the committed results;
`python -m experiments.report` makes it with all others. The page to read is `page.py`'s.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.quality import claim, claim_page, curve, lookups, measure, page
from experiments.quality.arms import best, hidden, lookup
from experiments.quality.design import SEEDS, SETTINGS, Setting
from experiments.quality.widths import (
    Curve,
    arms_table,
    dense_losses,
    dense_table,
    losses_over_width,
    mean_loss,
    targets_table,
)
from trix_jax.files import read_json, write_whole
from trix_jax.lm.config import SAMPLER_BEFORE
from trix_jax.lm.experiment import plots, results
from trix_jax.lm.experiment.results import Result
from trix_jax.lm.experiment.tables import difference_table, sweep_table
from trix_jax.lm.experiment.tuning import Tuned, at_rate, tuned

HERE = Path(__file__).parent
NANOGPT = ("dense-512", 1e-3, (1.85, 1.93))  # its README says 1.88
# What the targets call a way to route, and its arm.
CONTROLS = {
    "a learned router by token": f"{best.name}-learned",
    "a learned router by hidden state": f"{hidden.name}-learned",
    "token hash": f"{hidden.name}-hash",
    "frozen random by token": f"{best.name}-random",
    "frozen random by hidden state": f"{hidden.name}-random",
}
# Groups of arms whose sweeps share a panel.
PANELS = (
    ("arms",),
    ("routes",),
    ("bodies",),
    ("balanced", "together", "fixed", "before"),
)
PAIRED = "Differences are paired by seed: positive is worse."


class Comparison(NamedTuple):
    """The arms of a group against one of them."""

    group: str
    base: str
    title: str
    note: str = PAIRED


COMPARISONS = (
    Comparison(
        "routes",
        best.name,
        f"Who chooses the tiles of {best.name}",
        f"{PAIRED} Arms with `embedding` look at the token's row of the embedding table, the others at the "
        "hidden state; the hash gives each token id a set of tiles and has no gate.",
    ),
    Comparison("floats", best.name, "Ternary against float weights"),
    Comparison(
        "routes",
        "tiles-64-hash",
        "Who chooses the tiles, against a hash of the token",
        f"{PAIRED} `held` reads signatures from the weights after a tenth of the training and keeps them.",
    ),
    Comparison(
        "holding", "tiles-64-held", "What is held, when, and by what it is chosen"
    ),
    Comparison("worth", "tiles-64-held", "What else may make held tiles worth more"),
    Comparison("bodies", "body-gpt2", "The body around the FFN, chosen by a dense one"),
    Comparison(
        "ablations",
        best.name,
        f"Ablations of {best.name}",
        f"{PAIRED} What has no flag is in `patches.py`.",
    ),
    Comparison("together", f"{best.name}-late", "With late quantization"),
    Comparison("lookups", lookup.name, "Where the lookup loses"),
    Comparison(
        "on-the-way",
        hidden.name,
        f"From {hidden.name} to {best.name}",
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


def write(folder: Path = HERE) -> Path:
    """Writes `folder/REPORT.md`, `folder/APPENDIX.md` and the figures in
    `folder/results`, from the results that are there; returns the page's path.
    """
    write_whole(folder / "APPENDIX.md", appendix(folder))
    write_whole(folder / "REPORT.md", page.text(folder))
    return folder / "REPORT.md"


def appendix(folder: Path) -> str:
    """Every setting with its sweeps and comparisons, then what routing does."""
    parts = [
        "# Every table\n",
        "Made by `python -m experiments.report` from `results/`; what is asked, and in which order, is `design.py` "
        "and `claim.py`. What follows from it is in [the report](REPORT.md).\n",
    ]
    parts += claim_page.ladders(folder)
    for setting in (claim.SETTINGS | lookups.SETTINGS | SETTINGS).values():
        runs = results.read(folder / "results" / f"{setting.name}.json")
        for alike in results.by_sampler(runs).values():
            parts += section(setting, alike, folder / "results")
    parts += measure.section(folder / "results")
    parts += protocol(folder / "results" / "original-protocol.json")
    return "\n".join(parts)


def section(setting: Setting, runs: Sequence[Result], folder: Path) -> list[str]:
    """What one setting says, of runs with one sampler."""
    stem = named(setting, runs)
    dense = {
        arm.one.width: arm
        for arm in of_groups(setting, runs, "dense-curve", "dense-wide")
        if arm.one.width
    }
    arms = of_groups(setting, runs, "arms")
    parts = [
        f"## {stem}\n",
        f"{len(runs)} runs of `{f'{setting.preset} {setting.flags}'.strip()}`, sampler "
        f"`{runs[0].sampler}`.\n",
    ]
    if len(dense) > 1 and arms:
        parts += on_the_curve(stem, arms, dense, folder)
        parts += targets(runs, arms, dense)
    for comparison in COMPARISONS:
        parts += compared(setting, runs, comparison)
    parts += original_table(setting, runs)
    return [*parts, *sweeps(setting, runs, folder), *nanogpt(runs)]


def named(setting: Setting, runs: Sequence[Result]) -> str:
    """A setting's name, with that of a sampler that the setting did not begin with."""
    sampler = runs[0].sampler
    return setting.name if sampler == SAMPLER_BEFORE else f"{setting.name}-{sampler}"


def of_groups(setting: Setting, runs: Sequence[Result], *groups: str) -> list[Tuned]:
    """The arms of some groups that have runs, each at its best rate."""
    arms = [arm for group in groups for arm in setting.groups.get(group, ())]
    found = [tuned(runs, arm.name, arm.rate_of) for arm in arms]
    return [arm for arm in found if arm is not None]


def on_the_curve(
    stem: str, arms: Sequence[Tuned], dense: Curve, folder: Path
) -> list[str]:
    steps = curve.doublings(dense_losses(dense), [mean_loss(arm) for arm in arms])
    losses_over_width(arms, dense, folder / f"{stem}-width.png")
    return [
        "### The instrument: the dense curve\n",
        dense_table(dense, steps),
        resolution(steps, dense),
        "### Arms on the curve\n",
        f"![Loss over width](results/{stem}-width.png)\n",
        arms_table(arms, dense),
        NOTE,
    ]


def resolution(steps: Sequence[curve.Doubling], dense: Curve) -> str:
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


def targets(runs: Sequence[Result], arms: Sequence[Tuned], dense: Curve) -> list[str]:
    base = tuned(runs, best.name)
    if base is None:
        return []
    found = {name: tuned(runs, arm) for name, arm in CONTROLS.items()}
    present = {name: arm for name, arm in found.items() if arm is not None}
    return ["### Targets\n", targets_table(arms, present, base, dense)]


def compared(setting: Setting, runs: Sequence[Result], what: Comparison) -> list[str]:
    """Every arm of a group against one, paired by seed."""
    base, rows = tuned(runs, what.base), []
    if base is None or what.group not in setting.groups:
        return []
    arms, note = setting.groups[what.group], what.note
    for arm in arms:
        found = tuned(runs, arm.name, arm.rate_of)
        if found and arm.name != what.base:
            rows.append(("inherited" if arm.rate_of else "its own", found))
    have = {run.arm for run in runs}
    if left := [arm.name for arm in arms if arm.name not in have]:
        note += f" Planned and not run: {', '.join(left)}."
    table = [difference_table(rows, base)] if rows else []
    return [f"### {what.title}\n", *table, f"{note}\n"]


def original_table(setting: Setting, runs: Sequence[Result]) -> list[str]:
    arms = of_groups(setting, runs, "original-table")
    if len(arms) != 2:
        return []
    first, second = arms
    return [
        f"### Is {first.arm} better than {second.arm}?\n",
        "The original says that Hierarchical-16 beats Sparse-4, by 13.4% of perplexity.\n",
        difference_table([("its own", first)], second),
    ]


def sweeps(setting: Setting, runs: Sequence[Result], folder: Path) -> list[str]:
    have = {run.arm for run in runs if run.seed == SEEDS[0]}
    arms = itertools.chain(*setting.groups.values())
    names = [n for n in dict.fromkeys(arm.name for arm in arms) if n in have]
    panels = [
        [name for name in names if name.startswith("dense-")],
        *([name for name in shown if name in have] for shown in panels_of(setting)),
    ]
    path = folder / f"{named(setting, runs)}-rates.png"
    plots.rates(path, runs, [panel for panel in panels if panel], SEEDS[0])
    return [
        f"### The sweeps, seed {SEEDS[0]}\n",
        f"![Loss over learning rate](results/{path.name})\n",
        sweep_table(runs, names, SEEDS[0]),
    ]


def panels_of(setting: Setting) -> list[list[str]]:
    """The names of each panel's arms."""
    arms = [
        [arm for group in groups for arm in setting.groups.get(group, ())]
        for groups in PANELS
    ]
    return [list(dict.fromkeys(arm.name for arm in some)) for some in arms]


def nanogpt(runs: Sequence[Result]) -> list[str]:
    arm, rate, (low, high) = NANOGPT
    found = at_rate(runs, arm, rate)
    if not found or found[min(found)].setting != "shakespeare-char":
        return []
    losses = [run.val_loss for run in found.values()]
    each = ", ".join(f"{loss:.4f}" for loss in losses)
    inside = all(low <= loss <= high for loss in losses)
    return [
        "### nanoGPT's figure\n",
        f"Dense at its own rate of {rate:g}, {len(losses)} seeds: {each}; "
        f"{'all' if inside else 'not all'} within {low} to {high} (its README says 1.88).\n",
    ]


def protocol(path: Path) -> list[str]:
    """The footnote on the original's protocol, of runs that were made once."""
    if not path.exists():
        return []
    runs = read_json(path)
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
    print(write())
