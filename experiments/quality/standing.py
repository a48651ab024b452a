"""Do held routes stand still? A table of the routes that are kept between evaluations."""

import itertools
from collections.abc import Mapping, Sequence
from statistics import fmean

from trix_jax.lm.experiment.tables import rate_of, table
from trix_jax.lm.experiment.tuning import Tuned

# Who moves by what: a hash, signatures, and routes that are held.
NAMES = (
    "tiles-64-hash",
    "tiles-64-moving",
    "tiles-64-held",
    "tiles-64-held-scores",
    "tiles-64-held-routes",
    "tiles-64-held-eighth-shared",
    "tiles-64-held-eighth-shared-routes",
)
ABOUT = (
    "Do held routes stand still? By step, the share of a token's tiles kept since the "
    "evaluation before. Held signatures stay; the embeddings that they meet move.\n"
)


def section(arms: Sequence[tuple[str, Tuned]]) -> list[str]:
    """The table; nothing before there is an arm whose routes were compared.

    Args:
        arms: each with its setting.
    """
    found = [(setting, arm, kept(arm)) for setting, arm in arms]
    steps = sorted(set(itertools.chain.from_iterable(shares for *_, shares in found)))
    rows = [
        [arm.arm, setting, rate_of(arm), str(len(arm.runs)), *_cells(shares, steps)]
        for setting, arm, shares in found
        if shares
    ]
    if not rows:
        return []
    head = ["arm", "setting", "rate", "seeds", *(f"{step:,}" for step in steps)]
    return [ABOUT, table(head, rows, left=2)]


def kept(arm: Tuned) -> dict[int, float]:
    """Step to the share of routes kept since the evaluation before: the mean over layers
    and seeds.
    """
    found: dict[int, list[float]] = {}
    for run in arm.runs.values():
        for line in run.evaluations or ():
            if line["routing_stability"]:
                share = fmean(line["routing_stability"])
                found.setdefault(line["step"], []).append(share)
    return {step: fmean(shares) for step, shares in found.items()}


def _cells(shares: Mapping[int, float], steps: Sequence[int]) -> list[str]:
    return [f"{shares[step]:.3f}" if step in shares else "" for step in steps]
