"""REPORT.md: of one training run, and of the demo, which sets TriX beside a dense twin.

The words follow from the numbers, whoever wins. Reports hold relative links and no path
of the machine; the same inputs give the same text.
"""

import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trix_jax.lm import metrics, plots
from trix_jax.lm.config import RunConfig, load
from trix_jax.lm.plots import HEALTHY_SHARE, MIB

TIE = 0.005  # nats: a convention; within it no winner is named
ROUNDING = 1e-4  # nats: float32 sums in another order stay below this
ARMS = ("trix", "dense")

# What is needed of each line or file of a run, and of each part of the demo's result.
KEYS = {
    "step": "tokens loss tokens_per_second memory_bytes routing_entropy aux_balance "
    "aux_diversity",
    "eval": "tokens val_loss tile_usage routing_stability",
    "summary": "best_val_loss final_val_loss final_val_ppl final_val_bits_per_byte "
    "seconds tokens params routing",
    "params": "total ffn ffn_active ffn_bits",
    "env": "python system cpu_count devices packages git_commit",
    "result": "seconds arms ngram routing bytes packed prompt sample config",
    "arms": "trix dense",
    "arm": "val_loss val_ppl val_bits_per_byte params_total ffn_active",
    "packed": "val_loss",
    "bytes": "ffn_float32 ffn_packed",
    "config": "steps tokens d_model n_layers num_tiles tiles_per_token context "
    "batch_size corpus val_tokens",
}


class RunRecord(NamedTuple):
    """What a run directory says of its run."""

    config: RunConfig
    steps: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    summary: dict[str, Any]
    env: dict[str, Any]

    @property
    def speed(self) -> float:
        """Median training tokens a second; the first steps also compile."""
        return statistics.median(line["tokens_per_second"] for line in self.steps)


def read_run(workdir: str | Path) -> RunRecord:
    """Reads `config.yaml`, `metrics.jsonl`, `summary.json` and `env.json` of a run.

    Raises:
        ValueError: one is missing, damaged or without what a report needs; names it.
    """
    workdir = Path(workdir)
    path = workdir / "metrics.jsonl"
    try:
        lines = list(metrics.read(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
    of_kind: dict[str, list[dict[str, Any]]] = {"step": [], "eval": []}
    for number, line in enumerate(lines, 1):
        event = line.get("event") if isinstance(line, dict) else None
        if event in of_kind:
            of_kind[event].append(_check(line, event, f"{path} line {number}"))
    for event, found in of_kind.items():
        if not found:
            raise ValueError(f"{path} must hold a line of event {event!r}. Got none.")
    config = load(workdir / "config.yaml")
    summary, env = _read_json(workdir, "summary"), _read_json(workdir, "env")
    _check(summary["params"], "params", f"params in {workdir / 'summary.json'}")
    return RunRecord(config, of_kind["step"], of_kind["eval"], summary, env)


def write_run_report(workdir: str | Path) -> Path:
    """Writes `plots/*.png` and `REPORT.md` of one training run; returns the report.

    Raises:
        ValueError: a file of the run is missing or damaged; names it.
    """
    workdir, figures = Path(workdir), Path(workdir) / "plots"
    run = read_run(workdir)
    config, model = run.config, run.config.model
    summary, params = run.summary, run.summary["params"]
    plots.losses(figures / "loss.png", run.steps, run.evals)
    plots.resources(figures / "resources.png", run.steps)
    rows = [
        ("validation loss, last (nats per token)", f"{summary['final_val_loss']:.4f}"),
        ("validation loss, best", f"{summary['best_val_loss']:.4f}"),
        ("perplexity, last", f"{summary['final_val_ppl']:.3f}"),
        ("bits per byte, last", f"{summary['final_val_bits_per_byte']:.4f}"),
        ("parameters, of these in FFNs", f"{params['total']:,}, {params['ffn']:,}"),
        ("FFN multiply-accumulates per token", f"{params['ffn_active']:,}"),
        ("FFN weights as served", f"{params['ffn_bits'] / 8 / MIB:.2f} MiB"),
        ("training tokens", f"{summary['tokens']:,}"),
        ("training tokens per second, median", f"{run.speed:,.0f}"),
        ("seconds, evaluations included", f"{summary['seconds']:,.0f}"),
    ]
    parts = [
        f"# Training run: {config.arm}, seed {config.seed}",
        f"{model.n_layers} layers of width {model.d_model}, context {model.context}, "
        f"batch {config.train.batch_size}, learning rate "
        f"{config.train.learning_rate:g}; {_tiles(config)}.",
        "![Loss over training tokens](plots/loss.png)",
        _table(("", "value"), rows),
    ]
    if run.evals[-1]["tile_usage"]:
        parts += _routing(workdir, run, summary["routing"])
    parts += [
        "## Speed and memory",
        "![Tokens per second and peak memory](plots/resources.png)",
        "## Made with",
        _environment(run.env),
        "All settings: [config.yaml](config.yaml). Every step: "
        "[metrics.jsonl](metrics.jsonl). Result: [summary.json](summary.json).",
    ]
    return _write(workdir, parts)


def write_demo_report(workdir: str | Path, result: Mapping[str, Any]) -> Path:
    """Writes `plots/*.png` and `REPORT.md` of the demo; returns the report.

    Args:
        workdir: holds the runs of the arms, `trix/` and `dense/`.
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

    sizes, figures = result["bytes"], workdir / "plots"
    evals = {name: run.evals for name, run in runs.items()}
    active = {name: values["ffn_active"] for name, values in arms.items()}
    plots.val_losses(figures / "val_loss.png", evals, floors)
    plots.savings(figures / "savings.png", active, sizes)
    parts = [
        "# TriX beside a dense twin",
        "Two small language models learn the same text with about the same number of "
        "parameters. In TriX's feed-forward layers (FFNs) weights are -1, 0 or +1 and "
        "each token uses only the tiles that match it best; the twin's are dense.",
        f"{_verdict(arms)} {_below_bigram(arms, floors[2])}",
        "![Validation loss over training tokens](plots/val_loss.png)",
        "> One seed, one learning rate tuned for neither arm, minutes of training: a "
        "demonstration, not evidence. The comparison with tuned learning rates, "
        "several seeds and a curve of dense widths is `experiments/quality` in the "
        "repository.",
        "## What TriX saves",
        _savings(active, sizes, result["config"]),
        "![Multiply-accumulates and bytes](plots/savings.png)",
        "This counts arithmetic and bytes, not seconds: in this run TriX trained at "
        f"{runs['trix'].speed:,.0f} tokens per second, its twin at "
        f"{runs['dense'].speed:,.0f}.",
        "## The numbers",
        _compare(arms, runs),
        "Counting n-grams, trained and scored on the same splits:",
        _floors_table(arms, floors),
        *_routing(workdir, runs["trix"], result["routing"]),
        "## Packed equals trained",
        _packed(arms["trix"]["val_loss"], result["packed"]["val_loss"]),
        "## A sample of the packed model",
        f"After the prompt {_code(result['prompt'])}:",
        _fence(result["prompt"], result["sample"]),
        "## Made with",
        _setting(runs["trix"].config, result["config"], result["seconds"]),
        _environment(runs["trix"].env),
        "The same again:",
        f"```sh\ntrix-jax demo --steps {result['config']['steps']} "
        f"--seed {runs['trix'].config.seed}\n```",
    ]
    if all((workdir / name / "REPORT.md").is_file() for name in arms):
        parts.append(
            "The runs in full: [TriX](trix/REPORT.md), [dense](dense/REPORT.md)."
        )
    return _write(workdir, parts)


def _verdict(arms: Mapping[str, Mapping[str, Any]]) -> str:
    """Who wins and by how much, from the numbers alone."""
    trix, dense = (arms[arm]["val_loss"] for arm in ARMS)
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


def _below_bigram(arms: Mapping[str, Mapping[str, Any]], bigram: float) -> str:
    trix, dense = (arms[arm]["val_loss"] < bigram for arm in ARMS)
    if trix and dense:
        return f"Both are below the bigram floor of {bigram:.3f}."
    if trix or dense:
        pair = ("TriX", "the dense twin") if trix else ("The dense twin", "TriX")
        return (
            f"{pair[0]} is below the bigram floor of {bigram:.3f}, {pair[1]} **not**."
        )
    return f"**Neither is below the bigram floor** of {bigram:.3f}: trained too little."


def _savings(active: Mapping[str, int], sizes: Mapping[str, int], config) -> str:
    ratio = active["dense"] / active["trix"]
    fewer = f"{ratio:.1f} times fewer" if ratio >= 1 else f"{1 / ratio:.1f} times more"
    packed = sizes["ffn_float32"] / sizes["ffn_packed"]
    return (
        f"Each token uses {config['tiles_per_token']} of {config['num_tiles']} tiles: "
        f"{active['trix']:,} multiply-accumulates in the FFNs, routing scores "
        f"included, against {active['dense']:,} in the twin, **{fewer}**. Packed in "
        f"two bits, scales included, the FFN weights take {sizes['ffn_packed']:,} "
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
    pairs = [(text, *(arms[a][key] for a in ARMS), form) for text, key, form in names]
    pairs.append(("training tokens per second", *(runs[a].speed for a in ARMS), ",.0f"))
    rows = [
        (text, f"{trix:{form}}", f"{dense:{form}}", f"{trix / dense:.3f}")
        for text, trix, dense, form in pairs
    ]
    return _table(("", "TriX", "dense twin", "TriX / dense"), rows)


def _floors_table(arms, floors: Mapping[int, float]) -> str:
    rows = [
        (
            plots.GRAM_NAMES.get(order, f"{order}-gram"),
            f"{loss:.4f}",
            *("yes" if arms[a]["val_loss"] < loss else "no" for a in arms),
        )
        for order, loss in floors.items()
    ]
    return _table(("", "loss", "TriX is below", "dense twin is below"), rows)


def _routing(
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
    health = "Alive" if least >= HEALTHY_SHARE and not dead else "Not healthy"
    words = (
        f"**{health}**: {dead} of {tiles * len(layers)} tiles dead (below a tenth of "
        f"an even share), and the entropy of tile use is at least {least:.3f} of its "
        f"maximum ln {tiles} (collapsing below {HEALTHY_SHARE})."
    )
    head = ("layer", f"entropy / ln {tiles}", "largest load / even share", "dead tiles")
    return [
        "## Routing",
        words,
        "![Load of each tile in each layer](plots/tile_usage.png)",
        _table(head, rows),
        "![Entropy, stability and auxiliary losses](plots/routing.png)",
    ]


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
        f"{shape['n_layers']} layers of width {shape['d_model']}; {_tiles(config)}; "
        f"{shape['steps']:,} steps of {shape['batch_size']} x {shape['context']} "
        f"tokens ({shape['tokens']:,}; {config.data.tokenizer} tokenizer), learning "
        f"rate {config.train.learning_rate:g}, seed {config.seed}. Corpus: "
        f"{source}; evaluated on all {shape['val_tokens']:,} validation "
        f"tokens. In all {seconds:,.0f} seconds."
    )


def _tiles(config: RunConfig) -> str:
    model = config.model
    if model.ffn == "dense":
        return f"dense FFNs of width {model.dense_width}"
    used = f"{model.tiles_per_token} used by each token"
    return f"{model.ffn} FFNs of {model.num_tiles} tiles, {used}"


def _environment(env: Mapping[str, Any]) -> str:
    devices = [f"{env['devices'].count(d)} x {d}" for d in sorted({*env["devices"]})]
    packages = ", ".join(f"{name} {v}" for name, v in sorted(env["packages"].items()))
    commit = f"; commit {env['git_commit']}" if env["git_commit"] else ""
    return (
        f"Python {env['python']} on {env['system']}, {env['cpu_count']} CPUs, devices "
        f"{', '.join(devices)}; {packages}{commit}."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = (head, ["---", *["---:"] * (len(head) - 1)], *rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(text: str) -> str:
    """Inline code of any text, its line breaks escaped."""
    text = text.replace("\n", "\\n")
    ticks = _ticks(text, 1)
    pad = " " if "`" in text or text[:1] == text[-1:] == " " or not text else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def _fence(prompt: str, sample: str) -> str:
    """A fenced block of the sample, prompt first, whatever characters it has."""
    whole = sample if sample.startswith(prompt) else prompt + sample
    text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in whole)
    ticks = _ticks(text, 3)
    return f"{ticks}text\n{text.rstrip()}\n{ticks}"


def _ticks(text: str, least: int) -> str:
    """More backticks than any run of them in the text."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def _check_result(result: Any) -> None:
    _check(result, "result", "result")
    for name in ("arms", "packed", "bytes", "config"):
        _check(result[name], name, f"result['{name}']")
    for arm in ARMS:
        _check(result["arms"][arm], "arm", f"result['arms']['{arm}']")
    if not {2, "2"} & set(result["ngram"]):
        raise ValueError(f"result['ngram'] must hold order 2. Got {result['ngram']}.")


def _check(tree: Any, kind: str, name: str) -> Any:
    for key in KEYS[kind].split():
        if not isinstance(tree, Mapping) or key not in tree:
            raise ValueError(f"{name} must hold {KEYS[kind]}. Got no {key}.")
    return tree


def _read_json(workdir: Path, kind: str) -> dict[str, Any]:
    path = workdir / f"{kind}.json"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
    return _check(tree, kind, str(path))


def _write(workdir: Path, parts: Sequence[str]) -> Path:
    path = workdir / "REPORT.md"
    metrics.write_atomically(path, "\n\n".join(parts) + "\n")
    return path
