"""What is asked of each setting: arms, their groups, and the order of training.

An arm is a name and the flags that make it from the setting's preset. A step of a plan
asks a group for some seeds: none is a first look at the rate where the sweep starts, one
is the sweep that brackets every arm's learning rate, more train at the rate which that
found. `run.next_run` turns a plan and the
results so far into the run that comes next, so the order here is the order of expected
value.
"""

import dataclasses
from typing import NamedTuple

SEEDS = (42, 43, 44, 45, 46)  # the first one sweeps


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to build the FFN, or to train it.

    Attributes:
        name: in results, tables and run directories.
        flags: what `trix-jax train PRESET` is given.
        start: the learning rate that its sweep begins with.
        rate_of: another arm, whose best rate this one inherits instead of sweeping.
        patch: what is replaced in the library meanwhile, a name in `patches.PATCHES`.
    """

    name: str
    flags: str
    start: float = 4e-3
    rate_of: str | None = None
    patch: str | None = None


class Step(NamedTuple):
    """Trains `seeds` seeds of every arm of a group, at bracketed rates; 0 is one seed at
    each arm's `start` alone.
    """

    group: str
    seeds: int


class Setting(NamedTuple):
    """A corpus and a model around the FFN.

    Attributes:
        preset: relative to the repository's root.
        groups: arms by group; an arm may be in several.
        plan: steps in order.
        also: what is run besides, last: `(arm, rate, seeds)`.
    """

    name: str
    preset: str
    groups: dict[str, tuple[Arm, ...]]
    plan: tuple[Step, ...]
    also: tuple[tuple[str, float, int], ...] = ()

    def arm(self, name: str) -> Arm:
        """The arm of this name.

        Raises:
            ValueError: there is none.
        """
        arms = {arm.name: arm for group in self.groups.values() for arm in group}
        if name not in arms:
            raise ValueError(
                f"arm must be one of {', '.join(sorted(arms))}. Got {name!r}."
            )
        return arms[name]


def dense(width: int, start: float = 4e-3) -> Arm:
    return Arm(f"dense-{width}", f"--arm dense --model.ffn-width {width}", start)


BEST = "sparse-16-top4"  # the best arm so far: what controls and ablations start from
TOP4 = "--arm sparse --model.tiles-per-token 4"
best = Arm(BEST, TOP4)
hierarchical = Arm("hierarchical-16", "--arm hierarchical", 2e-3)
sparse_4 = Arm("sparse-4", "--arm sparse --model.num-tiles 4", 1e-3)
lookup = Arm("lookup-16", "--arm lookup", 1e-3)


def variant(name: str, flags: str, tuned: bool = False) -> Arm:
    """An ablation of the best arm: with a rate of its own, or the best arm's."""
    return Arm(f"{BEST}-{name}", f"{TOP4} {flags}", rate_of=None if tuned else BEST)


def patched(name: str, tuned: bool = False) -> Arm:
    """An ablation that no flag of the library makes."""
    return dataclasses.replace(variant(name, "", tuned), patch=name)


CONTROLS = (  # on the same tiles; `variant` of the best arm's four of sixteen
    Arm(f"{BEST}-learned", "--arm learned --model.tiles-per-token 4"),
    Arm(f"{BEST}-hash", "--arm hash --model.tiles-per-token 4"),
    Arm(f"{BEST}-random", "--arm random --model.tiles-per-token 4"),
    variant("float", "--model.ternary.mode none", tuned=True),
)

# By expected gain. Those of optimizer, decay, quantizer or gate tune their rate.
ABLATIONS = (
    variant("gate-none", "--model.routing.gate none", tuned=True),
    patched("ema"),
    patched("hash-gated", tuned=True),
    patched("half-hashed", tuned=True),
    patched("token", tuned=True),
    dataclasses.replace(patched("embedding", tuned=True), start=2e-3),
    patched("no-gradient"),
    variant("muon", "--train.optimizer muon", tuned=True),
    variant("no-decay", "--train.weight-decay 0", tuned=True),
    variant("decay-half", "--train.decay-until 0.5", tuned=True),
    # The clusters are of no use to it, but flags must suit the default arm too.
    Arm(
        "sparse-32-top8",
        "--arm sparse --model.num-tiles 32 --model.tiles-per-token 8 "
        "--model.tiles-per-cluster 8",
    ),
    variant("no-aux", "--model.routing.balance-weight 0 --model.routing.diversity-weight 0"),
    variant("late", "--model.ternary.full-precision-fraction 0.3", tuned=True),
    variant("channel", "--model.ternary.granularity channel", tuned=True),
    variant("sign", "--model.routing.signature sign"),
    variant("scores-x2", "--model.routing.score-scale 2"),
    variant("scores-half", "--model.routing.score-scale 0.5"),
    variant("balance-slow", "--train.balance-rate 0.05"),
    variant("balance-loss-only", "--train.balance-rate 0"),
    variant("balance-bias-only", "--model.routing.balance-weight 0"),
    variant("relu", "--model.activation relu"),
    variant("gelu", "--model.activation gelu"),
    variant("threshold", "--model.ternary.rule threshold", tuned=True),
    variant("progressive", "--model.ternary.mode progressive", tuned=True),
    variant("gate-softmax", "--model.routing.gate softmax", tuned=True),
    variant("gate-renormalized", "--model.routing.gate renormalized", tuned=True),
    patched("shared"),
    patched("gated"),
    patched("norm"),
    patched("principal"),
    patched("both"),
    patched("raw"),
    patched("centred"),
    patched("init-double"),
    patched("init-half"),
)  # fmt: skip

SHAKESPEARE = Setting(
    "shakespeare-char",
    "configs/shakespeare_char.yaml",
    groups={
        # Wider ones first: most arms fall there.
        "dense-curve": (
            dense(512),
            dense(256),
            dense(128),
            dense(64, 2e-3),
            dense(32, 2e-3),
        ),
        "dense-wide": (dense(1024),),
        "arms": (best, sparse_4, hierarchical, lookup),
        "best": (best,),
        "first-controls": CONTROLS[:2],
        "controls": (best, *CONTROLS),
        "seed-table": (hierarchical, sparse_4),
        "first-ablations": ABLATIONS[:6],
        "ablations": ABLATIONS,
    },
    also=(("dense-512", 1e-3, 3),),  # nanoGPT's own rate
    plan=(
        Step("arms", 3),
        Step("dense-curve", 0),
        Step("first-controls", 0),
        Step("best", 4),
        Step("controls", 0),
        Step("dense-curve", 1),
        Step("controls", 1),
        Step("first-ablations", 1),
        Step("dense-curve", 3),
        Step("controls", 3),
        Step("ablations", 1),
        Step("controls", 5),
        Step("dense-wide", 3),
        Step("seed-table", 5),
        Step("ablations", 3),
    ),
)

ENGLISH = Setting(
    "english-byte",
    "experiments/quality/english_byte.yaml",
    groups={
        "dense-curve": tuple(
            dense(w, 2e-3) for w in (512, 256, 128, 64, 1024, 32)
        ),
        "arms": (
            dataclasses.replace(best, start=2e-3),
            dataclasses.replace(hierarchical, start=2e-3),
            sparse_4,
            lookup,
        ),
    },
    plan=(
        Step("dense-curve", 1),
        Step("arms", 1),
        Step("dense-curve", 3),
        Step("arms", 3),
    ),
)  # fmt: skip

SETTINGS = {setting.name: setting for setting in (SHAKESPEARE, ENGLISH)}
