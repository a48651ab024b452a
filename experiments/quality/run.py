"""Trains what a setting asks for and is not done yet; start it again beside itself, or
with more slots, for several runs at a time.

    python -m experiments.quality.run SETTING --data PATH --runs DIR

SETTING is a name in `design`, `claim` or `lookups`, PATH a text, folder or token store. Every run is a
process; its result is added to results/SETTING.json at once, and a run that is in there
is done, whatever DIR holds. SIGTERM saves the runs under way; the same command goes on
with them. What comes next is a function of the results alone (`schedule`).
"""

import argparse
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.quality import claim, design, lookups
from experiments.quality.design import Setting
from experiments.quality.schedule import runs_to_come
from trix_jax.cli.experiment import parse_run
from trix_jax.lm.data import is_store, prepare
from trix_jax.lm.experiment import results
from trix_jax.lm.experiment.directory import held
from trix_jax.lm.experiment.live import Table
from trix_jax.lm.experiment.runner import run_all
from trix_jax.lm.experiment.slots import make_slots
from trix_jax.lm.experiment.spec import Spec
from trix_jax.lm.signals import DONE, FAILED, INTERRUPTED, Interrupted

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"


def settings() -> dict[str, Setting]:
    """Every setting by its name."""
    return design.SETTINGS | claim.SETTINGS | lookups.SETTINGS


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when the time is up or nothing is left that no other process is at, 1
    when a run failed, 75 when interrupted.
    """
    args = _parsed(argv)
    setting = settings()[args.setting]
    path = args.results / f"{setting.name}.json"
    if args.list:
        alike, _ = results_of_one_sampler(results.read(path))
        come = runs_to_come(setting, alike)
        print(next((spec.name for spec in come), "nothing is left to do"))
        return DONE
    store = token_store(setting, args.data, args.runs, args.flags)

    def schedule(done: Sequence[results.Result]) -> list[Spec]:
        alike, flags = results_of_one_sampler(done)
        come = runs_to_come(setting, alike)
        return [placed(spec, store, f"{flags} {args.flags}") for spec in come]

    path.parent.mkdir(parents=True, exist_ok=True)
    slots = make_slots(args.slots)
    try:
        with Table(sys.stdout) as table:
            more = (args.retries, table.show, args.hours)
            rows = run_all(schedule, args.runs, path, slots, *more)
    except Interrupted as stop:
        print(stop, flush=True)
        return INTERRUPTED
    return FAILED if any(row["state"] == "failed" for row in rows) else DONE


def results_of_one_sampler(
    done: Sequence[results.Result],
) -> tuple[Sequence[results.Result], str]:
    """The results that a sweep goes on from, those of the sampler that most have, and the
    flags that make the next runs alike: losses of two samplers are not compared.
    """
    groups = results.by_sampler(done)
    if not groups:
        return done, ""
    sampler = max(groups, key=lambda name: len(groups[name]))
    return groups[sampler], f"--train.sampler {sampler}"


def placed(spec: Spec, store: Path, more: str) -> Spec:
    """A run with its data, and flags of which later ones win, so that `more` can shrink
    what an arm says.
    """
    preset, *flags = spec.flags
    flags = (str(ROOT / preset), *flags, *shlex.split(more))
    return spec._replace(flags=flags, store=str(store))


def token_store(setting: Setting, data: str, runs: Path, more: str) -> Path:
    """The corpus as tokens: prepared once for all runs, in the runs' folder."""
    if is_store(data):
        return Path(data)
    flags = [*shlex.split(f"{setting.flags} {more}"), "--data.path", data]
    config = parse_run([str(ROOT / setting.preset), *flags])
    directory = runs / setting.name / "data"
    with held(directory.with_name("data.lock")):
        prepare(config.data, directory, lambda _: None)
    return directory


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("setting", choices=sorted(settings()))
    parser.add_argument("--data", required=True, help="text, folder, or token store")
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder")
    parser.add_argument("--slots", type=int, default=1, help="runs at a time")
    parser.add_argument("--retries", type=int, default=2, help="of a run that died")
    parser.add_argument(
        "--hours", type=float, default=math.inf, help="start no run after this long"
    )
    parser.add_argument("--list", action="store_true", help="say what is next, only")
    parser.add_argument(
        "--flags", default="", help="for every run: a shrunken copy, to try this out"
    )
    args = parser.parse_args(argv)
    if args.flags and args.results.resolve() == RESULTS:
        parser.error("--flags makes other runs: give them --results of their own")
    return args


if __name__ == "__main__":
    sys.exit(main())
