"""Trains what an experiment of this folder asks for and is not done yet, a run a core or
a GPU at a time.

    python -m experiments.scale.run NAME --data PATH --runs DIR

NAME is a file here, without `.yaml`. PATH is a token store, or what its head says. Every
run is a process; its result is added to results/NAME.json at once, and a run that is in
there is done, whatever DIR holds: what comes next is a function of the file and the
results. SIGTERM saves the runs under way; the same command goes on with them.
"""

import argparse
import dataclasses
import functools
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from trix_jax.cli.experiment import parse_run
from trix_jax.lm.data import DataConfig, is_store, prepare
from trix_jax.lm.experiment import results
from trix_jax.lm.experiment.directory import held
from trix_jax.lm.experiment.live import Table
from trix_jax.lm.experiment.runner import grid, run_all
from trix_jax.lm.experiment.slots import make_slots
from trix_jax.lm.experiment.spec import Experiment, Spec, read_experiment
from trix_jax.lm.signals import DONE, FAILED, INTERRUPTED, Interrupted

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results"
NAMES = ("e1", "e1-one-epoch", "e2", "e3", "e4", "e4-small")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when the time is up or nothing is left that no other process is at, 1
    when a run failed or diverged, 75 when interrupted.
    """
    args = _parsed(argv)
    experiment = read(args.name)
    path, folder = args.results / f"{args.name}.json", args.runs / args.name
    if args.list:
        done = {one.name for one in results.read(path)}
        left = [spec.name for spec in experiment.specs if spec.name not in done]
        print("\n".join(left) or "nothing is left to do")
        return DONE
    store = token_store(experiment, args.data, folder, args.flags)
    specs = [placed(spec, store, args.flags) for spec in experiment.specs]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with Table(sys.stdout) as table:
            slots, more = make_slots(args.slots), (args.retries, table.show, args.hours)
            rows = run_all(grid(specs), folder, path, slots, *more)
    except Interrupted as stop:
        print(stop, flush=True)
        return INTERRUPTED
    bad = any(row["state"] in ("failed", "diverged") for row in rows)
    return FAILED if bad else DONE


@functools.cache
def read(name: str) -> Experiment:
    """An experiment of this folder."""
    return read_experiment(HERE / f"{name}.yaml", parse_run)


def placed(spec: Spec, store: Path, more: str) -> Spec:
    """A run on a store, which decides about its data, and flags of which later ones
    win, so that `more` can shrink what the file says.
    """
    _, flags = parted([*spec.flags, *shlex.split(more)])
    return spec._replace(flags=tuple(flags), store=str(store))


def parted(flags: Sequence[str]) -> tuple[list[str], list[str]]:
    """The flags of the data, each with its value, and the others."""
    data, others, is_value = [], [], False
    for flag in flags:
        is_data = flag.startswith("--data.")
        (data if is_data or is_value else others).append(flag)
        is_value = is_data and "=" not in flag
    return data, others


def token_store(experiment: Experiment, data: str, folder: Path, more: str) -> Path:
    """The corpus as tokens: prepared once for all runs, in their folder."""
    if is_store(data):
        return Path(data)
    (config,) = experiment.data.values()
    config = with_flags(at(config, Path(data)), more)
    directory = folder / "data"
    with held(folder / "data.lock"):
        prepare(config, directory)
    return directory


def at(config: DataConfig, folder: Path) -> DataConfig:
    """The data in another folder; where validation has a place of its own, both have in
    that folder the names that the file gives them.
    """
    if config.path is None or config.val_path is None:
        return dataclasses.replace(config, path=str(folder))
    own, val = (str(folder / Path(p).name) for p in (config.path, config.val_path))
    return dataclasses.replace(config, path=own, val_path=val)


def with_flags(config: DataConfig, more: str) -> DataConfig:
    """The data with what flags of `trix-jax train` say otherwise."""
    flags, _ = parted(shlex.split(more))
    found = parse_run(flags).data
    heads = [f.removeprefix("--data.") for f in flags if f.startswith("--data.")]
    names = [head.partition("=")[0].replace("-", "_") for head in heads]
    return dataclasses.replace(config, **{n: getattr(found, n) for n in names})


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--data", required=True, help="folder, or token store")
    parser.add_argument("--runs", type=Path, default=Path("runs/scale"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder")
    parser.add_argument(
        "--slots", type=int, help="runs at a time; one a core is the default"
    )
    parser.add_argument("--retries", type=int, default=2, help="of a run that died")
    parser.add_argument(
        "--hours", type=float, default=math.inf, help="start no run after this long"
    )
    parser.add_argument("--list", action="store_true", help="say what is left, only")
    parser.add_argument(
        "--flags", default="", help="for every run: a shrunken copy, to try this out"
    )
    args = parser.parse_args(argv)
    if args.flags and args.results.resolve() == RESULTS:
        parser.error("--flags makes other runs: give them --results of their own")
    return args


if __name__ == "__main__":
    sys.exit(main())
