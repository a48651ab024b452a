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

from experiments.quality import claim, claim_page, curve
from experiments.quality.arms import best, by_hash
from experiments.quality.design import SEEDS, SETTINGS, Setting
from experiments.quality.widths import (
    Curve,
    dense_losses,
    equivalent_text,
    losses_of,
    on_curve,
    twins,
)
from experiments.quality.worth import (
    concluding,
    dense_curve,
    difference,
    shown_pair,
)
from trix_jax.lm.experiment import results
from trix_jax.lm.experiment.results import Result
from trix_jax.lm.experiment.stats import Interval, paired, spread, verdict
from trix_jax.lm.experiment.tables import rate_of, table
from trix_jax.lm.experiment.tuning import Tuned, tuned

LOST = 0.02  # nats: what one seed loses by to be listed as lost


class Question(NamedTuple):
    """A group of arms, compared with one."""

    title: str
    group: str
    base: str
    about: str


QUESTIONS = (
    Question(
        "What to hold, and when?",
        "holding",
        "tiles-64-held",
        "`held` reads the signatures after a tenth of the training and keeps them. "
        "`scores` keeps the router's input too, `routes` each token's tiles and gates.",
    ),
    Question(
        "Who else may choose the tiles?",
        "routes",
        "tiles-64-held",
        "`moving` are signatures as they are read at every step, `random` and `learned` "
        "rows of the router's own.",
    ),
    Question(
        "What else makes tiles worth more?",
        "worth",
        "tiles-64-held",
        "`late` begins with real weights, `shared` has a small dense part beside three "
        "tiles, `fine` takes sixteen tiles a quarter as wide.",
    ),
    Question(
        "What does being ternary cost?",
        "ternary",
        "tiles-64-hash",
        "`float` keeps real weights, `late` until 30% of the training, `later` until "
        "70%; `channel` has a scale an output, `progressive` a staircase that sharpens, "
        "`threshold` the rule of ternary weight networks.",
    ),
    Question(
        "As much compute as memory?",
        "balanced",
        "tiles-64-hash",
        "Two bits a weight take an eighth of the memory of sixteen: four of 64 tiles "
        "take half as much compute as memory, counted as the width of a dense FFN. An "
        "`eighth` of the tiles a token, or half of the tiles, is level.",
    ),
    Question(
        "And with a small real FFN among them?",
        "together",
        "tiles-64-hash-eighth",
        "`shared`: seven tiles and a real FFN of a tile's width that is always on, by the "
        "hash or by held signatures of signs.",
    ),
    Question(
        "And with routes that stay?",
        "fixed",
        "tiles-64-hash-eighth-shared",
        "Signs as signatures, held after a tenth of the training. `routes`: each token's "
        "tiles and gates stay as they were then; `ungated`: gates are one, as the hash "
        "has them; `table`: both; `early-table`: after a fiftieth.",
    ),
    Question(
        "Do tiles want a rate of their own?",
        "ffn-rates",
        "tiles-64-hash",
        "The projections of FFNs learn at a multiple of the rate of all else, which is "
        "the arm's best.",
    ),
    Question(
        "Which body?",
        "bodies",
        "body-gpt2",
        "A dense FFN four times as wide as the model chose it: `modern` is rotary "
        "positions, RMSNorm and QK-norm; `fan-in` initializes with 1/sqrt(fan-in).",
    ),
)


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

    def losses(self, arm: Tuned) -> dict[int, float]:
        """Of the seeds that conclude: of the settings before, all."""
        return concluding(arm) if self._is_claim else arm.losses

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
        f"{_verdict(claims)}\n",
        "Made by `python -m experiments.report` from `results/`; all tables are in the "
        "[appendix](APPENDIX.md). Losses are nats a token, differences are paired by "
        "seed at each arm's best rate, and positive is worse.\n",
        *claim_page.section(folder),
        *_against_hash([*claims, *old]),
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


def _verdict(claims: Sequence[Found]) -> str:
    """What the claim's settings say of tiles and dense FFNs, and of signatures and the
    hash, in a sentence each.
    """
    said = []
    for one in claims:
        said += _worth(one)
        pair = shown_pair(one.runs)
        found = one.difference(*pair) if pair else None
        if pair is None or found is None:
            continue
        side = "behind" if found.mean > 0 else "ahead of"
        word = verdict(found, "decided", "decided", "undecided")
        said.append(
            f"**{one.setting.name}: `{pair[0].arm}`, whose signatures {_kept(pair[0])}, "
            f"ends {abs(found.mean):.4f} nats {side} a hash of {_hashed(pair[1])}; {_seeds(found)}, {word}.**"
        )
    return " ".join(said) or "The claim has no runs yet."


def _kept(arm: Tuned) -> str:
    return "are read and held" if "-held" in arm.arm else "move"


def _hashed(arm: Tuned) -> str:
    return "the token and the one before" if "-pairs" in arm.arm else "the token"


def _worth(one: Found) -> list[str]:
    """The arm of the greatest multiplier, in words; nothing before there is a curve."""
    d = int(one.setting.name.rpartition("-")[2])
    places = claim_page.places(d, one.runs)
    if not places:
        return []
    chosen = claim_page.chosen(d, one.runs)
    asked, _, place = next(row for row in places if row[0].name == chosen)
    widths = sorted(dense_curve(one.setting, one.runs))
    narrow, wide = widths[0], widths[-1]
    seeds = "one seed, undecided" if place.seeds == 1 else f"{place.seeds} seeds"
    seeds += claim_page.untuned(one.setting, one.runs, asked, place)
    at = f"{one.setting.name}: `{place.arm}`, of W {place.width.greater:.0f}, is worth"
    if all(row[2].equivalent.value == curve.BELOW for row in places):
        taken = sorted(row[2].width.greater for row in places)
        at = f"{one.setting.name}: no tiles, of W {taken[0]:.0f} to {taken[-1]:.0f}, are worth"
        text = f"the dense FFN {narrow} wide, the narrowest that has run"
    elif place.equivalent.value == curve.BELOW:
        text = f"less than the dense FFN {narrow} wide, the narrowest that has run"
    elif place.equivalent.value == curve.ABOVE:
        text = f"more than the dense FFN {wide} wide, the widest that has run"
    else:
        times = claim_page.estimate_text(place.multiplier, 2)
        width = claim_page.estimate_text(place.equivalent, 0)
        text = f"a dense FFN {width} wide, {times} times its W"
    return [f"**{at} {text}; {seeds}.**"]


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
        "The hash gives each token id a fixed set of tiles and has no gate; it looks at "
        "no weight. The signatures look at the token's row of the embedding table.\n",
        table(head.split(","), rows, left=3),
    ]


def _against(one: Found, arm: Tuned, base: Tuned) -> list[str]:
    """Rate, loss, difference, its interval, seeds and the verdict."""
    found = one.difference(arm, base)
    loss = spread(list(one.losses(arm).values()))
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
    head = "arm,setting,rate,loss,difference,95%,seeds,verdict"
    left = [name for name in left if name.strip("`") not in {row[0] for row in rows}]
    shown = [table(head.split(","), rows, left=2)] if rows else []
    waiting = [f"Planned and not run: {', '.join(left)}.\n"] if left else []
    intro = f"{what.about} Differences are to `{what.base}`.\n"
    return [f"## {what.title}\n", intro, *shown, *waiting]


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
        "that move, in GPT-2's body with windows at random offsets (sampler `offsets`). "
        "No loss of theirs is compared with one above. A curve does not carry a "
        "comparison where a doubling is worth less than three standard errors.\n",
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
    """Arms that were worse than what they were to improve, one a line."""
    rows, undecided = [], 0
    for one in all_found:
        for arm, base in _compared(one):
            found = one.difference(arm, base)
            if found is None:
                continue
            undecided += found.n > 1 and found.side == "undecided"
            if found.side == "above" or (found.n == 1 and found.mean > LOST):
                shift = f"{found.mean:+.4f}"
                rows.append([arm.arm, one.name, base.arm, shift, _seeds(found)])
    if not rows:
        return []
    return [
        "## What was tried and lost\n",
        f"Worse by the whole of its interval, or by more than {LOST} nats of the one seed "
        f"({SEEDS[0]}) that has run. {undecided} further comparisons are undecided.\n",
        table(["arm", "setting", "than", "by", "95%"], rows, left=3),
    ]


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
