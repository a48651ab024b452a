"""Memory and time of the experiments here on machines that they have not run on.

    python -m experiments.scale.modelled

writes `results/modelled.json`, a row an experiment and arm. Memory is that of the step
compiled ahead of time for an H100, where the aot group is installed
(`$TRIX_AOT_PYTHON`); else what the file has stays. Time is modelled:

    GPU minutes = steps * least step * slack
    core hours  = tokens * 3 * MACs a token / MACs a second of a core

`least step` is `trix_jax.lm.experiment.budget.step_seconds`. `slack` is the median over
E1's arms of the measured step on a GPU over the least one; before E1 has run there it is
the budget's assumption. MACs a second are the median over the arms of E1's epoch on a
CPU; before that, nothing is said of cores. Compilation is not counted.
"""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.scale.run import NAMES, RESULTS, read
from trix_jax.files import read_json, write_json
from trix_jax.lm import aot
from trix_jax.lm.config import RunConfig
from trix_jax.lm.experiment import budget, results
from trix_jax.lm.experiment.results import Result

PATH = RESULTS / "modelled.json"
ON_GPU, ON_CORE = "e1", "e1-one-epoch"  # what E1 is measured on
COMPILED = ("lookup", "dense", "lookup-best", "sparse")

Configs = dict[tuple[str, str], RunConfig]  # by experiment and arm


def main() -> None:
    known = read_json(PATH)["rows"] if PATH.exists() else []
    write_json(PATH, model(configs(), RESULTS, known, peak))
    print(PATH)


def configs() -> Configs:
    """The resolved config of every arm of every experiment."""
    return {
        (name, arm): budget.filled(config)
        for name in NAMES
        for (_, arm), config in read(name).configs.items()
    }


def model(
    every: Configs,
    folder: Path,
    known: Sequence[dict[str, Any]],
    peak: Callable[[str, str, RunConfig], int | None],
) -> dict[str, Any]:
    """What the file holds.

    Args:
        folder: of the results.
        known: rows of before, whose memory stays where nothing is compiled.
        peak: bytes of an arm's step, or None.
    """
    before = {(row["experiment"], row["arm"]): row["peak_bytes"] for row in known}
    slack, macs = slack_of(every, folder), core_macs_of(every, folder)
    rows = []
    for (name, arm), config in every.items():
        own = budget.counted(config)
        total = 3 * own["tokens"] * budget.macs_per_token(config.model)
        row = {"experiment": name, "arm": arm}
        row |= {key: own[key] for key in ("params", "steps", "tokens")}
        row["h100_minutes"] = round(60 * own["h100_hours"] * (slack or budget.SLACK), 2)
        row["core_hours"] = None if macs is None else round(total / macs / 3600, 2)
        row["peak_bytes"] = peak(name, arm, config) or before.get((name, arm))
        rows.append(row)
    return {
        "command": "python -m experiments.scale.modelled",
        "target": "h100",
        "slack": slack or budget.SLACK,
        "slack_from": ON_GPU if slack else "assumed",
        "core_macs_per_second": macs,
        "core_from": ON_CORE if macs else None,
        "rows": rows,
    }


def slack_of(every: Configs, folder: Path) -> float | None:
    """How many times the least step E1 took on a GPU, the median over its arms."""
    ratios = []
    for one in measured(folder, ON_GPU):
        config = every[ON_GPU, one.arm]
        seconds = config.train.batch_size * config.model.context / one.tokens_per_second
        ratios.append(seconds / budget.step_seconds(config, "h100"))
    return statistics.median(ratios) if ratios else None


def core_macs_of(every: Configs, folder: Path) -> float | None:
    """Multiply-accumulates of training a second of a core, the median over E1's arms."""
    rates = [
        3 * budget.macs_per_token(every[ON_CORE, one.arm].model) * one.tokens_per_second
        for one in measured(folder, ON_CORE)
    ]
    return statistics.median(rates) if rates else None


def measured(folder: Path, name: str) -> list[Result]:
    """The finished runs of an experiment that have a speed."""
    every = results.read(folder / f"{name}.json")
    return [one for one in every if one.is_finite and one.tokens_per_second]


def peak(name: str, arm: str, config: RunConfig) -> int | None:
    """Compiled for an H100; of the arms that all experiments have, and for GPUs alone."""
    if arm not in COMPILED or config.model.dtype != "bfloat16":
        return None
    print(f"{name} {arm}: compiling, minutes the first time", flush=True)
    return budget.peak_bytes(aot.compiler(), config, 1, print)


if __name__ == "__main__":
    main()
