"""What an arm is worth: its equivalent dense width over the width that it takes.

    compute width = multiply-accumulates a token as served / (2 D)
    memory width  = (served FFN bits + what routing stores) / (16 * 2 D)
    W             = the greater of both
    multiplier    = equivalent width / W

All are a layer's. An arm routed by token may be served with its signatures, which are
scored, or with a table of each token's tiles and gates, which is not; it takes the form
of lower W. One seed chooses rates and arms, the others conclude.
"""

import dataclasses
import functools
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from experiments.quality import curve
from experiments.quality.arms import Arm
from experiments.quality.claim import (
    HASH,
    LADDER,
    MORE,
    balanced,
    claim,
    fixed,
    held,
    per_layer,
    tiles,
    together,
)
from experiments.quality.design import SEEDS, Setting
from trix_jax.cli.experiment import parse_run
from trix_jax.lm.accounting import costs
from trix_jax.lm.experiment.results import Result
from trix_jax.lm.experiment.stats import Interval, paired
from trix_jax.lm.experiment.tuning import Tuned, tuned
from trix_jax.nn.transformer import TransformerConfig

FLOAT_BITS = 16
LEAST_SEEDS = 3
Seeds = Callable[[Tuned], dict[int, float]]  # an arm's losses of some seeds
CLAIM_WIDTHS = (64, 128)
AIM_WIDTH = 128  # of signatures against the hash
OTHERS = ("hash", "random", "learned")  # who choose tiles without reading their weights
# How many tiles a token takes, and what they are: arms of another form cost otherwise.
FORMS = ("-eighth-shared", "-shared", "-eighth", "-fine", "-late", "-later", "-float")
FORMS += ("-channel", "-progressive", "-threshold", "-ffn-2", "-ffn-0.5", "-ffn-0.25")
FORMS += ("-gelu", "-losses")
# How routes are held or hashed, which changes who chooses and no tile.
CHOSEN_AS = ("-routes", "-ungated", "-early-table", "-table", "-layers")


class Width(NamedTuple):
    """What an arm takes, as hidden widths of a 16-bit dense FFN."""

    compute: float
    memory: float

    @property
    def greater(self) -> float:
        """W."""
        return max(self)


class Reading(NamedTuple):
    """What a place on the curve is read off.

    Attributes:
        own: seed to the arm's loss, of the seeds that the curve has too.
        dense: dense width to its losses by seed: the arm's seeds, or where the width has
            none of them, those that it has.
    """

    own: dict[int, float]
    dense: dict[int, dict[int, float]]

    @property
    def losses(self) -> dict[int, list[float]]:
        """Dense width to its losses."""
        return {width: list(found.values()) for width, found in self.dense.items()}


class Worth(NamedTuple):
    """An arm on the dense curve.

    Attributes:
        equivalent: the dense width of equal loss.
        seeds: that conclude: of the arm and of the dense FFNs beside it, the least.
        loss: the arm's mean over the seeds that the curve has too. Seeds share what is
            easy and hard in them: others would move the arm along the curve, or it.
        read: what it is read off.
    """

    arm: str
    width: Width
    equivalent: curve.Estimate
    seeds: int
    loss: float
    read: Reading

    @property
    def multiplier(self) -> curve.Estimate:
        return curve.Estimate(
            *(value / self.width.greater for value in self.equivalent)
        )


def width_of(model: TransformerConfig) -> Width:
    """What an arm takes, in its better form.

    Args:
        model: with its vocabulary.
    """
    return min(forms(model).values(), key=lambda width: width.greater)


def forms(model: TransformerConfig) -> dict[str, Width]:
    """What each form in which an arm can be served takes: with signatures that are
    scored, or with tables of routes.
    """
    found, layers = {"scored": costs(model)}, 2 * model.d_model * model.n_layers
    is_scored = model.ffn != "dense" and model.routing.source != "hash"
    if is_scored and model.router_input == "embedding":
        found["table"] = costs(model, "table")
    return {
        name: Width(
            cost.ffn_active / layers,
            (cost.ffn_bits + cost.routing_bits) / FLOAT_BITS / layers,
        )
        for name, cost in found.items()
    }


def model_of(setting: Setting, arm: Arm, vocab_size: int) -> TransformerConfig:
    """The model that an arm trains."""
    flags = shlex.split(f"{arm.flags} {setting.flags}")
    model = _parsed(setting.preset, *flags)
    return dataclasses.replace(model, vocab_size=vocab_size)


@functools.cache
def _parsed(*flags: str) -> TransformerConfig:
    return parse_run(list(flags)).model


def choosing(arm: Tuned, seed: int = SEEDS[0]) -> dict[int, float]:
    """The loss of the seed that chooses; where it has not run, of the first that has."""
    seed = seed if seed in arm.losses else min(arm.losses)
    return {seed: arm.losses[seed]}


def concluding(arm: Tuned) -> dict[int, float]:
    """Losses of the seeds that did not choose; of the one that did, where there is no
    other yet.
    """
    others = {s: loss for s, loss in arm.losses.items() if s != SEEDS[0]}
    return others or dict(arm.losses)


def difference(arm: Tuned, base: Tuned) -> Interval | None:
    """`arm - base`, paired over the seeds that conclude and both have; over the one that
    chose, where they have no other in common.
    """
    seeds = compared_seeds(arm, base)
    return paired({s: arm.losses[s] for s in seeds}, base.losses)


def compared_seeds(arm: Tuned, base: Tuned) -> list[int]:
    """The seeds that `difference` pairs."""
    both = arm.losses.keys() & base.losses.keys()
    return sorted(both - {SEEDS[0]} or both)


def seeds_text(seeds: Collection[int]) -> str:
    """`42`, `43 to 45`, `42, 44`."""
    few, many = min(seeds), max(seeds)
    if len(seeds) > 2 and many - few == len(seeds) - 1:
        return f"{few} to {many}"
    return ", ".join(map(str, sorted(seeds)))


def shared(losses: Mapping[int, float], seeds: Collection[int]) -> dict[int, float]:
    """Losses of the seeds that are among these too; of all where none is."""
    return {s: x for s, x in losses.items() if s in seeds} or dict(losses)


def dense_losses(
    setting: Setting, runs: Sequence[Result], seeds: Seeds = concluding
) -> dict[int, dict[int, float]]:
    """Width and seed to the loss, of the dense FFNs that have runs."""
    curve_arms = setting.groups["dense-curve"]
    found = (tuned(runs, arm.name, arm.rate_of) for arm in curve_arms)
    return {
        arm.one.width: seeds(arm) for arm in found if arm is not None and arm.one.width
    }


def dense_curve(setting: Setting, runs: Sequence[Result]) -> dict[int, list[float]]:
    """Width to the losses of the seeds that conclude."""
    found = dense_losses(setting, runs)
    return {width: list(losses.values()) for width, losses in found.items()}


def worth(
    setting: Setting,
    runs: Sequence[Result],
    arm: Arm,
    vocab_size: int,
    seeds: Seeds = concluding,
) -> Worth | None:
    """An arm's place on the curve, each side by the seeds that the other has too, by all
    of them where it has none; None before both have runs. Widths with fewer of the arm's
    seeds than others, up to three, are left out where that leaves a curve. An arm that
    only the seed which chooses has run is read off that seed's curve.
    """
    one = tuned(runs, arm.name, arm.rate_of)
    if one is None:
        return None
    if seeds is choosing or set(one.losses) == {SEEDS[0]}:
        seeds = functools.partial(choosing, seed=next(iter(choosing(one))))
    found = dense_losses(setting, runs, seeds)
    if len(found) < 2:
        return None
    own = shared(seeds(one), {s for losses in found.values() for s in losses})
    common = {width: len(own.keys() & x.keys()) for width, x in found.items()}
    least = min(LEAST_SEEDS, len(own))
    known = {width: x for width, x in found.items() if common[width] >= least}
    if len(known) < 2:
        known = found
    read = Reading(own, {width: shared(x, own) for width, x in known.items()})
    losses = list(own.values())
    place = curve.equivalent_interval(read.losses, losses)
    beside = curve.neighbours(sorted(read.dense), place.value)
    seeds_of = max(1, min(common[width] for width in beside))
    width = width_of(model_of(setting, arm, vocab_size))
    return Worth(arm.name, width, place, seeds_of, fmean(losses), read)


def candidates(d_model: int) -> tuple[Arm, ...]:
    """The arms that the claim may be made with: the ladder, and the others whose compute
    and memory are weighed.
    """
    hashed, moving = tiles(64, "hash", HASH), tiles(64, "moving")
    best = (per_layer(number, d_model)[0] for number in (64, *MORE))
    ways = *together(64, d_model), *best, *fixed(64, d_model)
    others = hashed, *balanced(64), moving, *ways
    return (*map(held, LADDER), *others)


def best_at_all_widths(
    runs: Mapping[int, Sequence[Result]], vocab_size: int
) -> dict[int, Worth]:
    """The arm whose least multiplier over the widths is greatest for the seed that
    chooses, of those that tie the one of least loss, with what the others conclude; by
    width of the model.
    """

    def rows(name: str, seeds: Seeds) -> dict[int, Worth]:
        found = {
            d: worth(claim(d), runs[d], claim(d).arm(name), vocab_size, seeds)
            for d in CLAIM_WIDTHS
            if d in runs
        }
        return {d: row for d, row in found.items() if row is not None}

    def least(name: str) -> tuple[bool, float, float]:
        return min(map(rank, rows(name, choosing).values()))

    found = {
        arm.name: whole
        for arm in candidates(CLAIM_WIDTHS[0])
        if len(whole := rows(arm.name, concluding)) == len(CLAIM_WIDTHS)
    }
    return found[max(found, key=least)] if found else {}


def rank(place: Worth) -> tuple[bool, float, float]:
    """What arms are chosen by, greatest first: whether the seed that chooses has run, the
    multiplier, and the loss where these tie.
    """
    return SEEDS[0] in place.read.own, place.multiplier.value, -place.loss


def signatures_less_hash(runs: Sequence[Result]) -> dict[str, Any] | None:
    """The paired difference of `signatures_and_hash`, of the seeds that conclude; None
    before both have three.
    """
    found = signatures_and_hash(runs, LEAST_SEEDS)
    less = difference(*found) if found else None
    if less is None or less.n < LEAST_SEEDS:
        return None
    return {"mean": less.mean, "half_width": less.half, "seeds": less.n}


def shown_pair(runs: Sequence[Result]) -> tuple[Tuned, Tuned] | None:
    """The pair that `claim.json` is about; before there is one, the best of any seeds."""
    return signatures_and_hash(runs, LEAST_SEEDS) or signatures_and_hash(runs)


def signatures_and_hash(
    runs: Sequence[Result], least: int = 1
) -> tuple[Tuned, Tuned] | None:
    """At 64 tiles the best arm that reads its addresses off the weights, and the best
    hash of the same tiles; the seed that chooses decides which are best.

    Args:
        least: seeds that conclude for either.
    """
    arms = {arm.name: arm for group in claim(64).groups.values() for arm in group}
    names = [name for name in arms if name.startswith("tiles-64-")]
    best = []
    for form in {form_of(name) for name in names}:
        alike = [name for name in names if form_of(name) == form]
        hashes = [name for name in alike if "-hash" in name]
        read = [name for name in alike if not any(word in name for word in OTHERS)]
        ours, theirs = (
            _best([tuned(runs, name, arms[name].rate_of) for name in group], least)
            for group in (read, hashes)
        )
        if ours is not None and theirs is not None:
            best.append((ours, theirs))
    return min(best, key=lambda pair: pair[0].losses[SEEDS[0]], default=None)


def form_of(name: str) -> str:
    """What an arm's name says of its tiles, whoever chooses them."""
    for how in CHOSEN_AS:
        name = name.removesuffix(how)
    return next((form for form in FORMS if name.endswith(form)), "")


def _best(arms: Sequence[Tuned | None], least: int) -> Tuned | None:
    """The best by the seed that chooses, of those that have so many others."""
    found = [
        arm
        for arm in arms
        if arm is not None and SEEDS[0] in arm.losses and len(concluding(arm)) >= least
    ]
    return min(found, key=lambda arm: arm.losses[SEEDS[0]], default=None)


def claim_tree(runs: Mapping[int, Sequence[Result]], vocab_size: int) -> dict[str, Any]:
    """What `claim.json` says: the settings that have three seeds, and the difference to
    the hash. A place off the curve is given as that of the FFN at its end: `at_least` and
    `at_most` say so of the mean. `high` is null where it is beyond the widest.
    """
    rows = [
        {
            "width": d,
            "multiplier": on_the_curve(row, row.multiplier.value),
            "low": on_the_curve(row, row.multiplier.low),
            "high": None
            if row.multiplier.high == curve.ABOVE
            else on_the_curve(row, row.multiplier.high),
            "at_least": row.multiplier.value == curve.ABOVE,
            "at_most": row.multiplier.value == curve.BELOW,
            "arm": row.arm,
            "seeds": row.seeds,
        }
        for d, row in best_at_all_widths(runs, vocab_size).items()
        if row.seeds >= LEAST_SEEDS
    ]
    difference = signatures_less_hash(runs.get(AIM_WIDTH, ()))
    return {"settings": rows, "signature_minus_hash": difference}


def on_the_curve(place: Worth, multiplier: float) -> float:
    """A multiplier, never of more or less than the widest and narrowest dense FFN."""
    low, high = (end(place.read.dense) / place.width.greater for end in (min, max))
    return min(max(multiplier, low), high)
