"""REPORT.md: the page to read, from the committed results. Every table behind it is in
APPENDIX.md (`report.py`).

A figure and a table, then a section a question: what is asked, what was found, a table.
A difference is paired by seed and at both arms' best rates; positive is worse.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from experiments.quality import claim, claim_page, curve, standing
from experiments.quality.arms import best, by_hash
from experiments.quality.claim_words import chooser
from experiments.quality.design import SETTINGS, Setting
from experiments.quality.questions import QUESTIONS, Question
from experiments.quality.widths import (
    Curve,
    dense_losses,
    equivalent_text,
    losses_of,
    on_curve,
    twins,
)
from experiments.quality.worth import (
    compared_seeds,
    concluding,
    difference,
    model_of,
    shown_pair,
)
from trix_jax.lm.experiment import results
from trix_jax.lm.experiment.results import Result
from trix_jax.lm.experiment.stats import Interval, paired, spread, verdict
from trix_jax.lm.experiment.tables import rate_of, table
from trix_jax.lm.experiment.tuning import Tuned, tuned

LOST = 0.02  # nats: what one seed loses by to be listed as lost


class Found(NamedTuple):
    """The committed runs of a setting, of one sampler."""

    setting: Setting
    runs: Sequence[Result]

    @property
    def name(self) -> str:
        return f"{self.setting.name}, {self.runs[0].sampler}"

    def arm(self, name: str) -> Tuned | None:
        """An arm of the setting at its rate; None without runs."""
        arms = itertools.chain(*self.setting.groups.values())
        likes = {arm.name: arm.rate_of for arm in arms}
        return tuned(self.runs, name, likes.get(name))

    def losses(self, arm: Tuned, base: Tuned) -> list[float]:
        """Of the seeds that `difference` pairs; where there are none, of those that
        conclude. Of the settings before, of all.
        """
        if not self._is_claim:
            return losses_of(arm)
        seeds = compared_seeds(arm, base) or list(concluding(arm))
        return [arm.losses[seed] for seed in seeds]

    def difference(self, arm: Tuned, base: Tuned) -> Interval | None:
        """`arm - base`, over the seeds that conclude."""
        if self._is_claim:
            return difference(arm, base)
        return paired(arm.losses, base.losses)

    @property
    def _is_claim(self) -> bool:
        return self.setting.name in claim.SETTINGS


def text(folder: Path) -> str:
    """The page, and writes the figure and `claim.json` into `folder/results`."""
    new = list(_found(claim.SETTINGS, folder))
    old = list(_found(SETTINGS, folder))
    claims = [one for one in new if one.setting is not claim.BODY]
    parts = [
        "# What is a TriX FFN worth?\n",
        *_verdict(claims, claim_page.said(claim_page.on_a_curve(folder))),
        "Made by `python -m experiments.report`; all tables are in the "
        "[appendix](APPENDIX.md). Losses are nats a token; differences are paired by seed "
        "at each arm's best rate; positive is worse.\n",
        *claim_page.section(folder),
        *_against_hash([*claims, *old]),
        *claim_page.costs(folder),
        *(part for what in QUESTIONS for part in _question(what, new)),
        *_old_settings(old),
        *_lost([*new, *old]),
    ]
    return "\n".join(parts)


def _found(settings: dict[str, Setting], folder: Path) -> Iterator[Found]:
    for setting in settings.values():
        runs = results.read(folder / "results" / f"{setting.name}.json")
        for alike in results.by_sampler(runs).values():
            yield Found(setting, alike)


def _verdict(claims: Sequence[Found], worth: dict[int, str]) -> list[str]:
    """What the claim's settings say of tiles and dense FFNs, a paragraph a width of the
    model, and of signatures and the hash at the first that has both.

    Args:
        worth: what tiles are worth, by width of the model.
    """
    by_width = {int(one.setting.name.rpartition("-")[2]): one for one in claims}
    order = [*worth, *(d for d in by_width if d not in worth)]
    both = [text for d in order if (text := _signatures(d, by_width[d]))]
    first, *others = [*worth.values(), *both[: not worth], ""]
    opening = " ".join(part for part in (first, *both[: bool(worth)]) if part)
    said = [opening, claim_page.W if worth else "", *others]
    return [f"{text}\n" for text in said if text] or ["The claim has no runs yet.\n"]


def _signatures(d: int, one: Found) -> str:
    """Signatures against a hash of the token, in a sentence; nothing before both ran."""
    pair = shown_pair(one.runs)
    found = one.difference(*pair) if pair else None
    if pair is None or found is None:
        return ""
    ours, theirs = (
        chooser(model_of(one.setting, one.setting.arm(arm.arm), claim_page.VOCABULARY))
        for arm in pair
    )
    side = "behind" if found.mean > 0 else "ahead of"
    word = verdict(found, "decided", "decided", "undecided")
    return (
        f"At width {d}, tiles by {ours} end {abs(found.mean):.4f} nats {side} the same by "
        f"{theirs}; {_seeds(found)}, {word}."
    )


def _seeds(found: Interval) -> str:
    if found.n < 2:
        return "one seed"
    return f"± {found.half:.4f}, {found.n} seeds"


def _against_hash(all_found: Sequence[Found]) -> list[str]:
    rows = []
    for one in all_found:
        if one.setting.name in claim.SETTINGS:
            pair = shown_pair(one.runs) or (None, None)
        else:
            pair = one.arm(best.name), one.arm(by_hash.name)
        ours, theirs = pair
        if ours is not None and theirs is not None:
            names = [ours.arm, theirs.arm]
            rows.append([one.name, *names, *_against(one, ours, theirs)])
    if not rows:
        return []
    head = "setting,signatures,hash,rate,loss,less the hash,95%,seeds,verdict"
    return [
        "## Is reading signatures better than hashing tokens?\n",
        "The hash gives each token id a fixed set of tiles and has no gate. Signatures "
        "look at the token's embedding.\n",
        table(head.split(","), rows, left=3),
    ]


def _against(one: Found, arm: Tuned, base: Tuned) -> list[str]:
    """Rate, loss, difference, its interval, seeds and the verdict."""
    found = one.difference(arm, base)
    loss = spread(one.losses(arm, base))
    if found is None:
        return [rate_of(arm), loss, "", "", "0", "no common seed"]
    bound = f"± {found.half:.4f}" if found.n > 1 else ""
    word = verdict(found, below="better", above="worse", alone="one seed")
    return [rate_of(arm), loss, f"{found.mean:+.4f}", bound, str(found.n), word]


def _question(what: Question, found: Sequence[Found]) -> list[str]:
    rows, left = [], dict[str, None]()
    for one in found:
        base = one.arm(what.base)
        if base is None:
            continue
        for arm in one.setting.groups.get(what.group, ()):
            if arm.name == what.base:
                continue
            there = one.arm(arm.name)
            if there is None:
                left[f"`{arm.name}`"] = None
            else:
                rows.append([there.arm, one.setting.name, *_against(one, there, base)])
    if not rows and not left:
        return []
    head = f"arm,setting,rate,loss,less `{what.base}`,95%,seeds,verdict"
    left = [name for name in left if name.strip("`") not in {row[0] for row in rows}]
    shown = [table(head.split(","), rows, left=2)] if rows else []
    few = ", ".join(left) if len(left) < 4 else f"{len(left)} arms"
    waiting = [f"Not run: {few}.\n"] if left else []
    still = _standing(found) if what.group == "holding" else []
    return [f"## {what.title}\n", f"{what.about}\n", *shown, *waiting, *still]


def _standing(found: Sequence[Found]) -> list[str]:
    """Whether held routes stand still."""
    arms = [
        (one.setting.name, arm)
        for name in standing.NAMES
        for one in found
        if (arm := one.arm(name)) is not None
    ]
    return standing.section(arms)


def _old_settings(old: Sequence[Found]) -> list[str]:
    rows = []
    for one in old:
        ours = one.arm(best.name)
        if ours is None:
            continue
        theirs = {
            arm.one.width: arm
            for group in ("dense-curve", "dense-wide")
            for asked in one.setting.groups.get(group, ())
            if (arm := one.arm(asked.name)) and arm.one.width
        }
        rows.append(
            [
                one.name,
                str(len(one.runs)),
                spread(losses_of(ours)),
                *_place(ours, theirs),
            ]
        )
    if not rows:
        return []
    head = (
        "setting,runs,sixteen tiles,active width,equivalent dense width,"
        "dense of its compute,of its memory,of its parameters"
    )
    return [
        "## The settings before\n",
        f"`{best.name}`: four of sixteen ternary tiles, routed by token with signatures "
        "that move, in GPT-2's body, windows at random offsets (sampler `offsets`). "
        "No loss is compared with one above. A curve does not carry a comparison where "
        "a doubling is worth less than three standard errors.\n",
        table(head.split(","), rows),
    ]


def _place(arm: Tuned, dense: Curve) -> list[str]:
    """Active width, equivalent width and the three dense twins, where there is a curve."""
    active = f"{arm.one.active_width:.0f}"
    if len(dense) < 2:
        return [active, "", "", "", ""]
    losses = dense_losses(dense)
    found = curve.equivalent_interval(losses, losses_of(arm))
    steps = curve.doublings(losses, [fmean(losses_of(arm))])
    width = equivalent_text(found, dense) if curve.carries(steps) else "does not carry"
    at = twins(arm, dense)
    equal = [on_curve(dense, at[what]) for what in ("compute", "bits", "parameters")]
    return [active, width, *equal]


# What every arm of a group is compared with, in the settings before.
BASES = {"ablations": best.name, "together": f"{best.name}-late"}


def _lost(all_found: Sequence[Found]) -> list[str]:
    """Arms that were worse than what they were to improve, one a line; and what ran with
    auxiliary losses that the library no longer has.
    """
    rows, before, undecided = [], [], 0
    for one in all_found:
        for arm, base in _compared(one):
            found = one.difference(arm, base)
            if found is None:
                continue
            undecided += found.n > 1 and found.side == "undecided"
            if found.side == "above" or (found.n == 1 and found.mean > LOST):
                rows.append(_tried(one, arm, base, found))
        for arm, base in _with_losses(one):
            if (found := one.difference(arm, base)) is not None:
                before.append(_tried(one, arm, base, found))
    if not rows and not before:
        return []
    about = (
        f"Worse by the whole interval, or by over {LOST} nats of the one seed "
        f"that both have run. {undecided} further comparisons are undecided."
    )
    if before:
        about += (
            f" `{claim.LOSSES}`, won or lost: with auxiliary losses that hashes had until "
            "commit 921d8bd, all but `tiles-64-hash-eighth-shared` and its `-layers`."
        )
    head = ["arm", "setting", "than", "rate", "by", "95%"]
    return [
        "## What was tried and lost\n",
        f"{about}\n",
        table(head, [*rows, *before], left=3),
    ]


def _tried(one: Found, arm: Tuned, base: Tuned, found: Interval) -> list[str]:
    shift = f"{found.mean:+.4f}"
    return [arm.arm, one.name, base.arm, rate_of(arm), shift, _seeds(found)]


def _with_losses(one: Found) -> Iterator[tuple[Tuned, Tuned]]:
    """Arms that ran with auxiliary losses, and the same without."""
    for asked in one.setting.groups.get("before", ()):
        arm, base = one.arm(asked.name), one.arm(asked.name.removesuffix(claim.LOSSES))
        if arm is not None and base is not None:
            yield arm, base


def _compared(one: Found) -> Iterator[tuple[Tuned, Tuned]]:
    """Arms that have runs, each once, with what its group is compared with."""
    bases, seen = BASES | {what.group: what.base for what in QUESTIONS}, set()
    for group in (g for g in one.setting.groups if g in bases):
        base = one.arm(bases[group])
        for asked in one.setting.groups[group]:
            arm = one.arm(asked.name)
            if arm and base and arm.arm != base.arm and arm.arm not in seen:
                seen.add(arm.arm)
                yield arm, base
