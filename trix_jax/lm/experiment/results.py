"""What an experiment's finished runs say: numbers, intervals, answers.

A hypothesis is judged on differences paired by seed, `TriX - other`, with the 95%
interval of their mean (Student's t): supported when the interval lies on the
hypothesis's side of zero, not supported when it lies on the other, undecided when it
holds zero or there are fewer than two seeds.
"""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from trix_jax.lm.experiment.runner import PLAN, Run, is_done
from trix_jax.lm.report.record import RunRecord, read_run

# 97.5% points of Student's t, by degrees of freedom.
T_POINT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
T_MANY = 1.96
TWIN = 0.02  # share by which a twin's cost may be off
LAST_SHARE = 0.05  # of the steps, whose training loss counts as the last

Verdict = Literal["supported", "not supported", "undecided"]


class Finished(NamedTuple):
    """A finished run."""

    run: Run
    record: RunRecord
    command: str

    @property
    def is_dense(self) -> bool:
        return self.record.config.model.ffn == "dense"

    @property
    def loss(self) -> float:
        return self.record.summary["final_val_loss"]

    @property
    def bits_per_byte(self) -> float:
        return self.record.summary["final_val_bits_per_byte"]

    @property
    def gap(self) -> float:
        """Validation loss minus the training loss of the last steps, dropout
        included.
        """
        steps = self.record.steps
        last = steps[-max(1, int(LAST_SHARE * len(steps))) :]
        return self.loss - statistics.mean(line["loss"] for line in last)

    def cost(self, name: str) -> float:
        """`total`, `ffn_active`, `ffn_bits` or `seconds`."""
        summary = self.record.summary
        value = summary["seconds"] if name == "seconds" else summary["params"][name]
        return float(value)


class Comparison(NamedTuple):
    """A TriX arm against another, in one size.

    Attributes:
        low, high: the 95% interval; infinite for fewer than two seeds.
    """

    size: str
    arm: str
    other: str
    seeds: int
    mean: float
    low: float
    high: float

    def verdict(self, wants_lower: bool = True) -> Verdict:
        """What the interval says of "TriX is lower" (or higher)."""
        low, high = (self.low, self.high) if wants_lower else (-self.high, -self.low)
        return "supported" if high < 0 else "not supported" if low > 0 else "undecided"


def read_experiment(
    directory: Path,
) -> tuple[dict[str, Any], list[Run], list[Finished]]:
    """The plan, its runs, and those of them that are finished.

    Raises:
        ValueError: no plan, or a run's file is damaged.
    """
    path = directory / PLAN
    try:
        plan = json.loads(path.read_bytes())
        runs = [Run(**r | {"flags": tuple(r["flags"])}) for r in plan["runs"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no plan of an experiment ({error}).") from error
    finished = [
        Finished(run, read_run(run.directory(directory)), public_command(run))
        for run in runs
        if is_done(run, directory)
    ]
    return plan, runs, finished


def public_command(run: Run) -> str:
    """A run's command without this machine's paths."""
    flags = list(run.flags)
    while "--data.path" in flags:
        at = flags.index("--data.path")
        del flags[at : at + 2]
    words = [word if not word.startswith("/") else _tail(word) for word in flags]
    return " ".join(["trix-jax train", *words, "--data.path", f"data/{run.size}"])


def groups(finished: Iterable[Finished]) -> dict[tuple[str, str], list[Finished]]:
    """Runs by size and arm, in the plan's order."""
    found = defaultdict(list)
    for one in finished:
        found[one.run.size, one.run.arm].append(one)
    return dict(found)


def compare(
    size: str,
    arm: str,
    other: str,
    found: dict[tuple[str, str], list[Finished]],
    value: Callable[[Finished], float],
) -> Comparison | None:
    """Differences paired by seed, or None without a common seed."""
    left = {f.run.seed: value(f) for f in found.get((size, arm), ())}
    right = {f.run.seed: value(f) for f in found.get((size, other), ())}
    pairs = [left[seed] - right[seed] for seed in left if seed in right]
    if not pairs:
        return None
    mean, half = interval(pairs)
    return Comparison(size, arm, other, len(pairs), mean, mean - half, mean + half)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval."""
    n = len(values)
    if n < 2:
        return values[0], math.inf
    t = T_POINT[n - 2] if n - 2 < len(T_POINT) else T_MANY
    return statistics.mean(values), t * statistics.stdev(values) / math.sqrt(n)


def twin(
    size: str,
    arm: str,
    cost: str,
    found: dict[tuple[str, str], list[Finished]],
    within: float = TWIN,
) -> str | None:
    """The dense arm of the same size whose cost is nearest, if it is near enough."""
    mine = found[size, arm][0].cost(cost)
    dense = {
        other: abs(runs[0].cost(cost) / mine - 1)
        for (s, other), runs in found.items()
        if s == size and runs[0].is_dense
    }
    nearest = min(dense, key=lambda other: dense[other], default=None)
    return nearest if nearest is not None and dense[nearest] <= within else None


def as_result(one: Finished, setting: str) -> dict[str, Any]:
    """A run as the committed results have it (DESIGN.md 5)."""
    config, summary = one.record.config, one.record.summary
    model = config.model
    width = {"width": model.dense_width}
    tiles = {
        "num_tiles": model.num_tiles,
        "tile_width": None if model.ffn == "lookup" else model.tile_width,
    }
    return {
        "setting": setting,
        "size": one.run.size,
        "arm": one.run.arm,
        **(width if one.is_dense else tiles),
        "tiles_per_token": None if one.is_dense else model.tiles_per_token,
        "seed": one.run.seed,
        "learning_rate": config.train.learning_rate,
        "steps": summary["steps"],
        "tokens": summary["tokens"],
        "val_loss": one.loss,
        "val_ppl": summary["final_val_ppl"],
        "val_bits_per_byte": one.bits_per_byte,
        "best_val_loss": summary["best_val_loss"],
        "best_val_ppl": math.exp(summary["best_val_loss"]),
        "train_val_gap": one.gap,
        "params_total": summary["params"]["total"],
        "ffn_active": summary["params"]["ffn_active"],
        "ffn_bits": summary["params"]["ffn_bits"],
        "min_entropy_share": summary.get("min_entropy_share"),
        "dead_tiles": summary.get("max_dead_tiles"),
        "routing": summary["routing"],
        "seconds": round(summary["seconds"], 1),
        "tokens_per_second": round(one.record.speed),
        "evaluations": [
            {k: line[k] for k in ("step", "tokens", "val_loss", "routing_stability")}
            for line in one.record.evals
        ],
        "command": one.command,
        "git_commit": summary.get("git_commit"),
    }


def _tail(path: str) -> str:
    """`configs/tiny.yaml` of an absolute path."""
    return "/".join(Path(path).parts[-2:])
