"""`trix-jax report DIR`: the report of a run or an experiment, from what is there."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from trix_jax.cli.common import print_json, say
from trix_jax.lm.experiment.report import write_experiment_report
from trix_jax.lm.experiment.spec import NOTES
from trix_jax.lm.presets import parse
from trix_jax.lm.report.run import write_run_report


@dataclasses.dataclass(frozen=True)
class Args:
    """Write REPORT.md and plots/ of a run, or of an experiment (with metrics.json),
    again from its results.
    """

    directory: Annotated[str, tyro.conf.Positional]
    """A run directory, or an experiment's."""
    json: bool = False
    """End standard output with the report's path as one line of JSON."""


def main(argv: list[str]) -> None:
    """Writes the report."""
    args = parse(Args, argv, "report")
    directory, report = Path(args.directory), say(args.json)
    if (directory / NOTES).is_file():
        path = write_experiment_report(directory, report)
    elif (directory / "metrics.jsonl").is_file():
        path = write_run_report(directory)
    else:
        raise ValueError(
            f"directory must hold a run (metrics.jsonl) or an experiment ({NOTES}). Got {directory}."
        )
    report(f"read {path}")
    if args.json:
        print_json({"report": str(path)})
