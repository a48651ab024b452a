"""The targets of issue 4, each with what was found and where that leaves it."""

from collections.abc import Mapping, Sequence

from experiments.quality import curve
from experiments.quality.intervals import paired
from experiments.quality.results import Tuned
from experiments.quality.tables import (
    Curve,
    dense_losses,
    equivalent_text,
    lowest_entropy,
    most_dead,
    table,
    twins,
)

SEEDS = 3  # fewer decide nothing
LEAST_ENTROPY = 0.7  # share of ln N
SPARSITY = 1.5  # equivalent over active width, at one tile a token
NEAR = 0.03  # nats from the parameter-equal dense LM
QUARTER = 0.25
THIN = "undecided: too few seeds"


def targets_table(
    arms: Sequence[Tuned], controls: Mapping[str, Tuned], base: Tuned, dense: Curve
) -> str:
    """One row a target and arm or control. Widths of the curve with too few seeds are
    left out: an arm beyond the last one that has enough is only known to be above it.

    Args:
        controls: what routes instead on `base`'s tiles, by name; learned ones need not be
            beaten.
    """
    enough = {w: arm for w, arm in dense.items() if len(arm.runs) >= SEEDS}
    dense = enough if len(enough) > 1 else dense  # one width is no curve
    rows = [alive(arms)]
    rows += [against(name, controls[name], base) for name in controls]
    for arm in arms:
        rows += [*pays(arm, dense), *moonshot(arm, dense)]
    return table(["target", "found", "status"], rows, left=3)


def alive(arms: Sequence[Tuned]) -> list[str]:
    worst, dead = min(map(lowest_entropy, arms)), max(map(most_dead, arms))
    found = f"lowest share {worst:.3f}, most dead tiles in a layer {dead}"
    is_met = worst >= LEAST_ENTROPY and dead == 0
    return ["routing is alive in every arm, at every evaluation", found, status(is_met)]


def against(name: str, control: Tuned, base: Tuned) -> list[str]:
    """Signatures beat hash and random; a learned router does not beat them."""
    is_learned = "learned" in name
    target = f"{base.arm} beats {name}"
    if is_learned:
        target = f"{name} does not beat {base.arm}"
    difference = paired(control.losses, base.losses)
    if difference is None:
        return [target, "no common seed", "undecided"]
    found = f"{difference.mean:+.4f}, {difference.n} seeds"
    if difference.n < SEEDS:
        return [target, found, "undecided"]
    found += f", ± {difference.half:.4f}"
    if is_learned:
        return [target, found, status(difference.mean >= -difference.half)]
    return [target, found, status(difference.mean > difference.half)]


def pays(arm: Tuned, dense: Curve) -> list[list[str]]:
    """Sparsity, at one tile a token, and ternary weights, for every arm."""
    losses = list(arm.losses.values())
    found = curve.equivalent_interval(dense_losses(dense), losses)
    text, rows = equivalent_text(found, dense), []
    if arm.one["tiles_per_token"] == 1:
        least = SPARSITY * arm.one["active_width"]
        target = (
            f"{arm.arm}: equivalent width at least {SPARSITY} x active, {least:.0f}"
        )
        rows.append([target, text, compared(found, least, losses, dense)])
    bits = twins(arm.one, next(iter(dense.values())).one)["bits"]
    target = f"{arm.arm}: equivalent width above the bit-equal {bits:.0f}"
    rows.append([target, text, compared(found, bits, losses, dense)])
    return rows


def moonshot(arm: Tuned, dense: Curve) -> list[list[str]]:
    """Within 0.03 nats of the parameter-equal dense LM, for arms with a quarter of its
    compute.
    """
    equal = twins(arm.one, next(iter(dense.values())).one)
    is_light = arm.one["active_width"] <= QUARTER * equal["parameters"] + arm_scores(
        arm
    )
    losses = list(arm.losses.values())
    found = curve.behind(dense_losses(dense), losses, equal["parameters"])
    if not is_light or found is None:
        return []
    target = f"{arm.arm}: a quarter of the compute, within {NEAR} of the parameter-equal dense LM"
    text = f"{found.value:+.4f} nats ({found.low:+.4f} to {found.high:+.4f})"
    return [[target, text, compared_below(found, len(losses), dense)]]


def arm_scores(arm: Tuned) -> float:
    """Active width that routing scores take, at most: N of them cost N / 2."""
    return arm.one["num_tiles"] / 2


def compared(
    found: curve.Estimate, least: float, losses: Sequence[float], dense: Curve
) -> str:
    """Met or missed where the interval excludes `least`."""
    if is_thin(len(losses), dense):
        return THIN
    if found.low >= least:
        return "met"
    return "missed" if found.high < least else "undecided"


def compared_below(found: curve.Estimate, seeds: int, dense: Curve) -> str:
    if is_thin(seeds, dense):
        return THIN
    if found.high <= NEAR:
        return "met"
    return "missed" if found.low > NEAR else "undecided"


def is_thin(seeds: int, dense: Curve) -> bool:
    return min(seeds, *(len(d.runs) for d in dense.values())) < SEEDS


def status(is_met: bool) -> str:
    return "met" if is_met else "missed"
