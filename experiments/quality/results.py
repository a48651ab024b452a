"""Runs as lines of `results/SETTING.json`: what is committed, and what decides which
run comes next.
"""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trix_jax.files import write_whole
from trix_jax.lm.accounting import active_width, costs
from trix_jax.lm.config import RunConfig

Result = dict[str, Any]


def read(path: Path) -> list[Result]:
    """The runs of a results file; none where there is no file yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def add(path: Path, result: Result) -> None:
    """Adds a run, or replaces the one with the same arm, rate and seed; whole or not at
    all.
    """
    kept = [r for r in read(path) if key(r) != key(result)]
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = sorted([*kept, result], key=key)
    write_whole(path, json.dumps(ordered, indent=1) + "\n")


def key(result: Result) -> tuple[str, float, int]:
    return result["arm"], result["learning_rate"], result["seed"]


def loss(result: Result) -> float:
    """Validation loss at the last step; infinite for a run that diverged."""
    return math.inf if result["val_loss"] is None else result["val_loss"]


def sweep(results: Iterable[Result], arm: str, seed: int) -> dict[float, float]:
    """Rate to loss, of one arm and seed."""
    return {
        r["learning_rate"]: loss(r)
        for r in results
        if r["arm"] == arm and r["seed"] == seed
    }


def at_rate(results: Iterable[Result], arm: str, rate: float) -> dict[int, Result]:
    """Seed to run, of one arm and rate."""
    return {
        r["seed"]: r for r in results if r["arm"] == arm and r["learning_rate"] == rate
    }


def result_of(
    setting: str, arm: str, config: RunConfig, summary: dict | None, command: str
) -> Result:
    """A run's line (DESIGN.md, "Committed results"); `summary` is None for a run that
    diverged, which has no loss.
    """
    model, summary = config.model, summary or {}
    if model.ffn == "dense":
        shape = {"width": model.dense_width, "tiles_per_token": None}
    else:
        tile_width = None if model.ffn == "lookup" else model.tile_width
        shape = {
            "num_tiles": model.num_tiles,
            "tile_width": tile_width,
            "tiles_per_token": model.tiles_per_token,
        }
    params = costs(model)
    return {
        "setting": setting,
        "arm": arm,
        **shape,
        "seed": config.seed,
        "learning_rate": config.train.learning_rate,
        "steps": config.train.steps,
        "tokens": summary.get("tokens"),
        "val_loss": summary.get("final_val_loss"),
        "best_val_loss": summary.get("best_val_loss"),
        "params_total": params.total,
        "ffn_active": params.ffn_active,
        "ffn_bits": params.ffn_bits,
        "active_width": active_width(model),
        "min_entropy_share": summary.get("min_entropy_share"),
        "dead_tiles": summary.get("max_dead_tiles"),
        "seconds": round(summary["seconds"], 1) if summary else None,
        "command": command,
        "git_commit": summary.get("git_commit"),
    }


class Tuned(NamedTuple):
    """An arm at its best rate.

    Attributes:
        runs: seed to run.
        is_bracketed: whether the rates beside have been run and are worse.
    """

    arm: str
    rate: float
    runs: dict[int, Result]
    is_bracketed: bool

    @property
    def one(self) -> Result:
        """Any run: sizes and costs are the same in all."""
        return next(iter(self.runs.values()))

    @property
    def losses(self) -> dict[int, float]:
        """Seed to validation loss."""
        return {seed: loss(run) for seed, run in self.runs.items()}


def tuned(results: Sequence[Result], arm: str, like: str | None = None) -> Tuned | None:
    """An arm at the best rate of its sweep, or of the arm `like`; None without runs."""
    seed = min((r["seed"] for r in results), default=0)
    losses = sweep(results, like or arm, seed)
    finite = {rate: value for rate, value in losses.items() if math.isfinite(value)}
    if not finite:
        return None
    rate = min(finite, key=lambda r: (finite[r], r))
    runs = at_rate(results, arm, rate)
    runs = {s: run for s, run in runs.items() if math.isfinite(loss(run))}
    inside = {rate / 2, rate * 2} <= set(losses)
    return Tuned(arm, rate, runs, inside) if runs else None
