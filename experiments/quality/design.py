"""What is asked of each setting: arms, their groups, and the order of training.

A step asks a group for some seeds: none is a first look at the rate where the sweep
starts, one is the sweep that brackets every arm's learning rate, more train at the rate
which that found. `schedule.runs_to_come` turns the steps and the results so far into the
runs that come next, so the order here is the order of expected value.
"""

from typing import NamedTuple

from experiments.quality.arms import (
    ABLATIONS,
    ARMS,
    BY_TOKEN_ROUTES,
    FLOATS,
    INHERITING,
    LOOKUPS,
    ON_THE_WAY,
    ROUTES,
    TOGETHER,
    Arm,
    best,
    by_hash,
    by_token,
    dense,
    hidden,
    hierarchical,
    late,
    late_top_1,
    lookup,
    patched,
    plane_by_token,
    slow_hierarchical,
    sparse_4,
)

SEEDS = (42, 43, 44, 45, 46, 47)  # the first one sweeps


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
        order: steps, one after the other.
        flags: of every run.
        also: what is run besides, last: `(arm, rate, seeds)`.
    """

    name: str
    preset: str
    groups: dict[str, tuple[Arm, ...]]
    order: tuple[Step, ...]
    flags: str = ""
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
        "arms": (*ARMS, plane_by_token),
        "best": (best,),
        "top-1": (by_token(sparse_4),),
        "routes": (best, *ROUTES),
        "floats": (best, *FLOATS),
        "original-table": (hierarchical, sparse_4),
        "dead-tiles": (by_token(hierarchical), slow_hierarchical),
        "ablations": ABLATIONS,
        "inheriting": INHERITING,
        "lookups": (lookup, *LOOKUPS),
        "on-the-way": (hidden, *ON_THE_WAY),
    },
    also=(("dense-512", 1e-3, 3),),  # nanoGPT's own rate
    order=(
        Step("best", 1),
        Step("best", 3),
        Step("routes", 1),
        Step("arms", 0),
        Step("routes", 3),
        Step("dense-curve", 3),
        Step("top-1", 3),
        Step("dense-wide", 1),
        Step("floats", 3),
        Step("lookups", 1),
        Step("arms", 3),
        Step("original-table", 5),
        Step("dead-tiles", 1),
        Step("dense-wide", 3),
        Step("routes", 5),
        Step("on-the-way", 1),
        Step("inheriting", 1),
        Step("ablations", 1),
        Step("ablations", 3),
        Step("on-the-way", 3),
    ),
)

# The same with Muon for the projections of all FFNs, dense ones too; the rest keeps AdamW.
MUON = "--train.optimizer muon"
SHAKESPEARE_MUON = Setting(
    "shakespeare-char-muon",
    "configs/shakespeare_char.yaml",
    flags=MUON,
    groups={
        "dense-curve": (dense(512), dense(256), dense(128), dense(64)),
        "dense-wide": (dense(1024),),
        "twins": (best, dense(512)),
        "arms": (best, late, by_token(sparse_4), late_top_1, hidden),
        "routes": (best, by_hash, *BY_TOKEN_ROUTES, hidden),
        "by-token": (best, by_hash, *BY_TOKEN_ROUTES),
        "late": (late,),
        "top-1": (by_token(sparse_4),),
        "floats": (best, *FLOATS),
        "ablations": (patched("whole"), *ABLATIONS),
        "inheriting": (patched("whole"), *INHERITING),
        "together": TOGETHER,
    },
    order=(
        Step("twins", 1),
        Step("floats", 1),
        Step("dense-curve", 1),
        Step("twins", 3),
        Step("dense-curve", 3),
        Step("by-token", 1),
        Step("top-1", 1),
        Step("by-token", 3),
        Step("top-1", 3),
        Step("inheriting", 1),
        Step("floats", 3),
        Step("by-token", 5),
        Step("routes", 1),
        Step("late", 5),
        Step("inheriting", 3),
        Step("routes", 3),
        Step("ablations", 3),
        Step("together", 3),
        Step("arms", 3),
        Step("dense-wide", 3),
    ),
)

ENGLISH = Setting(
    "english-bpe",
    "experiments/quality/english_bpe.yaml",
    groups={
        "dense-curve": (dense(512), dense(256), dense(128), dense(64)),
        "dense-wide": (dense(1024),),
        "finalists": (best, dense(512), by_hash, hidden),
        "arms": (best, by_token(sparse_4), hidden),
        "routes": (best, *ROUTES),
        "top-1": (by_token(sparse_4),),
    },
    order=(
        Step("finalists", 1),
        Step("finalists", 3),
        Step("top-1", 1),
        Step("routes", 1),
        Step("dense-curve", 1),
        Step("routes", 3),
        Step("dense-curve", 3),
        Step("arms", 3),
        Step("dense-wide", 3),
    ),
)
ENGLISH_MUON = ENGLISH._replace(name="english-bpe-muon", flags=MUON)

# Larger, for a GPU: seven workers side by side, under CUDA MPS, fill an H100.
ENGLISH_256 = Setting(
    "english-256-muon",
    "experiments/quality/english_256.yaml",
    flags=MUON,
    groups={
        "dense-curve": (dense(1024), dense(512), dense(256), dense(128)),
        "tiles": (best, late),
        "routes": (best, by_hash, *BY_TOKEN_ROUTES, hidden),
        "finalists": (best, late, by_hash, hidden),
        "arms": (best, late, by_token(sparse_4), hidden),
    },
    order=(
        Step("dense-curve", 1),
        Step("tiles", 1),
        Step("dense-curve", 3),
        Step("tiles", 3),
        Step("finalists", 3),
        Step("arms", 3),
        Step("routes", 3),
    ),
)

# The demo's corpus, bytes of code, in the shapes of TinyShakespeare: what should the
# signatures meet?
STDLIB = Setting(
    "stdlib-bytes",
    "configs/shakespeare_char.yaml",
    flags="--data.source stdlib --data.tokenizer byte --data.val-fraction 0.05",
    groups={
        "dense-curve": (dense(512), dense(256), dense(128)),
        "twins": (dense(512),),
        "routes": (best, hidden),
        "arms": (best, hidden),
    },
    order=(
        Step("arms", 1),
        Step("arms", 3),
        Step("twins", 3),
        Step("dense-curve", 3),
    ),
)

SETTINGS = {
    s.name: s
    for s in (
        SHAKESPEARE,
        SHAKESPEARE_MUON,
        ENGLISH,
        ENGLISH_MUON,
        ENGLISH_256,
        STDLIB,
    )
}
