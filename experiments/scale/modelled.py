"""Memory and time of the experiments here on machines that they have not run on.

    python -m experiments.scale.modelled [--run DIR]

writes `results/modelled.json`, a row an experiment and arm. Memory is that of the step
compiled ahead of time for an H100, where the aot group is installed
(`$TRIX_AOT_PYTHON`); else what the file has stays. Time is modelled:

    GPU minutes = steps * least step * slack
    core hours  = tokens * 3 * MACs a token / MACs a second of a core

`least step` is `trix_jax.lm.experiment.budget.step_seconds`. `slack` is the median over
E1's runs of the measured step on a GPU over the least one; before E1 has run there it is
the budget's assumption. MACs a second are the median over the runs of E1's epoch on a
CPU, or those of the run under way in DIR, and else what the file has. Compilation is not
counted.
"""

import argparse
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.scale.run import NAMES, RESULTS, read
from trix_jax.files import read_json, write_json
from trix_jax.lm import aot
from trix_jax.lm.config import RunConfig, load
from trix_jax.lm.experiment import budget, results
from trix_jax.lm.train import metrics

PATH = RESULTS / "modelled.json"
ON_GPU, ON_CORE = "e1", "e1-one-epoch"  # what E1 is measured on
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
) -> dict[str, Any]:
    """What the file holds.

    Args:
        runs: how many an arm has.
        folder: of the results.
        known: what it held before: memory stays where nothing is compiled, the speed of
            a core where no result says it.
        peak: bytes of an arm's step, or None.
    """
    rows = known.get("rows", [])
    before = {(row["experiment"], row["arm"]): row["peak_bytes"] for row in rows}
    measured_slack = slack_of(every, folder)
    slack = measured_slack or budget.SLACK
    macs, core_from = core_macs_of(every, folder), ON_CORE
    if macs is None:
        macs, core_from = known.get("core_macs_per_second"), known.get("core_from")
    return {
        "command": "python -m experiments.scale.modelled",
        "target": "h100",
        "slack": slack,
        "slack_from": ON_GPU if measured_slack else "assumed",
        "core_macs_per_second": macs,
        "core_from": core_from,
        "rows": [
            {"experiment": name, "arm": arm, "runs": runs[name, arm]}
            | row_of(config, slack, macs)
            | {"peak_bytes": peak(name, arm, config) or before.get((name, arm))}
            for (name, arm), config in every.items()
        ],
    }


def row_of(config: RunConfig, slack: float, macs: float | None) -> dict[str, Any]:
    """Sizes and times of one run; none on a GPU for what is meant for a CPU."""
    own = budget.counted(config)
    total = 3 * own["tokens"] * budget.macs_per_token(config.model)
    minutes = round(60 * own["h100_hours"] * slack, 2)
    return {
        **{key: own[key] for key in ("params", "steps", "tokens")},
        "h100_minutes": minutes if is_for_gpus(config) else None,
        "core_hours": None if macs is None else round(total / macs / 3600, 2),
    }


def is_for_gpus(config: RunConfig) -> bool:
    """Those for a CPU are in float32."""
    return config.model.dtype == "bfloat16"


def slack_of(every: Configs, folder: Path) -> float | None:
    """How many times the least step E1 took on a GPU, the median over its runs."""
    ratios = []
    for arm, speed in speeds(folder, ON_GPU):
        config = every[ON_GPU, arm]
        seconds = config.train.batch_size * config.model.context / speed
        ratios.append(seconds / budget.step_seconds(config, "h100"))
    return statistics.median(ratios) if ratios else None


def core_macs_of(every: Configs, folder: Path) -> float | None:
    """Multiply-accumulates of training a second of a core, the median over E1's runs."""
    rates = [
        3 * budget.macs_per_token(every[ON_CORE, arm].model) * speed
        for arm, speed in speeds(folder, ON_CORE)
    ]
    return statistics.median(rates) if rates else None


def core_macs_under_way(run: Path) -> dict[str, Any]:
    """The same of a run that has not come to its end, as the file has it."""
    steps = [o for o in metrics.read(run / "metrics.jsonl") if o["event"] == "step"]
    config = load(run / "config.yaml")
    speed = statistics.median(line["tokens_per_second"] for line in steps)
    done = f"{len(steps)} of {config.train.steps} steps of a run of {ON_CORE}"
    macs = 3 * budget.macs_per_token(config.model) * speed
    return {"core_macs_per_second": macs, "core_from": done}


def speeds(folder: Path, name: str) -> list[tuple[str, int]]:
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
