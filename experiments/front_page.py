"""The tables of the front page and of the results page, from committed results.

    python -m experiments.front_page

reads `experiments/quality/results/*.json` and writes between the lines
`<!-- front page: NAME -->` and `<!-- end -->` of README.md and docs/results.md.

A loss is the mean over seeds at the best learning rate, with the half width of its 95 %
t-interval. The newest setting is that of the claim, of the seeds that did not choose the
rate; the others are of runs whose windows lie at random offsets (`train.sampler:
offsets`), since losses of two samplers are not compared. Memory is that of the FFN weights: as served, counted by the runs
themselves; in training, float32 weights and Muon's one float32 moment, 8 bytes each.
Seconds are those of a training step as `experiments.speed.steps` measured it.
"""

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.quality import curve
from experiments.quality.arms import Arm
from experiments.quality.claim import claim, fixed, per_layer, together
from experiments.quality.claim_page import VOCABULARY
from experiments.quality.claim_words import sentence_text
from experiments.quality.worth import (
    Worth,
    compared_seeds,
    concluding,
    model_of,
    shared,
    shown_pair,
    width_of,
    worth,
)
from trix_jax.lm.experiment import results
from trix_jax.lm.experiment.stats import interval
from trix_jax.lm.experiment.tables import table
from trix_jax.lm.experiment.tuning import Tuned, tuned

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "quality" / "results"
STEPS = ROOT / "experiments" / "speed" / "measured" / "steps.json"
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")
SAMPLER = "offsets"  # of the runs that the pages show
TRAINING_BYTES = 8
TRIX, HASH, HIDDEN = (
    "sparse-16-top4-embedding",
    "sparse-16-top4-hash",
    "sparse-16-top4",
)


class Setting(NamedTuple):
    """A file of results.

    Attributes:
        compute, memory, params: the trained dense widths nearest to the compute, the
            served memory and the parameters of TriX; None where none was trained.
        widths: of the dense curve, where it carries comparisons.
    """

    about: str
    compute: int | None = None
    memory: int | None = None
    params: int | None = None
    widths: tuple[int, ...] = ()


CAPTION = f"\nSampler of all runs: `{SAMPLER}`.\n"
NEWEST, OTHER = 128, 64  # widths of the claim's models
TILES, FEWER = 96, 64  # recommended, and those that cost less
FRONT = "english-256-muon"
SETTINGS = {
    FRONT: Setting(
        "English, 2,048 BPE tokens, width 256, Muon",
        256,
        128,
        1024,
        (128, 256, 512, 1024),
    ),
    "shakespeare-char-muon": Setting(
        "TinyShakespeare, 65 characters, width 128, Muon",
        128,
        64,
        512,
        (64, 128, 256, 512),
    ),
    "shakespeare-char": Setting("the same, AdamW", 128, 64, 512),
    "english-bpe-muon": Setting(
        "English, 2,048 BPE tokens, width 128, Muon", params=512
    ),
    "english-bpe": Setting("the same, AdamW", params=512),
    "stdlib-bytes": Setting("Python source, bytes, width 128, AdamW"),
}


def read(setting: str) -> dict[str, Tuned]:
    """The arms of a setting, each at the rate that is best for the seed that sweeps."""
    every = results.read(RESULTS / f"{setting}.json")
    runs = results.by_sampler(every).get(SAMPLER, [])
    arms = (tuned(runs, name) for name in sorted({run.arm for run in runs}))
    return {arm.arm: arm for arm in arms if arm is not None}


def shown(values: Sequence[float], sign: str = "") -> str:
    if len(values) < 2:
        return f"{values[0]:{sign}.3f} (one seed)"
    found = interval(values)
    return f"{found.mean:{sign}.3f} ± {found.half:.3f}"


def loss_of(arms: Mapping[str, Tuned], name: str) -> str:
    return shown(list(arms[name].losses.values())) if name in arms else "not run"


def less(arms: Mapping[str, Tuned], name: str, sign: str = "+") -> str:
    """The loss of TriX less that of another arm, paired by seed."""
    if name not in arms:
        return "not run"
    one, other = arms[TRIX].losses, arms[name].losses
    return shown([one[seed] - other[seed] for seed in sorted(one.keys() & other)], sign)


def comparison() -> str:
    """TriX in the setting of the claim, of fewer tiles, those by one hash for all and by
    signatures whose routes stay, and the dense FFNs of the curve; over the seeds that all
    have.
    """
    setting, runs = claim(NEWEST), claim_runs(NEWEST)
    ours, *dense = newest_arms()
    fewer = per_layer(FEWER, NEWEST)[0]
    same, read = together(FEWER, NEWEST)[0], fixed(FEWER, NEWEST)[0]
    names = {
        ours.name: "**TriX, recommended**",
        fewer.name: f"TriX, {FEWER} tiles",
        same.name: f"{FEWER} tiles, one hash for all layers",
        read.name: f"{FEWER} tiles, routes read and held",
    }
    arms = [ours, fewer, same, read, *dense]
    found = {a.name: tuned(runs, a.name, a.rate_of) for a in arms}
    reference, rows = found["dense-512"], []
    assert reference is not None
    seeds = set.intersection(*(set(concluding(a)) for a in found.values() if a))
    for arm in arms:
        one = found[arm.name]
        if one is not None:
            width = width_of(model_of(setting, arm, VOCABULARY))
            what = names.get(arm.name, arm.name.replace("-", " "))
            losses = list(shared(concluding(one), seeds).values())
            sizes = [f"{width.compute:,.0f}", f"{width.memory:,.0f}"]
            memory = f"{training_megabytes(one.one, reference.one):.1f}"
            seconds = seconds_of("wikipedia-128", arm.name)
            rows.append([what, shown(losses), *sizes, memory, seconds])
    head = "FFN; loss (nats a token); compute width; memory width, served"
    head += "; in training (MB); time (s a step, CPU)"
    return table(head.split("; "), rows)


def newest_arms() -> list[Arm]:
    """The recommended configuration, and dense FFNs from the narrowest to the widest."""
    curve_arms = claim(NEWEST).groups["dense-curve"]
    dense = sorted(curve_arms, key=lambda arm: int(arm.name.rpartition("-")[2]))
    return [per_layer(TILES, NEWEST)[0], *dense]


def claim_runs(d_model: int) -> list[results.Result]:
    return results.read(RESULTS / f"{claim(d_model).name}.json")


def differences() -> str:
    """What the recommended tiles and fewer are worth at both widths."""
    rows = []
    for tiles, d in itertools.product((TILES, FEWER), (NEWEST, OTHER)):
        place = worth(claim(d), claim_runs(d), per_layer(tiles, d)[0], VOCABULARY)
        assert place is not None
        own = f"{place.width.greater:.0f}"
        rows.append(
            [f"{tiles} tiles", f"{d}", own, *place_cells(place), f"{place.seeds}"]
        )
    head = "TriX; width of the model; width that it takes; worth a dense FFN of width"
    head += "; times its own (95 %); seeds"
    return f"{table(head.split('; '), rows)}\n{neighbours()}"


def neighbours() -> str:
    """The differences to the dense FFNs that the newest setting's curve is made of, which
    decide less than the curve does.
    """
    runs, (ours, *dense) = claim_runs(NEWEST), newest_arms()
    one, said = tuned(runs, ours.name, ours.rate_of), []
    assert one is not None
    for arm in dense:
        other = tuned(runs, arm.name, arm.rate_of)
        if other and compared_seeds(one, other):
            said.append(f"{apart(one, other)} of {arm.name.rpartition('-')[2]}")
    return (
        f"{TILES} tiles less the {len(said)} dense FFNs at width {NEWEST}, paired by seed: "
        f"{', '.join(said)}.\n{read_and_held()}"
    )


def read_and_held() -> str:
    """Signatures whose routes stay less the hash of the same tiles."""
    pair = shown_pair(claim_runs(NEWEST))
    seeds = compared_seeds(*pair) if pair else []
    if not pair or not seeds:
        return ""
    count = f" ({len(seeds)} seeds)" if len(seeds) > 1 else ""
    return f"Routes read and held, less the best hash: {apart(*pair)}{count}.\n"


def apart(one: Tuned, other: Tuned) -> str:
    """`-0.020 ± 0.012`: the losses of one less those of the other, paired by seed."""
    seeds = compared_seeds(one, other)
    return shown([one.losses[seed] - other.losses[seed] for seed in seeds], "+")


def place_cells(place: Worth) -> tuple[str, str]:
    """The dense width of equal loss, and how many times the arm's own that is; or that it
    is beyond the curve.
    """
    if place.equivalent.low == curve.ABOVE:
        widest = max(place.read.dense)
        times = f"more than **{widest / place.width.greater:.2f}**"
        return f"more than {widest:,}", times
    times = sentence_text(place.multiplier, 2)
    middle, space, rest = times.partition(" ")
    return sentence_text(place.equivalent, 0), f"**{middle}**{space}{rest}"


def seconds_of(setting: str, arm: str) -> str:
    """Of a training step; nothing where it was not timed."""
    measured = json.loads(STEPS.read_text("utf-8"))["settings"]
    arms = measured[setting]["arms"] if setting in measured else {}
    return f"{arms[arm]['seconds']:#.2g}" if arm in arms else ""


def training_megabytes(run: results.Result, dense: results.Result) -> float:
    """Of an FFN's weights and moments; `dense` says how many other parameters there are."""
    others = dense.params_total - dense.ffn_bits // 16
    return (run.params_total - others) * TRAINING_BYTES / 1e6


def row(what: str, arms: Mapping[str, Tuned], name: str) -> list[str]:
    """What an FFN costs and reaches."""
    run, dense = arms[name].one, arms[f"dense-{SETTINGS[FRONT].params}"].one
    return [
        what,
        loss_of(arms, name),
        f"{run.active_width:,.0f}",
        f"{run.ffn_bits / 8e6:.2f}",
        f"{training_megabytes(run, dense):.1f}",
        seconds_of("english-256", name),
    ]


def earlier() -> str:
    """TriX, the dense FFNs of equal compute, memory and parameters, and the floor."""
    arms, setting = read(FRONT), SETTINGS[FRONT]
    twins = {
        "compute": setting.compute,
        "served memory": setting.memory,
        "parameters": setting.params,
    }
    rows = [row("**TriX, 16 tiles, 4 a token**", arms, TRIX)]
    for what, width in twins.items():
        rows.append(row(f"dense, equal {what}", arms, f"dense-{width}"))
    floors = json.loads((RESULTS / "ngram-floors.json").read_text("utf-8"))
    losses = floors[FRONT]["val_loss"]
    order = min(losses, key=losses.get)
    rows.append([f"floor: counted {order}-grams", f"{losses[order]:.3f}", *[""] * 4])
    head = "FFN; loss (nats a token); compute (active width); served (MB)"
    head += "; in training (MB); time (s a step, CPU)"
    return table(head.split("; "), rows)


def earlier_differences() -> str:
    """What four of sixteen tiles are worth, and what they are behind."""
    arms, params = read(FRONT), f"dense-{SETTINGS[FRONT].params}"
    compute = arms[TRIX].one.active_width
    return (
        f"TriX reaches the loss of a dense FFN of width {equivalent(FRONT, arms)} "
        f"with the compute of width {compute:.0f}.\n"
        f"**It loses to the dense FFN of equal parameters**, by {less(arms, params, '')} "
        "nats.\nA fixed hash of the token chooses tiles as well as the signatures do: "
        f"they are {less(arms, HASH, '')} nats behind it.\nSampler of all runs: "
        f"`{SAMPLER}`.\n"
    )


def equivalent(name: str, arms: Mapping[str, Tuned]) -> str:
    """The dense width with the loss of TriX, and its 95 % interval."""
    dense = {w: list(arms[f"dense-{w}"].losses.values()) for w in SETTINGS[name].widths}
    if not dense:
        return "no curve"
    found = curve.equivalent_interval(dense, list(arms[TRIX].losses.values()))
    return f"{found.value:.0f} (95 %: {found.low:.0f} to {found.high:.0f})"


def losses() -> str:
    """Four of sixteen tiles beside dense FFNs, setting by setting."""
    rows = []
    for name, setting in SETTINGS.items():
        arms = read(name)
        widths = (setting.compute, setting.memory, setting.params)
        others = [TRIX, *(f"dense-{w}" for w in widths), HASH, HIDDEN]
        rows.append([setting.about, *(loss_of(arms, other) for other in others)])
    head = "setting; TriX; dense, equal compute; dense, equal memory"
    head += "; dense, equal parameters; TriX by a hash; TriX by hidden state"
    return table(head.split("; "), rows) + CAPTION


def paired() -> str:
    """The same as differences to each."""
    rows = []
    for name, setting in SETTINGS.items():
        arms = read(name)
        widths = (setting.compute, setting.memory, setting.params)
        others = [*(f"dense-{w}" for w in widths), HASH, HIDDEN]
        cells = [less(arms, other) for other in others]
        rows.append([setting.about, *cells, equivalent(name, arms)])
    head = "setting; dense, equal compute; dense, equal memory; dense, equal parameters"
    head += "; TriX by a hash; TriX by hidden state; dense width of equal loss"
    return table(head.split("; "), rows) + CAPTION


LAYERS = {
    TRIX: "sparse, 16 tiles, 4 a token, by token",
    "sparse-4-embedding": "sparse, 4 tiles, 1 a token, by token",
    HIDDEN: "sparse, 16 tiles, 4 a token, by hidden state",
    "sparse-4": "sparse, 4 tiles, 1 a token, by hidden state (the original's)",
    "hierarchical-16-embedding": "hierarchical, 16 tiles, 1 a token, by token",
    "hierarchical-16": "hierarchical, the same by hidden state (the original's)",
    "lookup-16-grid-1-embedding": "lookup, 16 tiles, one cell a spline, by token",
    "lookup-16-nothing": "attention alone, no FFN",
    "lookup-16": "lookup, 16 tiles, by hidden state (the original's)",
    "dense-512": "dense, 512 wide",
    "dense-64": "dense, 64 wide",
}


def layers() -> str:
    """Every layer on TinyShakespeare under AdamW."""
    arms, rows = read("shakespeare-char"), []
    for name, what in LAYERS.items():
        run, has_ffn = arms[name].one, name != "lookup-16-nothing"
        sizes = (run.active_width, run.ffn_bits / 8e3) if has_ffn else (0, 0)
        cells = [str(len(arms[name].runs)), *(f"{size:,.0f}" for size in sizes)]
        rows.append([what, loss_of(arms, name), *cells])
    return (
        table("FFN; loss; seeds; active width; served (kB)".split("; "), rows) + CAPTION
    )


PARTS = {
    part.__name__: part
    for part in (
        comparison,
        differences,
        earlier,
        earlier_differences,
        losses,
        paired,
        layers,
    )
}


def filled(
    page: str,
    parts: Mapping[str, Callable[[], str]] = PARTS,
    mark: str = "front page",
) -> str:
    """A page with its generated parts made anew."""
    pattern = rf"(<!-- {mark}: (\w+) -->\n).*?(<!-- end -->)"
    return re.sub(pattern, lambda m: m[1] + parts[m[2]]() + m[3], page, flags=re.S)


def main() -> None:
    for path in PAGES:
        path.write_text(filled(path.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
