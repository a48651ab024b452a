"""A run directory: what opens it, what goes on with it, what is kept of it.

`config.yaml` (resolved), `tokenizer.json`, `env.json`, `metrics.jsonl`, `summary.json`, `checkpoints/`, and `data/` where the
run prepared its own.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax
import yaml

from trix_jax.lm import checkpoint, metrics
from trix_jax.lm.config import RunConfig, fingerprint, from_tree, read_yaml, to_tree
from trix_jax.lm.data import Store, is_store, open_store, prepare
from trix_jax.lm.evaluate import ROUTES_KEPT
from trix_jax.lm.step import TrainState, init_state
from trix_jax.nn.transformer import TransformerLM

Resume = Literal["auto", "never", "must"]
Report = Callable[[str], None]


class Run(NamedTuple):
    """What stays the same from the first step to the last."""

    config: RunConfig
    workdir: Path
    store: Store
    model: TransformerLM
    optimizer: optax.GradientTransformation
    devices: list[jax.Device]

    @property
    def checkpoints(self) -> Path:
        return self.workdir / "checkpoints"

    @property
    def tokens_per_step(self) -> int:
        return self.config.train.batch_size * self.config.model.context


class Position(NamedTuple):
    """Where a run is."""

    step: int
    state: TrainState
    routes: np.ndarray
    best: float
    seconds: float


def open_data(config: RunConfig, workdir: Path, report: Report = print) -> Store:
    """The run's token store: the one at `data.path`, or `workdir/data`, prepared on first use."""
    if config.data.path and is_store(config.data.path):
        return open_store(config.data.path)
    return prepare(config.data, workdir / "data", report)


def resume_step(workdir: Path, resume: Resume, report: Report) -> int | None:
    """The step to go on from, None for a new run. Damaged newer steps are set aside, with a message."""
    checkpoints = workdir / "checkpoints"
    steps = checkpoint.steps(checkpoints) if checkpoints.is_dir() else []
    if resume == "never" and (steps or (workdir / "config.yaml").exists()):
        raise ValueError(
            f"resume='never' needs a workdir without a run. Got {workdir}, which holds one."
        )
    good = checkpoint.newest_good(checkpoints, report=lambda _: None) if steps else None
    if steps and good is None:
        reasons = " ".join(
            checkpoint.verify(checkpoints / f"{step:08d}") or "" for step in steps
        )
        raise ValueError(
            f"{workdir} has no good checkpoint to resume from, and a run is never restarted silently. {reasons}"
        )
    for step in steps:
        if good is not None and step > good:
            reason = checkpoint.verify(checkpoints / f"{step:08d}")
            report(
                f"{reason} It is set aside as {checkpoint.set_aside(checkpoints, step).name}."
            )
    if resume == "must" and good is None:
        raise ValueError(
            f"resume='must' needs a workdir with a checkpoint. Got {workdir}, which has none."
        )
    return good


def settle(
    config: RunConfig,
    workdir: Path,
    store: Store,
    devices: list[jax.Device],
    is_new: bool,
) -> None:
    """Writes the resolved config, the tokenizer and the environment; a run that is there must have the same config."""
    path = workdir / "config.yaml"
    if path.exists():
        before = from_tree(read_yaml(path))
        changed = sorted(
            _flat(to_tree(before)).items() ^ _flat(to_tree(config)).items()
        )
        names = sorted({name for name, _ in changed} - {"data.path"})
        if names and not is_new:
            raise ValueError(
                f"{workdir} holds a run with other settings ({', '.join(names)}): use another workdir, or the same settings."
            )
    workdir.mkdir(parents=True, exist_ok=True)
    metrics.write_atomically(path, yaml.safe_dump(to_tree(config), sort_keys=False))
    store.tokenizer.save(workdir / "tokenizer.json")
    metrics.write_json(workdir / "env.json", metrics.environment(devices))


def restore(run: Run, step: int | None, report: Report) -> Position:
    """Where training starts: a fresh state, or that of a checkpoint.

    Raises:
        ValueError: the checkpoint is of another model or was trained on other data.
    """
    state = init_state(run.model, run.optimizer, run.config.seed)
    routes = np.zeros(_routes_shape(run), np.uint16)
    if step is None:
        return Position(0, state, routes, math.inf, 0.0)
    tree, meta = checkpoint.restore(
        run.checkpoints, step, {**state._asdict(), "routes": routes}
    )
    if meta["data_fingerprint"] != run.store.fingerprint:
        raise ValueError(
            f"{run.workdir} was trained on other data: its fingerprint is {meta['data_fingerprint'][:12]}."
        )
    routes = np.asarray(tree.pop("routes"))
    report(f"resuming {run.workdir} from step {step}")
    best = meta["best_val_loss"] if meta["best_val_loss"] is not None else math.inf
    return Position(step, TrainState(**tree), routes, best, meta["seconds"])


def save(
    run: Run, step: int, state: TrainState, routes: np.ndarray, meta: dict[str, Any]
) -> None:
    """Writes a checkpoint: everything that goes on, and `meta` with what it belongs to."""
    if not np.isfinite(meta["best_val_loss"]):
        meta = {**meta, "best_val_loss": None}
    meta = {
        **meta,
        "data_fingerprint": run.store.fingerprint,
        "config_sha256": fingerprint(run.config),
    }
    checkpoint.save(run.checkpoints, step, {**state._asdict(), "routes": routes}, meta)


def _routes_shape(run: Run) -> tuple[int, int, int]:
    model = run.model.config
    if model.ffn == "dense":
        return (0, min(ROUTES_KEPT, len(run.store.val) - 1), 1)
    return (
        model.n_layers,
        min(ROUTES_KEPT, len(run.store.val) - 1),
        model.tiles_per_token,
    )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        flat |= (
            _flat(value, f"{prefix}{name}.")
            if isinstance(value, dict)
            else {f"{prefix}{name}": value}
        )
    return flat
