"""The arms: ways to build the FFN, or to train it, each a name and flags.

Controls and ablations start from `best`. What no flag makes is in `patches.py`.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to build the FFN, or to train it.

    Attributes:
        name: in results, tables and run directories.
        flags: what `trix-jax train PRESET` is given.
        start: the learning rate that its sweep begins with.
        rate_of: another arm, whose best rate this one inherits instead of sweeping.
        patch: what is replaced in the library, a name in `patches.PATCHES`.
    """

    name: str
    flags: str
    start: float = 4e-3
    rate_of: str | None = None
    patch: str | None = None


def dense(width: int, start: float = 4e-3) -> Arm:
    return Arm(f"dense-{width}", f"--arm dense --model.ffn-width {width}", start)


def in_sets(arm: Arm) -> tuple[Arm, ...]:
    """Tokens hashed to sets of tiles, once, twice and three times; then twelve a token."""

    def hashed(sets: int, times: int) -> Arm:
        flags = f"{arm.flags} --model.routing.hash-sets {sets}"
        if times > 1:
            flags += f" --model.routing.sets-per-token {times}"
            flags += " --model.tiles-per-token 12"
        name = arm.name.removesuffix("-layers")
        return Arm(f"{name}-sets-{sets}x{times}", flags)

    return hashed(64, 1), hashed(256, 1), hashed(64, 2), hashed(32, 3)


TOP4 = "--arm sparse --model.tiles-per-token 4"
BY_TOKEN = "--model.router-input embedding"


def by_token(arm: Arm) -> Arm:
    """The arm with signatures that meet the token's row of the embedding table."""
    flags = f"{arm.flags} {BY_TOKEN}"
    return Arm(f"{arm.name}-embedding", flags, 2e-3)


# Signatures meet the hidden state, as in the original.
hidden = Arm("sparse-16-top4", TOP4)
best = by_token(hidden)  # so far: what controls and ablations start from
hierarchical = Arm("hierarchical-16", "--arm hierarchical", 2e-3)
sparse_4 = Arm("sparse-4", "--arm sparse --model.num-tiles 4", 1e-3)
lookup = Arm("lookup-16", "--arm lookup", 1e-3)
ORIGINAL = (hidden, sparse_4, hierarchical, lookup)
ARMS = (*map(by_token, ORIGINAL), *ORIGINAL)


def variant(name: str, flags: str, tuned: bool = False, of: Arm = best) -> Arm:
    """An ablation of an arm: with a rate of its own, or the arm's."""
    source = None if tuned else of.name
    return Arm(f"{of.name}-{name}", f"{of.flags} {flags}".strip(), of.start, source)


def patched(name: str, tuned: bool = False, of: Arm = best) -> Arm:
    """An ablation that no flag of the library makes."""
    return dataclasses.replace(variant(name, "", tuned, of), patch=name)


# Who chooses the same tiles: each by what it looks at, the hidden state or the token.
by_hash = Arm(f"{hidden.name}-hash", "--arm hash --model.tiles-per-token 4", 2e-3)
BY_TOKEN_ROUTES = tuple(
    variant(source, f"--model.routing.source {source}", tuned=True)
    for source in ("learned", "random")
)
ROUTES = (
    *BY_TOKEN_ROUTES,
    by_hash,
    Arm(f"{hidden.name}-learned", "--arm learned --model.tiles-per-token 4"),
    Arm(f"{hidden.name}-random", "--arm random --model.tiles-per-token 4"),
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
    return Arm(f"{best.name}-late-{name}", f"{best.flags} {flags}")


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
    patched("token", tuned=True, of=hidden),
    patched("hash-gated", tuned=True, of=hidden),
    patched("half-hashed", tuned=True, of=hidden),
    patched("ema", of=hidden),
    variant("float", "--model.ternary.mode none", tuned=True, of=hidden),
    *(
        variant(f"gate-{gate}", f"--model.routing.gate {gate}", tuned=True, of=hidden)
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
