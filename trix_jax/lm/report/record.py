"""What a run directory says of its run, read and checked."""

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from trix_jax.lm.config import RunConfig, load
from trix_jax.lm.train import metrics

# What is needed of each line or file of a run, and of each part of the demo's result.
KEYS = {
    "step": "tokens loss tokens_per_second memory_bytes routing_entropy aux_balance "
    "aux_diversity",
    "eval": "tokens val_loss tile_usage routing_stability",
    "summary": "best_val_loss final_val_loss final_val_ppl final_val_bits_per_byte "
    "seconds tokens params routing",
    "params": "total ffn ffn_active ffn_bits",
    "env": "python system cpu_count devices packages git_commit",
    "result": "seconds arms ngram routing bytes packed prompt sample config",
    "arms": "trix dense dense_w",
    "arm": "val_loss val_ppl val_bits_per_byte params_total ffn_active",
    "packed": "val_loss",
    "bytes": "ffn_float32 ffn_packed",
    "config": "steps tokens d_model n_layers num_tiles tiles_per_token context "
    "batch_size corpus val_tokens",
}


class RunRecord(NamedTuple):
    """What a run directory says of its run."""

    config: RunConfig
    steps: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    summary: dict[str, Any]
    env: dict[str, Any]

    @property
    def speed(self) -> float:
        """Median training tokens a second; the first steps also compile."""
        return statistics.median(line["tokens_per_second"] for line in self.steps)


def read_run(workdir: str | Path) -> RunRecord:
    """Reads `config.yaml`, `metrics.jsonl`, `summary.json` and `env.json` of a run.

    Raises:
        ValueError: one is missing, damaged or without what a report needs; names it.
    """
    workdir = Path(workdir)
    path = workdir / "metrics.jsonl"
    try:
        lines = list(metrics.read(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
    of_kind: dict[str, list[dict[str, Any]]] = {"step": [], "eval": []}
    for number, line in enumerate(lines, 1):
        event = line.get("event") if isinstance(line, dict) else None
        if event in of_kind:
            of_kind[event].append(check(line, event, f"{path} line {number}"))
    for event, found in of_kind.items():
        if not found:
            raise ValueError(f"{path} must hold a line of event {event!r}. Got none.")
    config = load(workdir / "config.yaml")
    summary, env = _read_json(workdir, "summary"), _read_json(workdir, "env")
    check(summary["params"], "params", f"params in {workdir / 'summary.json'}")
    return RunRecord(config, of_kind["step"], of_kind["eval"], summary, env)


def check(tree: Any, kind: str, name: str) -> Any:
    """Returns `tree`, or raises a ValueError that names the first of `KEYS[kind]` which it
    lacks.
    """
    for key in KEYS[kind].split():
        if not isinstance(tree, Mapping) or key not in tree:
            raise ValueError(f"{name} must hold {KEYS[kind]}. Got no {key}.")
    return tree


def _read_json(workdir: Path, kind: str) -> dict[str, Any]:
    path = workdir / f"{kind}.json"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
    return check(tree, kind, str(path))
