"""REPORT.md of the demo, which sets TriX beside two dense models: its twin of as many
parameters, and one of its cost.

The words follow from the numbers, whoever wins.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trix_jax.lm.config import RunConfig
from trix_jax.lm.report import plots
from trix_jax.lm.report.page import (
    code,
    describe_ffn,
    fence,
    made_with,
    table,
    write_page,
)
from trix_jax.lm.report.record import RunRecord, check, read_run
from trix_jax.lm.report.run import routing_section

TIE = 0.005  # nats: a convention; within it no winner is named
ROUNDING = 1e-4  # nats: float32 sums in another order stay below this
ARMS = ("trix", "dense", "dense_w")
SWEPT = (600, 42)  # steps and seed that the demo's rates were found for


def write_demo_report(workdir: str | Path, result: Mapping[str, Any]) -> Path:
    """Writes `plots/*.png` and `REPORT.md` of the demo; returns the report.

    Args:
        workdir: holds the runs of the arms, `trix/`, `dense/` and `dense_w/`.
        result: the contents of `demo --json` (`trix_jax.lm.demo.run_demo`).

    Raises:
        ValueError: a file of a run, or a key of `result`, is missing or damaged.
    """
    workdir = Path(workdir)
    _check_result(result)
    arms = {name: result["arms"][name] for name in ARMS}
    floors = dict(sorted((int(n), float(v)) for n, v in result["ngram"].items()))
    runs = {name: read_run(workdir / name) for name in arms}
    if not runs["trix"].evals[-1]["tile_usage"]:
        raise ValueError(f"{workdir / 'trix'} must be a run with routing. Got none.")

    parts = [
        "# TriX beside dense models",
        "Three small language models learn the same text. In TriX's feed-forward "
        "layers (FFNs) weights are -1, 0 or +1 and each token uses a few tiles, with a "
        "small real FFN beside them. Its dense twin has about as many parameters. The "
        "dense model of equal cost computes as much, or stores as much when served, "
        "whichever is more.",
        f"{_verdict(arms)} {_of_equal_cost(arms)} {_below_bigram(arms, floors[2])}",
        "![Validation loss over training tokens](plots/val_loss.png)",
        f"> One seed and minutes of training, {_rates(runs)}: a demonstration, not "
        "evidence. The comparison with several seeds and a curve of dense widths is "
        "`experiments/quality` in the repository.",
        "## What TriX saves",
        *_saved(arms, runs, result),
        "## The numbers",
        _compare(arms, runs),
        "Counting n-grams, trained and scored on the same splits:",
        _floors_table(arms, floors),
        *routing_section(workdir, runs["trix"], result["routing"]),
        "## Packed equals trained",
        _packed(arms["trix"]["val_loss"], result["packed"]["val_loss"]),
        "## A sample of the packed model",
        f"After the prompt {code(result['prompt'])}:",
        fence(result["prompt"], result["sample"]),
        "## Made with",
        *_origin(runs["trix"], result),
    ]
    if all((workdir / name / "REPORT.md").is_file() for name in arms):
        parts.append(
            "The runs in full: [TriX](trix/REPORT.md), [dense twin](dense/REPORT.md), "
            "[dense of equal cost](dense_w/REPORT.md)."
        )
    _draw(workdir / "plots", arms, runs, floors, result["bytes"])
    return write_page(workdir, parts)


def _rates(runs: Mapping[str, RunRecord]) -> str:
    """The rates, and whether they were found for this length and seed."""
    named = ", ".join(
        f"{plots.ARM_NAMES[arm]} {run.config.train.learning_rate:g}"
        for arm, run in runs.items()
    )
    config = runs["trix"].config
    found = (
        "each better than its half and double"
        if _own(config) == SWEPT
        else "not of these"
    )
    return (
        f"at learning rates ({named}) swept for {SWEPT[0]} steps of seed {SWEPT[1]}, "
        f"{found}"
    )


def _own(config: RunConfig) -> tuple[int, int]:
    return config.train.steps, config.seed


def _draw(figures: Path, arms, runs, floors, sizes) -> None:
    evals = {name: run.evals for name, run in runs.items()}
    active = {name: values["ffn_active"] for name, values in arms.items()}
    plots.val_losses(figures / "val_loss.png", evals, floors)
    plots.savings(figures / "savings.png", active, sizes)


def _saved(arms, runs: Mapping[str, RunRecord], result) -> list[str]:
    active = {name: values["ffn_active"] for name, values in arms.items()}
    return [
        _savings(active, result["bytes"], result["config"]),
        "![Multiply-accumulates and bytes](plots/savings.png)",
        "This counts arithmetic and bytes, not seconds: in this run TriX trained at "
        f"{runs['trix'].speed:,.0f} tokens per second, its twin at "
        f"{runs['dense'].speed:,.0f}, the dense model of equal cost at "
        f"{runs['dense_w'].speed:,.0f}.",
    ]


def _origin(run: RunRecord, result: Mapping[str, Any]) -> list[str]:
    """What the demo was made with, and the command that makes it again."""
    return [
        _setting(run.config, result["config"], result["seconds"]),
        made_with(run.env),
        "The same again:",
        f"```sh\ntrix-jax demo --steps {result['config']['steps']} "
        f"--seed {run.config.seed}\n```",
    ]


def _verdict(arms: Mapping[str, Mapping[str, Any]]) -> str:
    """Who wins and by how much, from the numbers alone."""
    trix, dense = (arms[arm]["val_loss"] for arm in ARMS[:2])
    gap, ratio = trix - dense, f"{math.exp(trix - dense):.3f}"
    if abs(gap) <= TIE:
        return (
            f"**A tie.** Validation loss is {trix:.4f} for TriX and {dense:.4f} for "
            f"its dense twin: {abs(gap):.4f} nats per token apart (a perplexity ratio "
            f"of {ratio}), and this report names no winner within {TIE}."
        )
    low, high = min(trix, dense), max(trix, dense)
    pair = ("TriX", "its dense twin") if gap < 0 else ("The dense twin", "TriX")
    return (
        f"**{pair[0]} wins** by {abs(gap):.4f} nats per token: "
        f"validation loss {low:.4f} against {high:.4f} for {pair[1]}. The perplexity "
        f"of TriX is {ratio} times its twin's."
    )


def _of_equal_cost(arms: Mapping[str, Mapping[str, Any]]) -> str:
    gap = arms["trix"]["val_loss"] - arms["dense_w"]["val_loss"]
    where = "level with" if abs(gap) <= TIE else "ahead of" if gap < 0 else "behind"
    return (
        f"TriX is **{where} the dense model of equal cost**: {gap:+.4f} nats, against "
        f"{arms['dense_w']['val_loss']:.4f}."
    )


def _below_bigram(arms: Mapping[str, Mapping[str, Any]], bigram: float) -> str:
    names = {arm: plots.ARM_NAMES[arm] for arm in ARMS}
    below = [names[arm] for arm in ARMS if arms[arm]["val_loss"] < bigram]
    if len(below) == len(ARMS):
        return f"All are below the bigram floor of {bigram:.3f}."
    if below:
        rest = [name for name in names.values() if name not in below]
        return (
            f"Below the bigram floor of {bigram:.3f}: {', '.join(below)}; "
            f"**not**: {', '.join(rest)}."
        )
    return f"**None is below the bigram floor** of {bigram:.3f}: trained too little."


def _savings(active: Mapping[str, int], sizes: Mapping[str, int], config) -> str:
    ratio = active["dense"] / active["trix"]
    fewer = f"{ratio:.1f} times fewer" if ratio >= 1 else f"{1 / ratio:.1f} times more"
    packed = sizes["ffn_float32"] / sizes["ffn_packed"]
    return (
        f"Each token uses {config['tiles_per_token']} of {config['num_tiles']} tiles "
        f"and the small real FFN: "
        f"{active['trix']:,} multiply-accumulates in the FFNs, routing "
        f"included, against {active['dense']:,} in the twin, **{fewer}**. With tiles "
        f"in two bits and the small real FFN in float32, the FFN weights take {sizes['ffn_packed']:,} "
        f"bytes instead of {sizes['ffn_float32']:,} in float32, **{packed:.1f} times "
        f"fewer** ({packed / 2:.1f} times fewer than 16-bit weights)."
    )


def _compare(arms: Mapping[str, Mapping[str, Any]], runs) -> str:
    names = (
        ("validation loss (nats per token)", "val_loss", ".4f"),
        ("perplexity", "val_ppl", ".3f"),
        ("bits per byte", "val_bits_per_byte", ".4f"),
        ("parameters", "params_total", ",d"),
        ("FFN multiply-accumulates per token", "ffn_active", ",d"),
    )
    rows = [
        (text, *(f"{arms[arm][key]:{form}}" for arm in ARMS))
        for text, key, form in names
    ]
    speeds = (f"{runs[arm].speed:,.0f}" for arm in ARMS)
    rows.append(("training tokens per second", *speeds))
    return table(("", *(plots.ARM_NAMES[arm] for arm in ARMS)), rows)


def _floors_table(arms, floors: Mapping[int, float]) -> str:
    rows = [
        (
            plots.GRAM_NAMES.get(order, f"{order}-gram"),
            f"{loss:.4f}",
            *("yes" if arms[a]["val_loss"] < loss else "no" for a in ARMS),
        )
        for order, loss in floors.items()
    ]
    heads = (f"{plots.ARM_NAMES[arm]} is below" for arm in ARMS)
    return table(("", "loss", *heads), rows)


def _packed(trained: float, packed: float) -> str:
    gap = abs(packed - trained)
    words = f"The difference of {gap:.1e} is rounding."
    if gap > ROUNDING:
        words = f"**The difference of {gap:.1e} is more than rounding.**"
    elif gap == 0:
        words = "No difference, to the last digit."
    return (
        "Exported to two bits, read back and evaluated again, TriX has validation loss "
        f"{packed:.6f}; trained, {trained:.6f}. {words}"
    )


def _setting(config: RunConfig, shape: Mapping[str, Any], seconds: float) -> str:
    corpus = Path(shape["corpus"])
    source = corpus.name if corpus.is_absolute() else shape["corpus"]
    return (
        f"{shape['n_layers']} layers of width {shape['d_model']}; {describe_ffn(config)}; "
        f"{shape['steps']:,} steps of {shape['batch_size']} x {shape['context']} "
        f"tokens ({shape['tokens']:,}; {config.data.tokenizer} tokenizer), learning "
        f"rate {config.train.learning_rate:g}, seed {config.seed}. Corpus: "
        f"{source}; evaluated on all {shape['val_tokens']:,} validation "
        f"tokens. In all {seconds:,.0f} seconds."
    )


def _check_result(result: Any) -> None:
    check(result, "result", "result")
    for name in ("arms", "packed", "bytes", "config"):
        check(result[name], name, f"result['{name}']")
    for arm in ARMS:
        check(result["arms"][arm], "arm", f"result['arms']['{arm}']")
    if not {2, "2"} & set(result["ngram"]):
        raise ValueError(f"result['ngram'] must hold order 2. Got {result['ngram']}.")
