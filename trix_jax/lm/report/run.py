"""REPORT.md: of one training run, and of the demo, which sets TriX beside a dense twin.

The words follow from the numbers, whoever wins. Reports hold relative links and no path
of the machine; the same inputs give the same text.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trix_jax.lm.report import plots
from trix_jax.lm.report.page import describe_ffn, made_with, table, write_page
from trix_jax.lm.report.plots import HEALTHY_SHARE
from trix_jax.lm.report.record import RunRecord, read_run
from trix_jax.lm.train.metrics import bits
from trix_jax.lm.train.optimizer import decay_begins

BALANCE = (
    "The balance loss is `N sum_n share_n probability_n - 1` (Switch Transformers, "
    "equation 4): 0 at even use, N - 1 where one tile takes all, and **negative** where "
    "scores prefer the tiles that have few tokens."
)

KIB = 2**10


class Floors(NamedTuple):
    """Order to nats per token of n-gram models that counted so many training tokens.

    Attributes:
        scored: validation tokens that these are of, from the first; None: those that
            the run is evaluated on.
    """

    losses: Mapping[int, float]
    tokens: int
    scored: int | None = None


def write_run_report(
    workdir: str | Path,
    floors: Floors | None = None,
    twin: str | Path | None = None,
) -> Path:
    """Writes `plots/*.png` and `REPORT.md` of one training run; returns the report.

    Args:
        workdir: of the run.
        floors: what counting n-grams achieves on its data.
        twin: the directory of a run to set beside it.

    Raises:
        ValueError: a file of a run is missing or damaged; names it.
    """
    workdir, figures = Path(workdir), Path(workdir) / "plots"
    run = read_run(workdir)
    other = None if twin is None else read_run(twin)
    config, model = run.config, run.config.model
    summary, params = run.summary, run.summary["params"]
    lines = (
        moments(run),
        floors.losses if floors else {},
        other.evals if other else (),
    )
    plots.losses(figures / "loss.png", run.steps, run.evals, *lines)
    plots.resources(figures / "resources.png", run.steps)
    rows = [
        ("validation loss, last (nats per token)", f"{summary['final_val_loss']:.4f}"),
        ("validation loss, best", f"{summary['best_val_loss']:.4f}"),
        ("perplexity, last", f"{summary['final_val_ppl']:.3f}"),
        ("bits per byte, last", bits(summary["final_val_bits_per_byte"])),
        ("parameters, of these in FFNs", f"{params['total']:,}, {params['ffn']:,}"),
        ("FFN multiply-accumulates per token", f"{params['ffn_active']:,}"),
        ("FFN weights as served", f"{params['ffn_bits'] / 8 / KIB:,.1f} KiB"),
        ("training tokens", f"{summary['tokens']:,}"),
        *_began(summary),
        ("training tokens per second, median", f"{run.speed:,.0f}"),
        ("seconds, compiling and evaluations included", f"{summary['seconds']:,.0f}"),
    ]
    if config.train.eval_tokens:
        count = run.evals[-1]["val_tokens"]
        rows.append(
            ("validation tokens of an evaluation, from the first", f"{count:,}")
        )
    parts = [
        f"# Training run: {config.arm}, seed {config.seed}",
        f"{model.n_layers} layers of width {model.d_model}, context {model.context}, "
        f"batch {config.train.batch_size}, learning rate "
        f"{config.train.learning_rate:g}; {describe_ffn(config)}.",
        "![Loss over training tokens](plots/loss.png)",
        table(("", "value"), rows),
        *_beside(summary, floors, other),
    ]
    if run.evals[-1]["tile_usage"]:
        parts += routing_section(workdir, run, summary["routing"])
    parts += [
        "## Speed and memory",
        "![Tokens per second and peak memory](plots/resources.png)",
        "## Made with",
        made_with(run.env),
        "All settings: [config.yaml](config.yaml). Every step: "
        "[metrics.jsonl](metrics.jsonl). Result: [summary.json](summary.json).",
    ]
    return write_page(workdir, parts)


def _began(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What else the weights have met: data before this, or another training."""
    rows = []
    if since := summary.get("data_since"):
        rows.append(("first steps, on other data", f"{since:,}"))
    if first := summary.get("init_from"):
        what = "export" if first["step"] is None else f"step {first['step']:,}"
        told = f"{what} of {first['path']}, not counted here"
        rows.append(("began with the weights of", told))
    return rows


def routing_section(
    workdir: Path, run: RunRecord, layers: Sequence[Mapping[str, Any]]
) -> list[str]:
    """The section on routing health; writes its two figures."""
    usage, figures = run.evals[-1]["tile_usage"], workdir / "plots"
    tiles = len(usage[0])
    plots.tile_usage(figures / "tile_usage.png", usage)
    plots.routing_health(figures / "routing.png", run.steps, run.evals, tiles)
    shares = plots.entropy_share([layer["entropy"] for layer in layers], tiles)
    rows = [
        (str(i), f"{share:.3f}", f"{layer['max_load']:.2f}", str(layer["dead_tiles"]))
        for i, (share, layer) in enumerate(zip(shares, layers, strict=True))
    ]
    least = min(shares)
    dead = sum(layer["dead_tiles"] for layer in layers)
    is_hash = run.config.model.routing.source == "hash"
    health = "Alive" if least >= HEALTHY_SHARE and not dead else "Not healthy"
    begin = (
        "A hash chooses, loads follow how often tokens come"
        if is_hash
        else f"**{health}**"
    )
    words = (
        f"{begin}: {dead} of {tiles * len(layers)} tiles dead (below a tenth of an even share), "
        f"and the entropy of tile use is at least {least:.3f} of its maximum ln {tiles}"
        f"{'' if is_hash else f' (collapsing below {HEALTHY_SHARE})'}."
    )
    head = ("layer", f"entropy / ln {tiles}", "largest load / even share", "dead tiles")
    return [
        "## Routing",
        words,
        "![Load of each tile in each layer](plots/tile_usage.png)",
        table(head, rows),
        "![Entropy, stability and auxiliary losses](plots/routing.png)",
        *([] if is_hash else [BALANCE]),
    ]


def moments(run: RunRecord) -> list[tuple[float, str]]:
    """Training tokens at which the weights, the addresses or the rate change, and what
    happens there.
    """
    train, model = run.config.train, run.config.model
    ternary, hold_after = model.ternary, model.routing.hold_after
    found = []
    if train.schedule != "constant":
        is_cosine = train.schedule == "cosine"
        begins = train.warmup_steps if is_cosine else decay_begins(train)
        found.append((begins / train.steps, "rate decays"))
    if model.has_ternary_products:
        turns = {"ste": ternary.full_precision_fraction}
        turns["progressive"] = ternary.hard_fraction
        found.append((turns.get(ternary.mode, 0.0), "weights become ternary"))
    if model.ffn != "dense":
        found.append((hold_after or 0.0, "addresses are held"))
    each = run.steps[-1]["tokens"] / run.steps[-1]["step"]
    return [
        (share * train.steps * each, words) for share, words in found if 0 < share < 1
    ]


def _beside(
    summary: Mapping[str, Any], floors: Floors | None, twin: RunRecord | None
) -> list[str]:
    """What the loss is to be read beside."""
    loss, rows = summary["final_val_loss"], []
    counted, tokens, scored = floors or ({}, 0, None)
    for order, floor in counted.items():
        name = plots.GRAM_NAMES.get(order, f"{order}-gram")
        name = f"{name}, counting {tokens:,} tokens"
        if scored:
            name += f", on the first {scored:,} of validation"
        rows.append((name, f"{floor:.4f}", f"{loss - floor:+.4f}"))
    if twin is not None:
        theirs, ffn = twin.summary["final_val_loss"], describe_ffn(twin.config)
        name = f"beside it: {ffn}, {twin.summary['tokens']:,} tokens"
        rows.append((name, f"{theirs:.4f}", f"{loss - theirs:+.4f}"))
    head = ("", "validation loss", "this run less it")
    return [table(head, rows)] if rows else []
