"""The settings of the claim: English Wikipedia, every token seen at most once, Muon.

First the body around the FFN, chosen by the dense FFN at one rate so far (`BODY`). Then
at each width D a dense curve, and tiles of D / 4, four a token, whose addresses are
read from the weights and held (`WIDTHS`): against those who choose tiles otherwise, and
over the number of tiles.
"""

import dataclasses

from experiments.quality.arms import Arm, dense, in_sets
from experiments.quality.design import Setting, Step

PRESET = "experiments/quality/wikipedia.yaml"
HEADS = 32  # width of one

# The body ----------------------------------------------------------------------------


def body(name: str, *flags: str) -> Arm:
    """The dense FFN, four times as wide as the model, in another body."""
    return Arm(f"body-{name}", " ".join((dense(256).flags, *flags)), 4e-3)


ROTARY, RMS = "--model.positions rotary", "--model.norm rms"
QK, FAN_IN = "--model.qk-norm", "--model.init fan_in"
MODERN = f"{ROTARY} {RMS} {QK}"
CHOSEN = MODERN  # 0.09 nats ahead of GPT-2's body at the first rate
CONTEXT_256 = "--model.context 256 --train.batch-size 8"  # as many tokens a step


def width_flags(d_model: int) -> str:
    return f"--model.d-model {d_model} --model.n-heads {d_model // HEADS}"


# The names say what differs from GPT-2's body.
BODY = Setting(
    "wikipedia-64-body",
    PRESET,
    flags=width_flags(64),
    groups={
        "parts": (body("rotary", ROTARY), body("qk", QK), body("rms", RMS)),
        "documents": (
            body("modern-256", MODERN, CONTEXT_256),
            body("modern-256-apart", MODERN, CONTEXT_256, "--model.document-mask"),
        ),
        "finalists": (body("gpt2"), body("modern", MODERN)),
        "bodies": (
            body("gpt2"),
            body("modern", MODERN),
            body("fan-in", FAN_IN),
            body("modern-fan-in", MODERN, FAN_IN),
        ),
    },
    order=(
        Step("bodies", 0),
        Step("documents", 0),
        Step("finalists", 1),
        Step("finalists", 3),
        Step("documents", 3),
        Step("bodies", 1),
        Step("parts", 1),
    ),
)

# Tiles -------------------------------------------------------------------------------

LADDER = (16, 32, 48, 64, 128)
MORE = (96, 128)  # of the best tiles, an eighth of them a token
HOLD, SCORES = "--model.routing.hold-after", "--model.routing.hold scores"
HASH = "--model.routing.source hash"
PAIR = "--model.router-input pair"


def tiles(number: int, name: str, *flags: str, like: int | None = None) -> Arm:
    """Tiles of a quarter of the model's width, four a token, routed by token.

    Args:
        number: of tiles; a multiple of 4.
        name: says who chooses them, and when that is held.
        flags: what makes it so.
        like: as many tiles, held, whose rate it takes.
    """
    size = f"--arm tiles --model.num-tiles {number} --model.expansion {number // 4}"
    source = None if like is None else f"tiles-{like}-held"
    return Arm(f"tiles-{number}-{name}", " ".join((size, *flags)), 4e-3, source)


def held(number: int) -> Arm:
    """Signatures read after a tenth of the training, and held. The rate of 64 tiles is
    that of the steps beside it in the ladder; its ends have their own.
    """
    like = 64 if number in (32, 48) else None
    return tiles(number, "held", f"{HOLD} 0.1", like=like)


def curve_of(d_model: int) -> tuple[Arm, ...]:
    """Dense FFNs. What tiles are read off has rates of its own (`around`), as the ends
    have; the neighbour on the other side has the rate of the middle.
    """
    around = around_of(d_model)
    middle = around[0]
    beside = (dense(width * d_model) for width in (2, 8))
    inherits = (dataclasses.replace(arm, rate_of=middle.name) for arm in beside)
    return (
        *around,
        *(arm for arm in inherits if arm.name != around[1].name),
        dense(16 * d_model, 8e-3),
        dense(d_model, 8e-3),
    )


def around_of(d_model: int) -> tuple[Arm, Arm]:
    """The two dense FFNs that the best tiles end between, or next to: 4 D and 8 D wide."""
    return dense(4 * d_model, 8e-3), dense(8 * d_model, 8e-3)


def by_activation(d_model: int) -> tuple[Arm, ...]:
    """Dense FFNs with the tiles' squared ReLU, and tiles with the dense FFN's GELU."""
    dense_ones = (
        dataclasses.replace(
            arm, name=f"{arm.name}-relu2", flags=f"{arm.flags} --model.activation relu2"
        )
        for arm in around_of(d_model)[:1]
    )
    gelu = (
        dataclasses.replace(
            arm,
            name=f"{arm.name}-gelu",
            flags=f"{arm.flags} --model.activation gelu",
            rate_of=None,
        )
        for arm in together(64, d_model)[:1]
    )
    return (*gelu, *dense_ones)


def by_others(number: int) -> tuple[Arm, ...]:
    """Who else chooses tiles by token."""
    return (
        tiles(number, "hash", HASH),
        tiles(number, "moving"),
        tiles(number, "random", "--model.routing.source random"),
        tiles(
            number, "random-held", f"--model.routing.source random {HOLD} 0 {SCORES}"
        ),
        tiles(number, "learned", "--model.routing.source learned"),
        tiles(
            number,
            "learned-held",
            f"--model.routing.source learned {HOLD} 0.1 {SCORES}",
        ),
        tiles(number, "hash-pairs", HASH, PAIR),
    )


def at_ffn_rates(arm: Arm) -> tuple[Arm, ...]:
    """The projections of FFNs at a multiple of the arm's best rate: a tile sees K of N
    tokens, and Muon's step is as long.
    """
    return tuple(
        Arm(
            f"{arm.name}-ffn-{times:g}",
            f"{arm.flags} --train.ffn-rate-factor {times:g}",
            start,
        )
        for times, start in ((2.0, 4e-3), (0.5, 8e-3), (0.25, 8e-3))
    )


def when_and_what(number: int) -> tuple[Arm, ...]:
    """Other moments to hold, other things to hold, other things to look at; at the rate
    of `held`.
    """
    moments = [
        tiles(number, f"held-at-{share:g}", f"{HOLD} {share:g}", like=number)
        for share in (0.02, 0.05, 0.2, 0.5)
    ]
    return (
        tiles(number, "held-scores", f"{HOLD} 0.1 {SCORES}", like=number),
        tiles(
            number,
            "held-routes",
            f"{HOLD} 0.1 --model.routing.hold routes",
            like=number,
        ),
        *moments,
        tiles(number, "held-pair", f"{HOLD} 0.1 {PAIR}", like=number),
        tiles(
            number, "held-late-hidden", f"{HOLD} 0.1 --model.hidden-from 2", like=number
        ),
        tiles(
            number,
            "held-hidden",
            f"{HOLD} 0.1 --model.router-input hidden",
            like=number,
        ),
    )


LATE = "--model.ternary.full-precision-fraction"


def not_quite_ternary(number: int) -> tuple[Arm, ...]:
    """Real weights for all of the training, or for a share of it; other ways to be
    ternary: a scale an output, a staircase that sharpens, another rule.
    """
    ternary = "--model.ternary"
    return (
        tiles(number, "hash-float", HASH, f"{ternary}.mode none"),
        tiles(number, "hash-late", HASH, f"{LATE} 0.3"),
        tiles(number, "hash-channel", HASH, f"{ternary}.granularity channel"),
        tiles(number, "hash-progressive", HASH, f"{ternary}.mode progressive"),
        tiles(number, "hash-threshold", HASH, f"{ternary}.rule threshold"),
        tiles(number, "hash-later", HASH, f"{LATE} 0.7"),
    )


def balanced(number: int) -> tuple[Arm, ...]:
    """As much compute as memory: an eighth of the tiles a token, of two bits in place of
    sixteen.
    """
    eighth = f"--model.tiles-per-token {number // 8}"
    return (
        tiles(number, "hash-eighth", HASH, eighth),
        tiles(number // 2, "hash", HASH),
        tiles(number, "held-eighth", f"{HOLD} 0.1", eighth),
    )


def more_worth(number: int, d_model: int) -> tuple[Arm, ...]:
    """What else may make held tiles worth more."""
    shared = f"--model.tiles-per-token 3 --model.shared-width {d_model // 4}"
    fine = f"--model.num-tiles {4 * number} --model.tiles-per-token 16"
    return (
        tiles(number, "held-late", f"{HOLD} 0.1 {LATE} 0.3"),
        tiles(number, "held-shared", f"{HOLD} 0.1 {shared}"),
        tiles(number, "held-sign", f"{HOLD} 0.1 --model.routing.signature sign"),
        tiles(number, "held-fine", f"{HOLD} 0.1 {fine}"),
        tiles(
            number, "held-renormalized", f"{HOLD} 0.1 --model.routing.gate renormalized"
        ),
        tiles(number, "held-ungated", f"{HOLD} 0.1 --model.routing.gate none"),
    )


def together(number: int, d_model: int) -> tuple[Arm, ...]:
    """As much compute as memory, and one of the tiles a token is a small real FFN that is
    always on; with signs as held signatures, and with the hash, which has the rate that
    was swept before (`with_losses`).
    """
    parts = (
        f"--model.tiles-per-token {number // 8 - 1}",
        f"--model.shared-width {d_model // 4}",
    )
    sign = "--model.routing.signature sign"
    hashed = tiles(number, "hash-eighth-shared", HASH, *parts)
    swept = f"{hashed.name}{LOSSES}"
    read = tiles(number, "held-eighth-shared", f"{HOLD} 0.1", sign, *parts)
    return (
        dataclasses.replace(hashed, start=8e-3, rate_of=swept),
        dataclasses.replace(read, start=8e-3),
    )


def per_layer(number: int, d_model: int) -> tuple[Arm, ...]:
    """The hash of `together`, another one in every layer."""
    base = together(number, d_model)[0]
    return (Arm(f"{base.name}-layers", f"{base.flags} --model.hash-per-layer"),)


def fixed(number: int, d_model: int) -> tuple[Arm, ...]:
    """What the hash has and held signatures do not: routes that stay, and gates of one.
    With both, tokens are spread over tiles once, by likeness in place of chance.
    """
    base = together(number, d_model)[1]
    routes, ungated = "--model.routing.hold routes", "--model.routing.gate none"
    early = "--model.routing.hold-after 0.02"
    changes = {
        "routes": (routes,),
        "ungated": (ungated,),
        "table": (routes, ungated),
        "early-table": (routes, ungated, early),
    }
    return tuple(
        dataclasses.replace(
            base, name=f"{base.name}-{name}", flags=" ".join((base.flags, *flags))
        )
        for name, flags in changes.items()
    )


LOSSES = "-losses"


def with_losses(arms: tuple[Arm, ...]) -> tuple[Arm, ...]:
    """Runs by a hash until commit 921d8bd: with auxiliary losses of scores that a hash does
    not use. No step asks for them.
    """
    return tuple(
        dataclasses.replace(arm, name=f"{arm.name}{LOSSES}", rate_of=None)
        for arm in arms
        if HASH in arm.flags
    )


def claim(d_model: int) -> Setting:
    """The claim at one width of the model."""
    curve = curve_of(d_model)
    return Setting(
        f"wikipedia-{d_model}",
        PRESET,
        flags=f"{width_flags(d_model)} {CHOSEN}".strip(),
        groups={
            "dense-middle": curve[:3],
            "dense-around": around_of(d_model),
            "activation": by_activation(d_model),
            "dense-curve": curve,
            "held": (held(64),),
            "hash": (held(64), tiles(64, "hash", HASH)),
            "ladder": tuple(held(number) for number in (64, 16, 32, 48, 128)),
            "routes": (held(64), *by_others(64)),
            "ffn-rates": at_ffn_rates(tiles(64, "hash", HASH)),
            "holding": when_and_what(64),
            "holding-16": (held(16), tiles(16, "hash", HASH), tiles(16, "moving")),
            "worth": more_worth(64, d_model),
            "ternary": not_quite_ternary(64),
            "float": not_quite_ternary(64)[:1],
            "balanced-hash": balanced(64)[:2],
            "balanced": balanced(64),
            "best": together(64, d_model)[:1],
            "widest": (dense(16 * d_model, 8e-3),),
            "together": together(64, d_model),
            "fixed": fixed(64, d_model),
            "read": fixed(64, d_model)[:1],
            "layers": per_layer(64, d_model),
            "sets": in_sets(*per_layer(96, d_model)),
            "more": tuple(per_layer(number, d_model)[0] for number in MORE),
            "layers-ffn": at_ffn_rates(per_layer(64, d_model)[0])[:2],
            "before": with_losses((*together(64, d_model), *by_activation(d_model))),
        },
        order=(
            Step("dense-around", 1),
            Step("layers", 1),
            Step("dense-around", 4),
            Step("layers", 4),
            Step("more", 1),
            Step("more", 4),
            # By two seeds more, which the curve then needs too.
            Step("layers", 6),
            Step("dense-around", 6),
            Step("best", 4),
            # Signatures whose routes stay against the hash.
            *((Step("best", 6), Step("read", 6)) if d_model == 128 else ()),
            # Where the best tiles' interval goes beyond the curve.
            *((Step("widest", 4),) if d_model == 128 else ()),
            *(
                (Step("fixed", 0), Step("read", 1), Step("read", 4))
                if d_model == 64
                else ()
            ),
            Step("together", 0),
            Step("activation", 0),
            Step("together", 1),
            Step("together", 4),
            Step("dense-middle", 1),
            Step("dense-curve", 0),
            Step("hash", 1),
            Step("balanced-hash", 0),
            Step("ternary", 0),
            Step("ffn-rates", 0),
            Step("balanced-hash", 1),
            Step("dense-middle", 1),
            Step("dense-curve", 1),
            Step("float", 1),
            Step("worth", 0),
            Step("holding", 1),
            Step("hash", 4),
            Step("balanced", 1),
            Step("balanced", 4),
            Step("ladder", 1),
            Step("dense-curve", 4),
            Step("ladder", 4),
            Step("worth", 1),
            Step("ternary", 1),
            Step("ffn-rates", 1),
            Step("routes", 1),
            Step("holding-16", 1),
            Step("hash", 6),
            Step("routes", 6),
            Step("sets", 4),
        ),
    )


WIDTHS = (64, 128, 256)
SETTINGS = {s.name: s for s in (BODY, *map(claim, WIDTHS))}
