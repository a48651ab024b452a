"""`trix-jax report DIR`: the report of a run or an experiment, from what is there."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro

from trix_jax.cli.common import print_json, say
from trix_jax.lm import ngram
from trix_jax.lm.checkpoint import checkpoint
from trix_jax.lm.data import eval_targets
from trix_jax.lm.experiment.report import write_experiment_report
from trix_jax.lm.experiment.spec import NOTES
from trix_jax.lm.presets import parse
from trix_jax.lm.report.run import Floors, write_run_report
from trix_jax.lm.serve.load import open_run_data, read_config

ORDERS = (1, 2, 3)


@dataclasses.dataclass(frozen=True)
class Args:
    """Write REPORT.md and plots/ of a run, or of an experiment (with metrics.json),
    again from its results.
    """

    directory: Annotated[str, tyro.conf.Positional]
    """A run directory, or an experiment's."""
    twin: str | None = None
    """Another run on the same data, to set beside a run: its dense twin."""
    json: bool = False
    """End standard output with the report's path as one line of JSON."""


def main(argv: list[str]) -> None:
    """Writes the report."""
    args = parse(Args, argv, "report")
    directory, report = Path(args.directory), say(args.json)
    if (directory / NOTES).is_file():
        if args.twin:
            raise ValueError("twin is of a run; an experiment has its own comparisons.")
        path = write_experiment_report(directory, report)
    elif (directory / "metrics.jsonl").is_file():
        path = run_report(directory, report, args.twin)
    else:
        raise ValueError(
            f"directory must hold a run (metrics.jsonl) or an experiment ({NOTES}). Got {directory}."
        )
    report(f"read {path}")
    if args.json:
        print_json({"report": str(path)})


def run_report(
    directory: str | Path, report: Callable[[str], None], twin: str | Path | None = None
) -> Path:
    """The report of a run, beside what counting n-grams in (the first of) its data
    achieves on (the first of) the tokens that it is evaluated on.
    """
    if twin:
        _check_twin(Path(directory), Path(twin))
    try:
        store = open_run_data(directory)
    except (OSError, ValueError) as error:
        report(f"no n-gram floor: {error}")
        return write_run_report(directory, twin=twin)
    config, counted = read_config(Path(directory)), min(len(store.train), ngram.COUNTED)
    context, most = config.model.context, config.train.eval_tokens
    evaluated = eval_targets(store.val, context, most)
    scored = min(evaluated, ngram.COUNTED)
    losses = ngram.floors(store, ORDERS, counted, scored)
    found = Floors(losses, counted, scored if scored < evaluated else None)
    return write_run_report(directory, found, twin)


def _check_twin(directory: Path, twin: Path) -> None:
    """Raises a ValueError unless two runs were trained on the same data: nats of
    different tokens are not compared.
    """
    found = []
    for run in (directory, twin):
        checkpoints = run / "checkpoints"
        steps = checkpoint.steps(checkpoints) if checkpoints.is_dir() else []
        if not steps:
            raise ValueError(f"twin needs a checkpoint of both runs. {run} has none.")
        found.append(checkpoint.read_meta(checkpoints, steps[-1]))
    before, now = (meta["data_fingerprint"] for meta in found)
    if before != now:
        raise ValueError(
            f"twin must be a run on the data of {directory}: its fingerprint is "
            f"{before[:12]}. Got {twin}, trained on {now[:12]}."
        )
    before, now = (meta.get("val_tokens") or "all" for meta in found)
    if before != now:
        raise ValueError(
            f"twin must be evaluated on as many tokens as {directory}, {before}. "
            f"Got {twin}, on {now}."
        )
