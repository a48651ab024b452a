"""The lookup layer and routing by clusters at their best, in the setting of the claim.

`lookup-D`: tiles of one neuron that read by themselves, in clusters, beside the
original's form and dense FFNs about as wide as their W.
`hierarchical-D`: tiles of a quarter of the model's width, four a token, chosen in
clusters, beside the same tiles chosen among all. Signatures move in both, since held
ones are stored at 16 bits a number.

    python -m experiments.quality.run lookup-128 --data FOLDER --runs DIR
"""

from experiments.quality.arms import Arm, dense
from experiments.quality.claim import CHOSEN, PRESET, tiles, width_flags
from experiments.quality.design import Setting, Step

OPEN = "--model.routing.balance-over open"
LOOKUP = "--arm tiles --model.ffn lookup"
# The original's layer has no projections for Muon.
ADAMW = "--train.optimizer adamw"
RATE = 4e-3  # where sweeps begin
BALANCE = "--train.balance-rate 0.1"  # a tile of many sees few tokens a step


def neurons(number: int, chosen: int, name: str, *flags: str, like: str | None = None):
    """Tiles of one neuron, with splines of two cells, in about sqrt(N) clusters of which
    a token looks into two.

    Args:
        number: of tiles, an even power of two.
        chosen: tiles a token.
        like: an arm whose rate it takes.
    """
    size = 2 ** ((number.bit_length()) // 2)
    sizes = f"--model.num-tiles {number} --model.tiles-per-token {chosen}"
    clusters = f"--model.tiles-per-cluster {size} --model.top-k-clusters 2"
    own = f"{LOOKUP} --model.reads own --model.grid-size 2 {OPEN} {BALANCE}"
    full = f"lookup-{number}-top{chosen}{name}"
    return Arm(full, " ".join((own, sizes, clusters, *flags)), RATE, like)


BEST = neurons(256, 16, "")
LIKE = BEST.name
FORMS = (
    BEST,
    neurons(256, 16, "-hidden", "--model.router-input hidden", like=LIKE),
    neurons(256, 16, "-ungated", "--model.routing.gate none", like=LIKE),
    neurons(256, 16, "-renormalized", "--model.routing.gate renormalized", like=LIKE),
    neurons(256, 16, "-one-cell", "--model.grid-size 1", like=LIKE),
    neurons(256, 16, "-four-cells", "--model.grid-size 4", like=LIKE),
    neurons(256, 16, "-real-splines", "--model.no-ternary-splines", like=LIKE),
    neurons(256, 16, "-float", "--model.ternary.mode none", like=LIKE),
)
SIZES = (
    neurons(256, 32, "", like=LIKE),
    neurons(1024, 16, "", like=LIKE),
    neurons(1024, 32, "", like=LIKE),
    neurons(4096, 64, "", like=LIKE),
)
ORIGINAL = (
    Arm("lookup-16-asked", f"{LOOKUP} {ADAMW} --model.num-tiles 16 --model.tiles-per-cluster 4 --model.tiles-per-token 1 --model.router-input hidden", 1e-3),
    Arm("lookup-16-one-cell", f"{LOOKUP} {ADAMW} --model.num-tiles 16 --model.tiles-per-cluster 4 --model.tiles-per-token 1 --model.grid-size 1", 2e-3),
)  # fmt: skip


def lookup(d_model: int) -> Setting:
    """Neurons found by clusters, the original's form, and dense FFNs about as wide as
    the neurons' W.
    """
    widths = (d_model // 2, d_model // 4, d_model)
    return Setting(
        f"lookup-{d_model}",
        PRESET,
        flags=f"{width_flags(d_model)} {CHOSEN}",
        groups={
            "best": (BEST,),
            "near": tuple(map(dense, widths[:1])),
            "dense-curve": tuple(map(dense, widths)),
            "arms": (BEST, *SIZES, *ORIGINAL),
            "forms": FORMS,
        },
        order=(
            Step("best", 0),
            Step("near", 0),
            Step("best", 1),
            Step("near", 1),
            Step("best", 3),
            Step("near", 3),
            Step("dense-curve", 1),
            Step("forms", 1),
            Step("arms", 1),
            Step("dense-curve", 3),
            Step("arms", 3),
        ),
    )


def clustered(number: int, top: int) -> Arm:
    """The tiles of the claim, chosen in clusters."""
    size = 2 ** ((number.bit_length()) // 2)
    clusters = f"--model.tiles-per-cluster {size} --model.top-k-clusters {top}"
    flags = f"--model.ffn hierarchical {clusters} {OPEN} {BALANCE}"
    arm = tiles(number, f"clusters-{top}", flags)
    return Arm(arm.name, arm.flags, RATE, f"tiles-{number}-flat")


def flat(number: int) -> Arm:
    """The same tiles, chosen among all."""
    return tiles(number, "flat", BALANCE)


NUMBERS = (64, 256, 1024)


def hierarchical(d_model: int) -> Setting:
    """Tiles chosen in two or four clusters, and among all."""
    pairs: dict[str, tuple[Arm, ...]] = {}
    for n in NUMBERS:
        pairs[f"tiles-{n}"] = flat(n), clustered(n, 4), clustered(n, 2)
    return Setting(
        f"hierarchical-{d_model}",
        PRESET,
        flags=f"{width_flags(d_model)} {CHOSEN}",
        groups=pairs,
        order=(
            *(Step(name, 1) for name in pairs),
            *(Step(name, 3) for name in pairs),
        ),
    )


SETTINGS = {s.name: s for s in (lookup(128), hierarchical(64))}
