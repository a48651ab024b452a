"""Memory and time of the experiments here on machines that they have not run on.

    python -m experiments.scale.modelled [--run DIR]

writes `results/modelled.json`, a row an experiment and arm. Memory is that of the step
compiled ahead of time for an H100, where the aot group is installed
(`$TRIX_AOT_PYTHON`); else what the file has stays. Time is modelled:

    GPU minutes = start + slack * least, or start + least + wait * calls
    core hours  = tokens * 3 * MACs a token / MACs a second of a core

`least` is the least time of a run's steps (`trix_jax.lm.experiment.budget.step_seconds`)
and evaluations, a third of it a token. `start` is compilation, `START_SECONDS`. `slack` is
the median over E1's runs of the measured step on a GPU over the least one. Before E1 has
run there the runs of `SHARED` say it, which shared an H100, `SHARING` at a time, and
minutes are a range between two explanations of the time that they took:

- they filled the card, of which each had its share: `slack` is that share of their time
  over the least one.
- each waited for something else than the card: `wait` is their time above the least one,
  a call. Calls are steps, as many as are accumulated in each, and evaluated batches, a
  third of a call.

MACs a second are those of the same arm in E1's epoch on a CPU, the median over its seeds,
so that core hours of that epoch are measured. An arm that has not run there takes those of
the arm that its name begins with; where none has run they are those of the run under way
in DIR, or what the file has. Core hours count no evaluations and no compilation.
"""

import argparse
import shlex
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.quality import run as quality
from experiments.scale.run import HERE, NAMES, RESULTS, ROOT, read
from trix_jax.cli.experiment import parse_run
from trix_jax.files import read_json, write_json
from trix_jax.lm import aot
from trix_jax.lm.config import RunConfig, load
from trix_jax.lm.experiment import budget, results
from trix_jax.lm.train import metrics

PATH = RESULTS / "modelled.json"
ON_GPU, ON_CORE = "e1", "e1-one-epoch"  # what E1 is measured on
SHARED, SHARING = (
    "english-256-muon",
    7,
)  # runs at a time on one H100 (experiments/README.md)
# Assumed: the fastest run of `SHARED` took 44 s in all.
START_SECONDS = 30.0
BYTES_A_TOKEN = 4  # about, of text; only where validation is a folder of its own
COMPILED = ("lookup", "dense", "lookup-best", "sparse")

Configs = dict[tuple[str, str], RunConfig]  # by experiment and arm


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="of E1's epoch, under way on a core")
    run = parser.parse_args(argv).run
    known = read_json(PATH) if PATH.exists() else {}
    timed = core_macs_under_way(run) if run else {}
    found = model(configs(), runs_of(), RESULTS, known | timed, peak)
    write_json(PATH, found)
    print(PATH)


def configs(names: Sequence[str] = NAMES) -> Configs:
    """The resolved config of every arm of experiments."""
    return {
        (name, arm): budget.filled(config)
        for name in names
        for (_, arm), config in read(name).configs.items()
    }


def runs_of(names: Sequence[str] = NAMES) -> dict[tuple[str, str], int]:
    """How many runs an experiment asks of an arm."""
    every = ((name, spec.arm) for name in names for spec in read(name).specs)
    return dict(Counter(every))


def model(
    every: Configs,
    runs: Mapping[tuple[str, str], int],
    folder: Path,
    known: Mapping[str, Any],
    peak: Callable[[str, str, RunConfig], int | None],
    shared: Path = quality.RESULTS / f"{SHARED}.json",
) -> dict[str, Any]:
    """What the file holds.

    Args:
        runs: how many an arm has.
        folder: of the results.
        known: what it held before: memory stays where nothing is compiled, the speed of
            a core where no result says it.
        peak: bytes of an arm's step, or None.
        shared: results of the runs that shared a GPU.
    """
    rows = known.get("rows", [])
    before = {(row["experiment"], row["arm"]): row["peak_bytes"] for row in rows}
    slack, wait = slack_of(every, folder), None
    slack_from = ON_GPU if slack else SHARED
    if slack is None:
        slack, wait = of_shared(results.read(shared))
    speeds, core_from = core_macs_of(every, folder), ON_CORE
    macs = statistics.median(speeds.values()) if speeds else None
    if macs is None:
        macs, core_from = known.get("core_macs_per_second"), known.get("core_from")
        speeds = known.get("core_macs_per_second_of", {})
    return {
        "command": "python -m experiments.scale.modelled",
        "target": "h100",
        "start_seconds": START_SECONDS,
        "slack": slack,
        "wait_seconds": wait,
        "slack_from": slack_from,
        "core_macs_per_second": macs,
        "core_macs_per_second_of": speeds,
        "core_from": core_from,
        "rows": [
            {"experiment": name, "arm": arm, "runs": runs[name, arm]}
            | sizes(config)
            | {"h100_minutes": h100_minutes(config, slack, wait)}
            | core_hours(name, arm, config, speeds, macs)
            | {"peak_bytes": peak(name, arm, config) or before.get((name, arm))}
            for (name, arm), config in every.items()
        ],
    }


def sizes(config: RunConfig) -> dict[str, int]:
    """Of a run."""
    own = budget.counted(config)
    return {key: own[key] for key in ("params", "steps", "tokens")}


def h100_minutes(
    config: RunConfig, slack: float, wait: float | None
) -> list[float] | None:
    """Of one run, the ends of a range; none for what is meant for a CPU."""
    if not is_for_gpus(config):
        return None
    least = least_seconds(config)
    full = slack * least
    waiting = full if wait is None else least + wait * calls(config)
    return [round((START_SECONDS + s) / 60, 2) for s in sorted((full, waiting))]


def core_hours(
    name: str,
    arm: str,
    config: RunConfig,
    speeds: Mapping[str, float],
    macs: float | None,
) -> dict[str, Any]:
    """Of one run, and the arm whose speed they rest on; `measured` in its own epoch.

    Args:
        macs: a second, where no arm says it.
    """
    arms = [one for one in (arm, arm.partition("-")[0]) if one in speeds]
    speed = speeds[arms[0]] if arms else macs
    is_measured = name == ON_CORE and arm in speeds
    total = 3 * budget.counted(config)["tokens"] * budget.macs_per_token(config.model)
    return {
        "core_hours": None if speed is None else round(total / speed / 3600, 2),
        "core_hours_from": "measured" if is_measured else arms[0] if arms else None,
    }


def least_seconds(config: RunConfig) -> float:
    """The least that the steps and evaluations of a run can take on an H100."""
    train = config.train
    step = budget.step_seconds(config, "h100")
    tokens = train.batch_size * config.model.context
    evaluated = evaluations(config) * val_tokens(config)
    return step * (train.steps + evaluated / (3 * tokens))


def calls(config: RunConfig) -> float:
    """Of a run, in those of a training step without accumulation."""
    train = config.train
    batches = val_tokens(config) / (train.eval_batch_size * config.model.context)
    return train.steps * train.accumulate + evaluations(config) * batches / 3


def evaluations(config: RunConfig) -> int:
    """At the end, every so many steps, and where asked after every epoch."""
    train = config.train
    found = -(-train.steps // train.eval_every)
    if train.eval_epochs and config.data.max_tokens:
        tokens = train.steps * train.batch_size * config.model.context
        found += tokens // config.data.max_tokens
    return found


def val_tokens(config: RunConfig) -> float:
    """About; without a limit training sees each token once."""
    data = config.data
    if data.val_path:
        packages = read_json(HERE / "code_packages.json")
        val = (one["bytes"] for one in packages if one["side"] == "val")
        return sum(val) / BYTES_A_TOKEN
    distinct = data.max_tokens or budget.counted(config)["tokens"]
    return distinct * data.val_fraction / (1 - data.val_fraction)


def is_for_gpus(config: RunConfig) -> bool:
    """Those for a CPU are in float32."""
    return config.model.dtype == "bfloat16"


def slack_of(every: Configs, folder: Path) -> float | None:
    """How many times the least step E1 took on a GPU, the median over its runs."""
    ratios = []
    for arm, speed in speeds_of(folder, ON_GPU):
        config = every[ON_GPU, arm]
        seconds = config.train.batch_size * config.model.context / speed
        ratios.append(seconds / budget.step_seconds(config, "h100"))
    return statistics.median(ratios) if ratios else None


def of_shared(runs: Sequence[results.Result]) -> tuple[float, float]:
    """Slack and wait of runs that shared an H100, medians over them."""
    slacks, waits = [], []
    for one in runs:
        if one.seconds:
            config = config_of(one)
            least, seconds = least_seconds(config), one.seconds - START_SECONDS
            slacks.append(seconds / SHARING / least)
            waits.append((seconds - least) / calls(config))
    return statistics.median(slacks), statistics.median(waits)


def config_of(one: results.Result) -> RunConfig:
    """The resolved config of a run, by its command `trix-jax train PRESET ...`."""
    preset, *flags = shlex.split(one.command)[2:]
    return budget.filled(parse_run([str(ROOT / preset), *flags]))


def core_macs_of(every: Configs, folder: Path) -> dict[str, float]:
    """Multiply-accumulates of training a second of a core, of each arm of E1's epoch by the
    seconds of the seed that took fewest: what else the core did only adds to them.
    """
    rates: dict[str, float] = {}
    for one in results.read(folder / f"{ON_CORE}.json"):
        if one.seconds and one.tokens:
            macs = 3 * budget.macs_per_token(every[ON_CORE, one.arm].model)
            speed = macs * one.tokens / one.seconds
            rates[one.arm] = max(speed, rates.get(one.arm, 0))
    return rates


def core_macs_under_way(run: Path) -> dict[str, Any]:
    """The same of a run that has not come to its end, as the file has it."""
    steps = [o for o in metrics.read(run / "metrics.jsonl") if o["event"] == "step"]
    config = load(run / "config.yaml")
    speed = statistics.median(line["tokens_per_second"] for line in steps)
    done = f"{len(steps)} of {config.train.steps} steps of a run of {ON_CORE}"
    macs = 3 * budget.macs_per_token(config.model) * speed
    return {"core_macs_per_second": macs, "core_from": done}


def speeds_of(folder: Path, name: str) -> list[tuple[str, int]]:
    """Arm and tokens a second of an experiment's finished runs."""
    every = results.read(folder / f"{name}.json")
    return [(o.arm, o.tokens_per_second) for o in every if o.tokens_per_second]


def peak(name: str, arm: str, config: RunConfig) -> int | None:
    """Compiled for an H100; of the arms that all experiments have, and for GPUs alone."""
    if arm not in COMPILED or not is_for_gpus(config):
        return None
    print(f"{name} {arm}: compiling, minutes the first time", flush=True)
    return budget.peak_bytes(aot.compiler(), config, 1, print)


if __name__ == "__main__":
    main()
