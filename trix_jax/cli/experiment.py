"""`trix-jax experiment FILE.yaml`: sizes x arms x seeds."""

import dataclasses
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from trix_jax.cli.common import print_json, say
from trix_jax.cli.train import Args as TrainArgs
from trix_jax.lm.config import RunConfig
from trix_jax.lm.experiment.check import check_ended
from trix_jax.lm.experiment.job_files import render
from trix_jax.lm.experiment.live import Table
from trix_jax.lm.experiment.results import collect
from trix_jax.lm.experiment.runner import grid, run_all
from trix_jax.lm.experiment.slots import make_slots
from trix_jax.lm.experiment.spec import (
    RESULTS,
    Experiment,
    Spec,
    check_name,
    prepare_data,
    read_experiment,
    read_notes,
    write_notes,
)
from trix_jax.lm.presets import parse, parse_preset


@dataclasses.dataclass(frozen=True)
class Args:
    """Run an experiment: every size with every arm and seed, a process each, side by
    side; what is done is not run again. The file comes first.
    """

    workdir: str = ""
    """Where everything goes; runs/NAME if left out."""
    slots: int | None = None
    """Runs at a time; one a GPU, or one a core, if left out."""
    retries: int = 2
    """Times that a run which died starts again from its checkpoint."""
    only: str = ""
    """Of the runs only those whose SIZE/ARM/seed-N starts so."""
    dry_run: bool = False
    """Say what would be run, and what it needs on H100s where the aot group is
    installed.
    """
    render: Literal["", "slurm", "kubernetes", "skypilot"] = ""
    """Write a job file for an engine to standard output, instead."""
    prepare_only: bool = False
    """Prepare the data, and stop."""
    usd_per_hour: float = 3.0
    """Of a GPU, for --dry-run."""
    json: bool = False
    """End standard output with the rows as one line of JSON."""


def main(argv: list[str]) -> int:
    """Runs it and writes its report; 1 if a run failed or diverged."""
    if not argv or argv[0].startswith("-"):
        parse(Args, argv or ["--help"], "experiment FILE.yaml")
        raise ValueError("experiment needs a file: trix-jax experiment FILE.yaml.")
    args = parse(Args, argv[1:], "experiment FILE.yaml")
    if args.retries < 0 or (args.slots is not None and args.slots < 1):
        raise ValueError(
            f"retries must not be negative and slots at least 1. Got {args.retries} and {args.slots}."
        )
    experiment = read_experiment(argv[0], parse_run)
    workdir = args.workdir or f"runs/{experiment.name}"
    specs = _chosen(experiment.specs, args.only)
    if args.render:
        names = [spec.name for spec in specs]
        slots = args.slots or len(names)
        text = render(args.render, experiment.name, names, argv[0], workdir, slots)
        print(text, end="")
        return 0
    if args.dry_run:
        return _say_budget(experiment, specs, argv[0], args)
    return _run(experiment, specs, Path(workdir), args)


def parse_run(flags: list[str]) -> RunConfig:
    """The settings that flags of `trix-jax train` mean."""
    return parse_preset(TrainArgs, flags, "train").config


def _chosen(specs: Sequence[Spec], only: str) -> list[Spec]:
    exact = [spec for spec in specs if spec.name == only]  # seed-1, and not seed-10
    chosen = exact or [spec for spec in specs if spec.name.startswith(only)]
    if not chosen:
        raise ValueError(
            f"only={only!r} must be the start of a run's name. Got none of "
            f"{', '.join(spec.name for spec in specs)}."
        )
    return chosen


def _say_budget(
    experiment: Experiment, specs: Sequence[Spec], path: str, args: Args
) -> int:
    """Markdown on standard output, or JSON; what goes on, on standard error."""
    from trix_jax.lm.experiment.budget import estimate

    runs = Counter((spec.size, spec.arm) for spec in specs)
    text, rows = estimate(
        {arm: experiment.configs[arm] for arm in runs},
        runs,
        args.usd_per_hour,
        f"trix-jax experiment {path} --dry-run",
        say(True),
    )
    head = f"# Budget: {experiment.title}\n\n{len(specs)} runs."
    say(args.json)(f"{head}\n\n{text}")
    if args.json:
        print_json({"name": experiment.name, "runs": len(specs), "budget": rows})
    return 0


def _run(
    experiment: Experiment, specs: Sequence[Spec], workdir: Path, args: Args
) -> int:
    report, names = say(args.json), {spec.name for spec in specs}
    workdir.mkdir(parents=True, exist_ok=True)
    check_name(experiment, workdir)
    prepare_data(experiment, {spec.size for spec in specs}, workdir, report)
    check_ended(experiment, workdir)
    write_notes(experiment, workdir)
    if args.prepare_only:
        return 0
    slots, folder = make_slots(args.slots), workdir / "runs"
    placed = read_notes(workdir).specs
    done = collect(placed, folder, workdir / RESULTS)
    report(
        f"{len(specs)} runs, {len(names & {one.name for one in done})} of them done; "
        f"{len(slots)} at a time: {', '.join(slot.name for slot in slots)}"
    )
    schedule = grid([spec for spec in placed if spec.name in names])
    path = workdir / RESULTS
    with Table(sys.stderr if args.json else sys.stdout) as table:
        rows = run_all(schedule, folder, path, slots, args.retries, table.show)
    if any(row["state"] == "done" for row in rows):
        from trix_jax.lm.experiment.report import write_experiment_report

        report(f"read {write_experiment_report(workdir, report)}")
    if args.json:
        print_json({"name": experiment.name, "workdir": str(workdir), "runs": rows})
    bad = [row for row in rows if row["state"] in ("failed", "diverged")]
    for row in bad:
        report(f"{row['name']} {row['state']}: {row['why'] or 'see its log.txt'}")
    return 1 if bad else 0
