"""Trains what a setting's plan asks for and is not done yet, one run at a time; start it
again beside itself for one more at a time.

    python -m experiments.quality.run SETTING --data PATH --runs DIR

SETTING is a name in `design.SETTINGS`, PATH a text, folder or token store. Every finished
run is added to results/SETTING.json at once; a run that is in there is done, whatever
DIR holds. SIGTERM saves the run under way; the same command goes on with it. The plan,
and so the order, is in design.py; what comes next is a function of the results alone.
"""

import argparse
import fcntl
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import jax

from experiments.quality import patches, results
from experiments.quality.arms import Arm
from experiments.quality.design import SEEDS, SETTINGS, Setting
from trix_jax.cli.main import INTERRUPTED
from trix_jax.cli.train import Args
from trix_jax.lm import config as run_config
from trix_jax.lm.data import is_store, prepare
from trix_jax.lm.presets import parse_preset
from trix_jax.lm.signals import Interrupted
from trix_jax.lm.train.loop import train
from trix_jax.lm.train.step_log import Diverged

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"


class Task(NamedTuple):
    """A run to come."""

    arm: Arm
    rate: float
    seed: int

    def __str__(self):
        return f"{self.arm.name}-lr{self.rate:g}-seed{self.seed}"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when the time is up or nothing is left that no other process is at, 75
    when interrupted.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("setting", choices=sorted(SETTINGS))
    parser.add_argument("--data", required=True, help="text, folder, or token store")
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder")
    parser.add_argument("--hours", type=float, help="start no run after this long")
    parser.add_argument("--list", action="store_true", help="say what is next, only")
    parser.add_argument(
        "--flags", default="", help="for every run: a shrunken copy, to try this out"
    )
    args = parser.parse_args(argv)
    setting = SETTINGS[args.setting]
    path = args.results / f"{setting.name}.json"
    if args.list:
        print(next_run(setting, results.read(path)) or "nothing is left to do")
        return 0
    end = time.monotonic() + 3600 * args.hours if args.hours else float("inf")
    before = None
    directory = args.runs / setting.name
    while time.monotonic() < end and (found := claim(setting, path, directory)):
        task, hold = found
        if before not in (None, task[:2]):
            jax.clear_caches()  # only seeds share what is compiled
        before = task[:2]
        with hold:
            try:
                result = run(setting, task, args.data, args.runs, args.flags)
            except Interrupted as stop:
                print(stop, flush=True)
                return INTERRUPTED
            with lock(directory / "results.lock"):
                results.add(path, result)
        said = "diverged" if result["val_loss"] is None else f"{result['val_loss']:.4f}"
        print(f"{task}: {said}, {result['seconds']} s", flush=True)
    return 0


def next_run(setting: Setting, done: Sequence[results.Result]) -> Task | None:
    """The first run that the plan wants and `done` lacks; None once all is done."""
    return next(runs_to_come(setting, done), None)


def runs_to_come(setting: Setting, done: Sequence[results.Result]) -> Iterator[Task]:
    """What can be trained now, in the plan's order. A run that waits for the loss of
    another, to know its rate, is not among them.
    """
    sweeping = set()
    for step in setting.plan:
        arms = setting.groups[step.group]
        for task in _sweep(arms, done, is_first_look=step.seeds == 0):
            sweeping.add(task.arm.name)
            yield task
        for seed in SEEDS[: step.seeds]:
            for arm in arms:
                source = arm.rate_of or arm.name
                rate = None if source in sweeping else best_rate(done, source)
                if rate and seed not in results.at_rate(done, arm.name, rate):
                    yield Task(arm, rate, seed)
    for name, rate, seeds in setting.also:
        for seed in SEEDS[:seeds]:
            if seed not in results.at_rate(done, name, rate):
                yield Task(setting.arm(name), rate, seed)


def _sweep(
    arms: Sequence[Arm], done: Sequence[results.Result], is_first_look: bool
) -> Iterator[Task]:
    """Breadth first: all arms at their first rate, then at their second."""
    tasks = []
    for arm in arms:
        losses = results.sweep(done, arm.name, SEEDS[0])
        if arm.rate_of is None and not (is_first_look and losses):
            if rate := next_rate(losses, arm.start):
                tasks.append((len(losses), Task(arm, rate, SEEDS[0])))
    yield from (task for _, task in sorted(tasks, key=lambda task: task[0]))


def next_rate(losses: dict[float, float], start: float) -> float | None:
    """The rate to try next, by factors of two: `start`, then the neighbours of the best
    so far; None once both have been run and are worse, so that the optimum is inside.
    """
    if not losses:
        return start
    best = min(losses, key=lambda rate: (losses[rate], rate))
    return next((r for r in (best / 2, best * 2) if r not in losses), None)


def best_rate(done: Iterable[results.Result], arm: str) -> float | None:
    """The best rate of an arm so far, None before it has one."""
    losses = results.sweep(done, arm, SEEDS[0])
    return min(losses, key=lambda r: (losses[r], r)) if losses else None


def claim(setting: Setting, path: Path, directory: Path) -> tuple[Task, IO[str]] | None:
    """The next run that no other process is at, and the hold on it; None if there is
    none.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for task in runs_to_come(setting, results.read(path)):
        try:
            hold = lock(directory / f"{task}.lock", wait=False)
        except BlockingIOError:
            continue
        # Who held it a moment ago may have finished the run.
        if task in runs_to_come(setting, results.read(path)):
            return task, hold
        hold.close()
    return None


def lock(path: Path, wait: bool = True) -> IO[str]:
    """An open file that keeps other processes out until it is closed, even by SIGKILL.

    Raises:
        BlockingIOError: another process has it, and `wait` is False.
    """
    file = path.open("w", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        raise
    return file


def run(setting: Setting, task: Task, data: str, runs: Path, more: str = "") -> dict:
    """Trains or resumes one run and returns its line of results.

    Raises:
        Interrupted: SIGTERM or SIGINT; the run is saved.
    """
    flags = f"{task.arm.flags} {setting.flags} --train.learning-rate {task.rate:g} --seed {task.seed}"
    store = token_store(setting, data, runs, more)
    # Later flags win, so `more` can shrink what an arm says.
    argv = [str(ROOT / setting.preset), *shlex.split(f"{flags} {more}")]
    args = parse_preset(Args, [*argv, "--data.path", str(store)], "train")
    workdir, summary = runs / setting.name / str(task), None
    workdir.mkdir(parents=True, exist_ok=True)
    command = " ".join(f"trix-jax train {setting.preset} {flags} {more}".split())
    if task.arm.patch:
        command += f"  # with experiments/quality/patches.py: {task.arm.patch}"
    log_file = (workdir / "log.txt").open("a", encoding="utf-8")
    with log_file as log, patches.applied(task.arm.patch):
        try:
            summary = train(
                args.config,
                workdir,
                devices=jax.devices()[:1],
                report=lambda line: print(line, file=log, flush=True),
            )
        except Diverged as stop:
            print(stop, file=log)
        # A patch may change what a model costs.
        config = run_config.load(workdir / "config.yaml")
        return results.result_of(setting.name, task.arm.name, config, summary, command)


def token_store(setting: Setting, data: str, runs: Path, more: str) -> Path:
    """The corpus as tokens: prepared once for all runs, in the runs' folder."""
    if is_store(data):
        return Path(data)
    argv = [str(ROOT / setting.preset), *shlex.split(more), "--data.path", data]
    args = parse_preset(Args, argv, "train")
    directory = runs / setting.name / "data"
    with lock(directory.with_name("data.lock")):
        prepare(args.config.data, directory, lambda _: None)
    return directory


if __name__ == "__main__":
    sys.exit(main())
