"""`trix-jax experiment FILE.yaml`: sizes x arms x seeds."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from trix_jax.cli.common import print_json, say
from trix_jax.cli.train import Args as TrainArgs
from trix_jax.files import write_json
from trix_jax.lm.config import RunConfig, read_yaml
from trix_jax.lm.data import DataConfig, is_store, prepare
from trix_jax.lm.experiment.job_files import render
from trix_jax.lm.experiment.live import Table
from trix_jax.lm.experiment.runner import PLAN, Run, is_done, make_slots, run_all
from trix_jax.lm.presets import parse, parse_preset, to_flags
from trix_jax.lm.signals import Signals

KEYS = {
    "name",
    "title",
    "question",
    "label",
    "sizes",
    "arms",
    "seeds",
    "set",
    "arm_set",
}


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


class Planned(NamedTuple):
    """A run, and what its flags mean."""

    run: Run
    config: RunConfig


class Experiment(NamedTuple):
    """An experiment's file, read and checked."""

    name: str
    tree: dict[str, Any]
    runs: list[Planned]
    data: dict[str, DataConfig]


def main(argv: list[str]) -> int:
    """Runs it and writes its report; 1 if a run failed."""
    if not argv or argv[0].startswith("-"):
        parse(Args, argv or ["--help"], "experiment FILE.yaml")
        raise ValueError("experiment needs a file: trix-jax experiment FILE.yaml.")
    args = parse(Args, argv[1:], "experiment FILE.yaml")
    if args.retries < 0 or (args.slots is not None and args.slots < 1):
        raise ValueError(
            f"retries must not be negative and slots at least 1. Got {args.retries} and {args.slots}."
        )
    experiment = read_experiment(argv[0])
    workdir = Path(args.workdir or f"runs/{experiment.name}")
    runs = [p for p in experiment.runs if p.run.name.startswith(args.only)]
    if not runs:
        raise ValueError(
            f"only={args.only!r} must be the start of a run's name. Got none of "
            f"{', '.join(p.run.name for p in experiment.runs)}."
        )
    if args.render:
        names = [p.run.name for p in runs]
        count = args.slots or len(names)
        print(
            render(args.render, experiment.name, names, argv[0], str(workdir), count),
            end="",
        )
        return 0
    if args.dry_run:
        return _plan(experiment, runs, argv[0], args)
    return _run(experiment, runs, workdir, args)


def _plan(experiment: Experiment, runs: list[Planned], path: str, args: Args) -> int:
    """Markdown on standard output, or JSON; what goes on, on standard error."""
    from trix_jax.lm.experiment.budget import plan

    text, rows = plan(
        {(p.run.size, p.run.arm): p.config for p in runs},
        len({p.run.seed for p in runs}),
        args.usd_per_hour,
        f"trix-jax experiment {path} --dry-run",
        say(True),
    )
    title = experiment.tree.get("title") or experiment.name
    say(args.json)(f"# Plan: {title}\n\n{len(runs)} runs.\n\n{text}")
    if args.json:
        print_json({"name": experiment.name, "runs": len(runs), "plan": rows})
    return 0


def _run(experiment: Experiment, runs: list[Planned], workdir: Path, args: Args) -> int:
    report = say(args.json)
    workdir.mkdir(parents=True, exist_ok=True)
    _write_plan(experiment, workdir)
    _prepare(experiment, {p.run.size for p in runs}, workdir, report)
    if args.prepare_only:
        return 0
    slots = make_slots(args.slots)
    done = sum(is_done(p.run, workdir) for p in runs)
    report(
        f"{len(runs)} runs, {done} of them done; {len(slots)} at a time: "
        f"{', '.join(slot.name for slot in slots)}"
    )
    with Table(sys.stderr if args.json else sys.stdout) as table:
        rows = run_all([p.run for p in runs], workdir, slots, args.retries, table.show)
    if any(row["state"] == "done" for row in rows):
        from trix_jax.lm.experiment.report import write_experiment_report

        report(f"read {write_experiment_report(workdir, report)}")
    if args.json:
        print_json({"name": experiment.name, "workdir": str(workdir), "runs": rows})
    failed = [row for row in rows if row["state"] == "failed"]
    for row in failed:
        report(f"{row['size']}/{row['arm']}/seed-{row['seed']} failed: {row['why']}")
    return 1 if failed else 0


def read_experiment(path: str) -> Experiment:
    """Reads the file and checks every run's flags by `trix-jax train`'s own parser.

    Raises:
        ValueError: it is no experiment.
    """
    tree = read_yaml(path)
    if odd := sorted(set(tree) - KEYS):
        raise ValueError(
            f"{odd[0]} in {path} must be one of {', '.join(sorted(KEYS))}."
        )
    for key, kind in (("sizes", dict), ("arms", list), ("seeds", list)):
        if not isinstance(tree.get(key), kind) or not tree[key]:
            raise ValueError(f"{key} in {path} must be a {kind.__name__} with entries.")
    every, by_arm = tree.get("set") or {}, tree.get("arm_set") or {}
    if odd := sorted(set(by_arm) - set(tree["arms"])):
        raise ValueError(f"arm_set in {path} must name arms. Got {odd[0]!r}.")
    runs, data = [], {}
    for size, given in tree["sizes"].items():
        given = {"config": given} if isinstance(given, str) else dict(given)
        if "config" not in given:
            raise ValueError(f"sizes.{size} in {path} must have a config. Got none.")
        config_path = _find(given.pop("config"), Path(path))
        for arm in tree["arms"]:
            flags = to_flags({**every, **given, **(by_arm.get(arm) or {})})
            first = [config_path, "--arm", str(arm), *flags]
            parsed = parse_preset(TrainArgs, first, "train")
            own = data.setdefault(str(size), parsed.config.data)
            store = f"data/{size}"
            if own.path and is_store(own.path):
                store = str(Path(own.path).absolute())
            if parsed.config.data != own:
                raise ValueError(
                    f"the arms of {size} in {path} must share their data. Got other data for {arm}."
                )
            for seed in tree["seeds"]:
                config = dataclasses.replace(parsed.config, seed=int(seed))
                argv = (*first[:3], "--seed", str(seed), *first[3:])
                steps = config.train.steps
                run = Run(str(size), str(arm), int(seed), steps, argv, store)
                runs.append(Planned(run, config))
    return Experiment(str(tree.get("name") or Path(path).stem), tree, runs, data)


def _find(config: str, experiment: Path) -> str:
    """A config's path: from here, or from a folder above the experiment's file."""
    for folder in (Path(), *experiment.absolute().parents):
        if (folder / config).is_file():
            return str(folder / config)
    raise ValueError(f"config {config} of {experiment} is not there.")


def _write_plan(experiment: Experiment, workdir: Path) -> None:
    """Notes the plan; a directory holds one experiment."""
    plan = {
        "name": experiment.name,
        **{k: experiment.tree.get(k) for k in ("title", "question", "label")},
        "runs": [
            p.run._asdict() | {"flags": list(p.run.flags)} for p in experiment.runs
        ],
    }
    path = workdir / PLAN
    if path.exists():
        before = json.loads(path.read_bytes())["name"]
        if before != experiment.name:
            raise ValueError(
                f"{workdir} holds the experiment {before!r}. Got {experiment.name!r}: use another workdir."
            )
    write_json(path, plan)


def _prepare(
    experiment: Experiment, sizes: set[str], workdir: Path, report: Callable
) -> None:
    for size in sorted(sizes):
        data = experiment.data[size]
        if data.path and is_store(data.path):
            continue
        state = f"while preparing {workdir / 'data' / size}; nothing was written there"
        with Signals() as signals, signals.at_once(state):
            prepare(data, workdir / "data" / size, report)
