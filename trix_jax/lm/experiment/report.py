"""REPORT.md of an experiment: loss against what it costs, an answer to each hypothesis
of the seed, then the runs.

Every word follows from the numbers. Besides the report, `metrics.json` holds the runs
as the committed results do, and `floors.json` what counting n-grams achieves.
"""

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trix_jax.files import write_json, write_whole
from trix_jax.lm.data import is_store, open_store
from trix_jax.lm.experiment import plots
from trix_jax.lm.experiment.results import (
    Comparison,
    Finished,
    as_result,
    compare,
    groups,
    interval,
    read_experiment,
    twin,
)
from trix_jax.lm.experiment.runner import Run
from trix_jax.lm.ngram import ngram_losses
from trix_jax.lm.report import plots as run_plots

ORDERS = (1, 2, 3, 4)
FLOOR_TOKENS = 20_000_000  # of training that are counted
CONTROLS = ("hash", "random")

Found = dict[tuple[str, str], list[Finished]]


def write_experiment_report(
    directory: str | Path, report: Callable[[str], None] = print
) -> Path:
    """Writes `plots/`, `metrics.json` and `REPORT.md`; returns the report.

    Raises:
        ValueError: no experiment, no finished run, or a damaged file.
    """
    directory = Path(directory)
    plan, runs, finished = read_experiment(directory)
    if not finished:
        raise ValueError(
            f"{directory} must hold a finished run. Got none of {len(runs)}."
        )
    found = groups(finished)
    floors = _floors(directory, finished, report)
    results = [as_result(one, plan["name"]) for one in finished]
    write_json(directory / "metrics.json", results)
    figures = directory / "plots"
    sizes = list(dict.fromkeys(size for size, _ in found))
    plots.costs(figures / "costs.png", found, floors if len(sizes) == 1 else {})
    parts = [
        f"# {plan.get('title') or plan['name']}",
        *filter(None, [plan.get("question"), _label(plan, runs, finished)]),
        _headline(found, sizes, floors),
        "![Validation loss against parameters, compute, bits and seconds](plots/costs.png)",
        "## What the seed expected",
        *_hypotheses(found, sizes),
        "## The runs",
        *(part for size in sizes for part in _size(size, found, floors, figures)),
        "## Made with",
        _made_with(plan, finished),
    ]
    path = directory / "REPORT.md"
    write_whole(path, "\n\n".join(parts) + "\n")
    return path


def _label(plan: dict[str, Any], runs: list[Run], finished: list[Finished]) -> str:
    text = f"> {plan['label']}" if plan.get("label") else ""
    if len(finished) < len(runs):
        done = {one.run.name for one in finished}
        left = ", ".join(run.name for run in runs if run.name not in done)
        text += f"{' ' if text else '> '}**{len(finished)} of {len(runs)} runs are finished**; missing: {left}."
    return text


def _headline(
    found: Found, sizes: list[str], floors: dict[str, dict[int, float]]
) -> str:
    lines = []
    for size in sizes:
        arms = {arm: runs for (s, arm), runs in found.items() if s == size}
        means = {
            arm: statistics.mean(r.loss for r in runs) for arm, runs in arms.items()
        }
        ordered = sorted(means, key=lambda arm: means[arm])
        text = ", ".join(f"{arm} {_spread(arms[arm])}" for arm in ordered)
        best = means[ordered[0]]
        passed = [n for n, loss in floors.get(size, {}).items() if best < loss]
        kinds = ", ".join(run_plots.GRAM_NAMES.get(n, f"{n}-gram") for n in passed)
        where = f"below the floor of {kinds}" if passed else "above every n-gram floor"
        floor = f" The lowest is {where}." if floors.get(size) else ""
        lines.append(
            f"**{size}**, validation loss in nats per token, lowest first: {text}.{floor}"
        )
    return "\n\n".join(lines)


def _hypotheses(found: Found, sizes: list[str]) -> list[str]:
    """The seed's claim and its three reasons, each with what was measured."""
    trix = [key for key, runs in found.items() if not runs[0].is_dense]
    own = [key for key in trix if key[1] not in (*CONTROLS, "learned")]
    lower, capacity, regular, special = [], [], [], []
    for size, arm in own:
        if other := twin(size, arm, "total", found):
            lower.append(compare(size, arm, other, found, lambda f: f.loss))
            regular.append(compare(size, arm, other, found, lambda f: f.gap))
        if other := twin(size, arm, "ffn_active", found, within=0.1):
            capacity.append(compare(size, arm, other, found, lambda f: f.loss))
        if arm == "sparse":
            special += [
                compare(size, arm, control, found, lambda f: f.loss)
                for control in CONTROLS
            ]
    return [
        _answer(
            "Lower perplexity than a parameter-equivalent dense FFN",
            lower,
            "no dense twin with as many parameters has finished",
            "validation loss, TriX minus its parameter-equal twin",
        ),
        _answer(
            "Emergent routing specializes by input",
            special,
            "needs the arms sparse, hash and random, which route the same tiles",
            "validation loss, routing by weights minus a control on the same tiles",
        ),
        _answer(
            "Sparse computation puts capacity where it is needed",
            capacity,
            "no dense twin with as many multiply-accumulates has finished",
            "validation loss, TriX minus the dense FFN of its active compute",
        ),
        _answer(
            "Ternary structure regularizes",
            regular,
            "no dense twin with as many parameters has finished",
            "train-validation gap, TriX minus its parameter-equal twin",
        ),
    ]


def _answer(
    claim: str, comparisons: list[Comparison | None], absent: str, measure: str
) -> str:
    made = [c for c in comparisons if c]
    if not made:
        return f"**{claim}: undecided.** Not measured here: {absent}."
    verdicts = {c.verdict() for c in made}
    word = verdicts.pop() if len(verdicts) == 1 else "mixed"
    rows = [f"  - {_comparison(c)}" for c in made]
    return (
        f"**{claim}: {word}.** Measured: {measure} (95% interval over seeds).\n"
        + "\n".join(rows)
    )


def _comparison(c: Comparison) -> str:
    what = f"{c.size}, {c.arm} against {c.other}: {c.mean:+.4f}"
    if math.isinf(c.high):
        return f"{what}, one seed, no interval: undecided"
    return f"{what} ({c.low:+.4f} to {c.high:+.4f}, {c.seeds} seeds): {c.verdict()}"


def _size(
    size: str, found: Found, floors: dict[str, dict[int, float]], figures: Path
) -> list[str]:
    """Table and curves of a size; of routing, the first seed of every TriX arm."""
    arms = {arm: runs for (s, arm), runs in found.items() if s == size}
    plots.curves(figures / f"{size}_loss.png", arms, floors.get(size, {}))
    plots.steps(figures / f"{size}_steps.png", arms)
    parts = [
        f"### {size}",
        _table(arms),
        _floors_line(floors.get(size, {})),
        f"![Validation loss over tokens](plots/{size}_loss.png)",
        f"![Training loss, learning rate, gradient norm, speed, memory](plots/{size}_steps.png)",
    ]
    for arm, runs in arms.items():
        if runs[0].is_dense:
            continue
        record = runs[0].record
        usage = record.evals[-1]["tile_usage"]
        run_plots.tile_usage(figures / f"{size}_{arm}_usage.png", usage)
        name = f"{size}_{arm}_routing.png"
        run_plots.routing_health(
            figures / name, record.steps, record.evals, len(usage[0])
        )
        parts += [
            f"#### {arm}, seed {runs[0].run.seed}",
            f"![Load of each tile](plots/{size}_{arm}_usage.png)",
            f"![Entropy, stability, balance, diversity](plots/{name})",
        ]
    return parts


def _table(arms: dict[str, list[Finished]]) -> str:
    head = (
        "arm|seeds|rate|validation loss|perplexity|bits per byte|train-val gap|parameters|"
        "FFN MACs a token|FFN bits|least entropy share|dead tiles|seconds|tokens/s"
    ).split("|")
    rows = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for arm, runs in sorted(arms.items(), key=lambda item: _mean(item[1])):
        one, params = runs[0], runs[0].record.summary["params"]
        shares, dead = (
            [r.record.summary[name] or 0 for r in runs]
            for name in ("min_entropy_share", "max_dead_tiles")
        )
        cells = [
            arm,
            str(len(runs)),
            f"{one.record.config.train.learning_rate:g}",
            _spread(runs),
            f"{math.exp(_mean(runs)):.2f}",
            f"{statistics.mean(r.bits_per_byte for r in runs):.4f}",
            f"{statistics.mean(r.gap for r in runs):+.3f}",
            f"{params['total']:,}",
            f"{params['ffn_active']:,}",
            f"{params['ffn_bits']:,}",
            "" if one.is_dense else f"{min(shares):.3f}",
            "" if one.is_dense else str(max(dead)),
            f"{statistics.mean(r.cost('seconds') for r in runs):,.0f}",
            f"{statistics.mean(r.record.speed for r in runs):,.0f}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    rows.append(
        "\nLoss: of the last evaluation, mean over seeds with half the 95% interval. Entropy and "
        "dead tiles: worst over all evaluations and layers. The gap counts dropout, if any."
    )
    return "\n".join(rows)


def _floors_line(floors: dict[int, float]) -> str:
    if not floors:
        return "No n-gram floors: the token store is not here."
    found = ", ".join(
        f"{run_plots.GRAM_NAMES.get(n, f'{n}-gram')} {loss:.3f}"
        for n, loss in floors.items()
    )
    return (
        f"Counting n-grams (Witten-Bell) on all training tokens, up to {FLOOR_TOKENS / 1e6:.0f}M: "
        f"{found}. A run that saw fewer tokens than that is at a disadvantage."
    )


def _floors(
    directory: Path, finished: list[Finished], report: Callable[[str], None]
) -> dict[str, dict[int, float]]:
    """N-gram floors of every size's tokens; kept, since counting takes a while."""
    path = directory / "floors.json"
    kept = json.loads(path.read_bytes()) if path.exists() else {}
    floors: dict[str, dict[int, float]] = {}
    for one in finished:
        size, place = one.run.size, Path(one.run.store)
        place = place if place.is_absolute() else directory / place
        if size not in floors and size not in kept and is_store(place):
            report(f"counting n-grams of {size}")
            store = open_store(place, verify=False)
            train = store.train.window(0, min(len(store.train), FLOOR_TOKENS))
            val = store.val.window(0, len(store.val))
            losses = ngram_losses(train, val, ORDERS, store.tokenizer.vocab_size)
            kept[size] = {str(n): loss for n, loss in losses.items()}
        if size in kept:
            floors[size] = {int(n): loss for n, loss in kept[size].items()}
    write_json(path, kept)
    return floors


def _made_with(plan: dict[str, Any], finished: list[Finished]) -> str:
    env = finished[0].record.env
    devices = ", ".join(sorted({*env["devices"]}))
    versions = ", ".join(f"{name} {v}" for name, v in sorted(env["packages"].items()))
    commands = "\n".join(dict.fromkeys(one.command for one in finished))
    return (
        f"Python {env['python']} on {env['system']}, {env['cpu_count']} CPUs, {devices}; {versions}. "
        f"`trix-jax report` made this page; [metrics.json](metrics.json) holds every number.\n\n"
        f"```sh\n{commands}\n```"
    )


def _mean(runs: list[Finished]) -> float:
    return statistics.mean(run.loss for run in runs)


def _spread(runs: list[Finished]) -> str:
    mean, half = interval([run.loss for run in runs])
    return f"{mean:.4f}" + ("" if math.isinf(half) else f" ± {half:.4f}")
