"""A finished run in one object, `summary.json`."""

import math
from typing import Any

from trix_jax.files import write_json
from trix_jax.lm import hosts
from trix_jax.lm.accounting import costs
from trix_jax.lm.config import fingerprint
from trix_jax.lm.train import metrics
from trix_jax.lm.train.position import Position
from trix_jax.lm.train.run import Run, finished


def write_summary(run: Run, seconds: float, start: Position) -> dict[str, Any]:
    """Writes and returns `summary.json`, from the lines of metrics.jsonl; that of a run
    which was finished before stays.

    Args:
        start: where the run was when this process began; evaluations on other data, or
            on other validation tokens than the last, do not count.

    Raises:
        ValueError: the file does not hold the last evaluation, or holds what is no
            JSON.
    """
    lines = list(metrics.read(run.workdir / "metrics.jsonl"))
    evals = [line for line in lines if line["event"] == "eval"]
    if not evals or evals[-1]["step"] != run.config.train.steps:
        raise ValueError(
            f"{run.workdir / 'metrics.jsonl'} must hold the evaluation of the last step, "
            f"{run.config.train.steps}, for a summary: its end is lost. The checkpoints "
            "are as they were."
        )
    if summary := finished(run, start.step):
        return summary
    evals = [line for line in evals if line["step"] > run.data_since] or evals
    whole = len(run.store.val) - 1  # of lines before they said
    tokens = [line.get("val_tokens", whole) for line in evals]
    evals = [e for e, count in zip(evals, tokens, strict=True) if count == tokens[-1]]
    best, last = min(evals, key=lambda line: line["val_loss"]), evals[-1]
    summary = {
        "arm": run.config.arm,
        "seed": run.config.seed,
        "best_val_loss": best["val_loss"],
        "best_val_ppl": best["val_ppl"],
        "final_val_loss": last["val_loss"],
        "final_val_ppl": last["val_ppl"],
        "final_val_bits_per_byte": last["val_bits_per_byte"],
        "seconds": seconds,
        "tokens": last["tokens"],
        "steps": last["step"],
        "skipped_steps": sum(line["event"] == "skipped" for line in lines),
        "params": costs(run.model.config)._asdict(),
        **_routing(evals),
        "config_sha256": fingerprint(run.config),
        "git_commit": metrics.git_commit(),
    }
    if run.init_from:
        summary["init_from"] = run.init_from
    if run.data_since:
        summary["data_since"] = run.data_since
    if hosts.is_first():
        write_json(run.workdir / "summary.json", summary)
    return summary


def _routing(evals: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the last evaluation a layer's entropy, greatest load and dead tiles; of all of
    them the least share of the greatest entropy, and the most dead tiles of a layer.
    """
    last = evals[-1]
    columns = (last[key] for key in ("routing_entropy", "tile_usage", "dead_tiles"))
    layers = [
        {"entropy": entropy, "max_load": max(usage) * len(usage), "dead_tiles": dead}
        for entropy, usage, dead in zip(*columns, strict=True)
    ]
    shares = (
        entropy / math.log(len(usage)) if len(usage) > 1 else 1.0
        for line in evals
        for entropy, usage in zip(
            line["routing_entropy"], line["tile_usage"], strict=True
        )
    )
    dead = (count for line in evals for count in line["dead_tiles"])
    return {
        "routing": layers,
        "min_entropy_share": min(shares, default=None),
        "max_dead_tiles": max(dead, default=None),
    }
