"""REPORT.md of an experiment: loss against what it costs, an answer to each hypothesis
of the original's plan, then the runs.

Every word follows from the numbers: `metrics.json` holds the results, `floors.json`
what counting n-grams achieves, `env.json` versions and devices. With these three the
page can be made again where the run directories are gone; then the figures of single
runs stay as they are.
"""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from trix_jax.files import read_json, write_json, write_whole
from trix_jax.lm.data import is_store, open_store
from trix_jax.lm.experiment import plots
from trix_jax.lm.experiment.hypotheses import HYPOTHESES, Found, answer, by_arm
from trix_jax.lm.experiment.results import Result, by_sampler, collect, read
from trix_jax.lm.experiment.spec import RESULTS, Experiment, Spec, read_notes
from trix_jax.lm.experiment.stats import spread
from trix_jax.lm.experiment.tables import mean_loss, runs_table
from trix_jax.lm.ngram import floors
from trix_jax.lm.report import plots as run_plots
from trix_jax.lm.report.record import read_run

ORDERS = (1, 2, 3, 4)
FLOOR_TOKENS = 20_000_000  # of training that are counted

Floors = dict[str, dict[int, float]]  # by size, order to loss


def write_experiment_report(
    directory: str | Path,
    report: Callable[[str], None] = print,
    experiment: Experiment | None = None,
) -> Path:
    """Writes `plots/`, `metrics.json` and `REPORT.md`; returns the report.

    Args:
        experiment: what was asked; None reads the directory's notes.

    Raises:
        ValueError: no experiment, no finished run, or a damaged file.
    """
    directory = Path(directory)
    experiment = experiment or read_notes(directory)
    specs = experiment.specs
    results = _results(directory, specs)
    finished = [result for result in results if result.is_finite]
    if not finished:
        raise ValueError(
            f"{directory} must hold a finished run. Got none of {len(specs)}."
        )
    known_floors = _floors(directory, finished, specs, report)
    groups = by_sampler(finished)
    parts = [
        f"# {experiment.title}",
        *filter(None, [experiment.question, _label(experiment, results)]),
    ]
    for sampler, runs in groups.items():
        if len(groups) > 1:
            parts.append(f"# Sampler `{sampler}`")
        ending = f"_{sampler}" if len(groups) > 1 else ""
        lost = {(one.size or "", one.arm) for one in results if not one.is_finite}
        parts += _compared(by_arm(runs), lost, known_floors, directory, ending)
    parts += [
        "## Made with",
        _made_with(directory, finished),
    ]
    path = directory / "REPORT.md"
    write_whole(path, "\n\n".join(parts) + "\n")
    return path


def _compared(
    found: Found,
    diverged: Collection[tuple[str, str]],
    known_floors: Floors,
    directory: Path,
    ending: str,
) -> list[str]:
    """What the runs of one sampler say.

    Args:
        diverged: arms of which a seed did, by size.
        ending: of the names of figures.
    """
    sizes = list(dict.fromkeys(size for size, _ in found))
    name = f"plots/costs{ending}.png"
    plots.costs(directory / name, found, known_floors if len(sizes) == 1 else {})
    size_parts = (_size(s, found, known_floors, directory, ending) for s in sizes)
    return [
        *(_headline(size, found, known_floors.get(size, {})) for size in sizes),
        f"![Validation loss against parameters, compute, bits and seconds]({name})",
        "## What the original's plan expected",
        *(answer(hypothesis, found, diverged) for hypothesis in HYPOTHESES),
        "## The runs",
        *(part for parts in size_parts for part in parts),
    ]


def _results(directory: Path, specs: Sequence[Spec]) -> list[Result]:
    """In the order asked; collected anew where the run directories are."""
    if (directory / "runs").is_dir():
        return collect(specs, directory / "runs", directory / RESULTS)
    known = read(directory / RESULTS)
    return [one for spec in specs for one in known if one.name == spec.name]


def _label(experiment: Experiment, results: Sequence[Result]) -> str:
    done = {result.name for result in results if result.is_finite}
    missing = [spec.name for spec in experiment.specs if spec.name not in done]
    diverged = [result.name for result in results if not result.is_finite]
    parts = [experiment.label]
    if missing:
        total = len(experiment.specs)
        text = f"**{len(done)} of {total} runs are finished**"
        names = [name for name in missing if name not in diverged]
        text += f"; missing: {', '.join(names)}" if names else ""
        text += f"; diverged: {', '.join(diverged)}" if diverged else ""
        parts.append(f"{text}.")
    text = " ".join(filter(None, parts))
    return f"> {text}" if text else ""


def _headline(size: str, found: Found, known: dict[int, float]) -> str:
    arms = [runs for (s, _), runs in found.items() if s == size]
    others = {
        "tokens": {runs[0].val_tokens for runs in arms},
        "seeds": {frozenset(run.seed for run in runs) for runs in arms},
    }
    if differ := [name for name, values in others.items() if len(values) > 1]:
        text = ", ".join(f"{r[0].arm} {spread([x.val_loss for x in r])}" for r in arms)
        return (
            f"**{size}**, validation loss in nats per token, of other "
            f"{' and '.join(differ)} for some arms and so in no order: {text}."
        )
    ordered = sorted(arms, key=mean_loss)
    text = ", ".join(f"{r[0].arm} {spread([x.val_loss for x in r])}" for r in ordered)
    passed = [n for n, loss in known.items() if mean_loss(ordered[0]) < loss]
    kinds = ", ".join(_gram(n) for n in passed)
    where = f"below the floor of {kinds}" if passed else "above every n-gram floor"
    floor = f" The lowest is {where}." if known else ""
    return (
        f"**{size}**, validation loss in nats per token, lowest first: {text}.{floor}"
    )


def _size(
    size: str, found: Found, known: Floors, directory: Path, ending: str
) -> list[str]:
    """Table and curves of a size; of routing, the first seed of every TriX arm."""
    arms = {arm: runs for (s, arm), runs in found.items() if s == size}
    figures, stem = directory / "plots", f"{size}{ending}"
    plots.curves(figures / f"{stem}_loss.png", arms, known.get(size, {}))
    _draw_runs(stem, arms, directory)
    every = [run for runs in arms.values() for run in runs]
    sampler = every[0].sampler
    parts = [
        f"### {size}",
        f"{runs_table(list(arms.values()))}\n"
        "Loss: of the last evaluation, mean over seeds with half the 95% interval. Entropy and "
        "dead tiles: worst over all evaluations and layers. The gap counts dropout, if any. Sampler: "
        f"`{sampler}`.",
        _floors_line(known.get(size, {}), {run.val_tokens for run in every}),
        f"![Validation loss over tokens](plots/{stem}_loss.png)",
        f"![Training loss, learning rate, gradient norm, speed, memory](plots/{stem}_steps.png)",
    ]
    for arm, runs in arms.items():
        if not runs[0].is_dense:
            name = f"plots/{stem}_{arm}"
            parts += [
                f"#### {arm}, seed {runs[0].seed}",
                f"![Load of each tile]({name}_usage.png)",
                f"![Entropy, stability, balance, diversity]({name}_routing.png)",
            ]
    return parts


def _draw_runs(stem: str, arms: dict[str, list[Result]], directory: Path) -> None:
    """The figures of the first seed of every arm, where its directory still is."""
    places = {arm: directory / "runs" / runs[0].name for arm, runs in arms.items()}
    records = {arm: read_run(place) for arm, place in places.items() if place.is_dir()}
    if not records:
        return
    figures = directory / "plots"
    colours = plots.colours_of({("", arm): runs for arm, runs in arms.items()})
    plots.steps(figures / f"{stem}_steps.png", records, colours)
    for arm, record in records.items():
        if arms[arm][0].is_dense:
            continue
        usage, name = record.evals[-1]["tile_usage"], f"{stem}_{arm}"
        run_plots.tile_usage(figures / f"{name}_usage.png", usage)
        path, tiles = figures / f"{name}_routing.png", len(usage[0])
        run_plots.routing_health(path, record.steps, record.evals, tiles)


def _floors_line(known: dict[int, float], evaluated: set[int | None]) -> str:
    if len(evaluated) > 1:
        return (
            "The runs are evaluated on different numbers of tokens: their losses are of "
            "different texts, no order of arms, and have no common n-gram floor."
        )
    if not known:
        return (
            "No n-gram floors: the token store is not here, or runs by another sampler are "
            "evaluated on another number of tokens."
        )
    found = ", ".join(f"{_gram(n)} {loss:.3f}" for n, loss in known.items())
    (scored,) = evaluated
    on = f", of the first {scored:,} validation tokens, as the runs" if scored else ""
    return (
        f"Counting n-grams (Witten-Bell) on all training tokens, up to {FLOOR_TOKENS / 1e6:.0f}M: "
        f"{found}{on}. A run that saw fewer tokens than that is at a disadvantage."
    )


def _floors(
    directory: Path,
    finished: Sequence[Result],
    specs: Sequence[Spec],
    report: Callable[[str], None],
) -> Floors:
    """N-gram floors of every size's tokens, on those that its runs are evaluated on;
    kept, since counting takes a while, and counted again where the store or the
    evaluations have other tokens. Runs evaluated on different ones have none.
    """
    path = directory / "floors.json"
    kept: dict[str, dict[str, Any]] = read_json(path) if path.exists() else {}
    places = {spec.size: spec.store for spec in specs}
    found: Floors = {}
    for size in dict.fromkeys(str(run.size) for run in finished):
        if len(evaluated := _evaluated(finished, size)) > 1:
            continue
        (scored,) = evaluated
        own: dict[str, Any] = kept.get(size, {})
        is_kept = own.get("scored") == scored
        if is_store(places[size]):
            store = open_store(places[size], verify=False)
            if not is_kept or own.get("store") != store.fingerprint:
                report(f"counting n-grams of {size}")
                losses = floors(store, ORDERS, FLOOR_TOKENS, scored)
                named = {str(n): loss for n, loss in losses.items()}
                own = {"store": store.fingerprint, "scored": scored, "losses": named}
                kept[size], is_kept = own, True
        if is_kept:
            found[size] = {int(n): loss for n, loss in own.get("losses", {}).items()}
    write_json(path, kept)
    return found


def _evaluated(finished: Sequence[Result], size: str) -> set[int | None]:
    """The numbers of validation tokens that runs of a size are evaluated on."""
    return {run.val_tokens for run in finished if run.size == size}


def _made_with(directory: Path, finished: Sequence[Result]) -> str:
    own = directory / "runs" / finished[0].name / "env.json"
    if own.is_file():
        write_json(directory / "env.json", read_json(own))
    env: dict[str, Any] = read_json(directory / "env.json")
    devices = ", ".join(sorted({*env["devices"]}))
    versions = ", ".join(f"{name} {v}" for name, v in sorted(env["packages"].items()))
    commands = "\n".join(dict.fromkeys(one.command for one in finished))
    return (
        f"Python {env['python']} on {env['system']}, {env['cpu_count']} CPUs, {devices}; {versions}. "
        f"`trix-jax report` made this page; [metrics.json](metrics.json) holds every number.\n\n"
        f"```sh\n{commands}\n```"
    )


def _gram(n: int) -> str:
    return run_plots.GRAM_NAMES.get(n, f"{n}-gram")
