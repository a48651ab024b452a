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
        flags: of every run.
        also: what is run besides, last: `(arm, rate, seeds)`.
    """

    name: str
    preset: str
    groups: dict[str, tuple[Arm, ...]]
    plan: tuple[Step, ...]
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


def dense(width: int, start: float = 4e-3) -> Arm:
    return Arm(f"dense-{width}", f"--arm dense --model.ffn-width {width}", start)


TOP4 = "--arm sparse --model.tiles-per-token 4"
BY_TOKEN = "--model.router-input embedding"
HIDDEN = "sparse-16-top4"  # signatures meet the hidden state, as the seed has it
BEST = f"{HIDDEN}-embedding"  # so far: what controls and ablations start from


def by_token(arm: Arm) -> Arm:
    """The arm with signatures that meet the token's row of the embedding table."""
    flags = f"{arm.flags} {BY_TOKEN}"
    return Arm(f"{arm.name}-embedding", flags, 2e-3)


hidden = Arm(HIDDEN, TOP4)
best = by_token(hidden)
hierarchical = Arm("hierarchical-16", "--arm hierarchical", 2e-3)
sparse_4 = Arm("sparse-4", "--arm sparse --model.num-tiles 4", 1e-3)
lookup = Arm("lookup-16", "--arm lookup", 1e-3)
AS_ASKED = (hidden, sparse_4, hierarchical, lookup)  # as the request has them
ARMS = (*map(by_token, AS_ASKED), *AS_ASKED)


def variant(name: str, flags: str, tuned: bool = False, of: str = BEST) -> Arm:
    """An ablation of an arm: with a rate of its own, or the arm's."""
    base = f"{TOP4} {BY_TOKEN}" if of == BEST else TOP4
    start = 2e-3 if of == BEST else 4e-3
    return Arm(f"{of}-{name}", f"{base} {flags}", start, None if tuned else of)


def patched(name: str, tuned: bool = False, of: str = BEST) -> Arm:
    """An ablation that no flag of the library makes."""
    return dataclasses.replace(variant(name, "", tuned, of), patch=name)


# Who chooses the same tiles: each by what it looks at, the hidden state or the token.
by_hash = Arm(f"{HIDDEN}-hash", "--arm hash --model.tiles-per-token 4", 2e-3)
BY_TOKEN_ROUTES = tuple(
    variant(source, f"--model.routing.source {source}", tuned=True)
    for source in ("learned", "random")
)
ROUTES = (
    *BY_TOKEN_ROUTES,
    by_hash,
    Arm(f"{HIDDEN}-learned", "--arm learned --model.tiles-per-token 4"),
    Arm(f"{HIDDEN}-random", "--arm random --model.tiles-per-token 4"),
    hidden,
)
FLOATS = (variant("float", "--model.ternary.mode none", tuned=True),)

LATE = "--model.ternary.full-precision-fraction"
late = variant("late", f"{LATE} 0.3", tuned=True)

# By expected gain. Those of optimizer, decay, quantizer or gate tune their rate.
ABLATIONS = (
    variant("gate-none", "--model.routing.gate none", tuned=True),
    patched("pairs"),
    patched("pairs-half"),
    patched("norm"),
    # The clusters are of no use to it, but flags must suit the default arm too.
    Arm(
        "sparse-32-top8-embedding",
        "--arm sparse --model.num-tiles 32 --model.tiles-per-token 8 "
        f"--model.tiles-per-cluster 8 {BY_TOKEN}",
        2e-3,
    ),
    patched("shared"),
    variant("no-aux", "--model.routing.balance-weight 0 --model.routing.diversity-weight 0"),
    patched("ema"),
    patched("no-gradient"),
    variant("sign", "--model.routing.signature sign"),
    variant("relu", "--model.activation relu"),
    variant("gelu", "--model.activation gelu"),
    patched("gated"),
    variant("channel", "--model.ternary.granularity channel", tuned=True),
    late,
    variant("no-decay", "--train.weight-decay 0", tuned=True),
    variant("decay-half", "--train.decay-until 0.5", tuned=True),
    variant("final-0", "--train.final-learning-rate 0", tuned=True),
    variant("gate-softmax", "--model.routing.gate softmax", tuned=True),
    variant("gate-renormalized", "--model.routing.gate renormalized", tuned=True),
    variant("balance-slow", "--train.balance-rate 0.05"),
    variant("balance-loss-only", "--train.balance-rate 0"),
    variant("balance-bias-only", "--model.routing.balance-weight 0"),
    variant("scores-x2", "--model.routing.score-scale 2"),
    variant("scores-half", "--model.routing.score-scale 0.5"),
    patched("principal"),
    patched("both"),
    patched("raw"),
    patched("centred"),
    patched("init-double"),
    patched("init-half"),
    variant("threshold", "--model.ternary.rule threshold", tuned=True),
    variant("progressive", "--model.ternary.mode progressive", tuned=True),
)  # fmt: skip


def together(name: str, flags: str) -> Arm:
    """Late quantization with something else that looks like a gain."""
    return Arm(f"{BEST}-late-{name}", f"{best.flags} {flags}")


TOGETHER = (
    together("renormalized", f"{LATE} 0.3 --model.routing.gate renormalized"),
    together("half", f"{LATE} 0.5"),
)
late_top_1 = Arm("sparse-4-embedding-late", f"{by_token(sparse_4).flags} {LATE} 0.3")
INHERITING = tuple(arm for arm in ABLATIONS if arm.rate_of)

# By token some of its tiles are dead: is it the balance?
slow_hierarchical = Arm(
    "hierarchical-16-embedding-slow",
    f"{hierarchical.flags} --train.balance-rate 0.05 {BY_TOKEN}",
    rate_of="hierarchical-16-embedding",
)

# Steps on the way from the hidden state to the token.
ON_THE_WAY = (
    patched("token", tuned=True, of=HIDDEN),
    patched("hash-gated", tuned=True, of=HIDDEN),
    patched("half-hashed", tuned=True, of=HIDDEN),
    patched("ema", of=HIDDEN),
    variant("float", "--model.ternary.mode none", tuned=True, of=HIDDEN),
    *(
        variant(f"gate-{gate}", f"--model.routing.gate {gate}", tuned=True, of=HIDDEN)
        for gate in ("none", "softmax", "renormalized")
    ),
)


def of_lookup(
    name: str, flags: str = "", patch: str | None = None, tuned: bool = False
) -> Arm:
    """A lookup with something else, at a rate of its own or the lookup's."""
    source = None if tuned else lookup.name
    flags = f"{lookup.flags} {flags}".strip()
    return Arm(f"{lookup.name}-{name}", flags, 2e-3, source, patch)


# Where the lookup loses: its splines, what they read, its gate, its directions, its rank.
plane_by_token = of_lookup(
    "grid-1-embedding", f"--model.grid-size 1 {BY_TOKEN}", tuned=True
)
LOOKUPS = (
    of_lookup("nothing", patch="nothing", tuned=True),
    of_lookup("grid-1", "--model.grid-size 1", tuned=True),
    plane_by_token,
    of_lookup("grid-4", "--model.grid-size 4"),
    of_lookup("flat", patch="flat"),
    of_lookup("flat-embedding", BY_TOKEN, patch="flat"),
    of_lookup("continuous", patch="continuous"),
    of_lookup("linear", patch="linear"),
    of_lookup("float-splines", "--model.no-ternary-splines"),
    of_lookup("compress-128", "--model.compress-hidden 128"),
    of_lookup("gate-none", "--model.routing.gate none"),
    of_lookup("64-tiles", "--model.num-tiles 64"),
    of_lookup("four", patch="four", tuned=True),
    of_lookup("four-grid-1", "--model.grid-size 1", patch="four"),
    of_lookup("four-grid-1-embedding", f"--model.grid-size 1 {BY_TOKEN}", patch="four"),
    of_lookup(
        "64-tiles-grid-1-embedding",
        f"--model.num-tiles 64 --model.grid-size 1 {BY_TOKEN}",
    ),
    of_lookup(
        "grid-1-embedding-slow",
        f"--model.grid-size 1 --train.balance-rate 0.05 {BY_TOKEN}",
    ),
    of_lookup("four-continuous", patch="four-continuous"),
    of_lookup("four-linear", patch="four-linear"),
    *(dataclasses.replace(dense(width), rate_of=lookup.name) for width in (4, 16)),
)

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
        "seed-table": (hierarchical, sparse_4),
        "dead-tiles": (by_token(hierarchical), slow_hierarchical),
        "ablations": ABLATIONS,
        "inheriting": INHERITING,
        "lookups": (lookup, *LOOKUPS),
        "on-the-way": (hidden, *ON_THE_WAY),
    },
    also=(("dense-512", 1e-3, 3),),  # nanoGPT's own rate
    plan=(
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
        Step("seed-table", 5),
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
    plan=(
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
    plan=(
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
    plan=(
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
    plan=(
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
