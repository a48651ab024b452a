"""A run directory: what opens it, what goes on with it, what is kept of it.

`config.yaml` (resolved), `tokenizer.json`, `env.json`, `metrics.jsonl`, `summary.json`,
`checkpoints/`, and `data/` where the run prepared its own.
"""

import contextlib
import dataclasses
import fcntl
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np
import optax
import yaml

from trix_jax.files import write_json, write_whole, writing
from trix_jax.lm import config as run_config
from trix_jax.lm.checkpoint import checkpoint
from trix_jax.lm.config import RunConfig, to_tree
from trix_jax.lm.data import Store, is_store, made_with, open_store, prepare
from trix_jax.lm.train import metrics, provenance
from trix_jax.lm.train.evaluate import ROUTES_KEPT
from trix_jax.lm.train.parallel import Mapping
from trix_jax.lm.train.step import TrainState, init_state
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
    mapping: Mapping

    @property
    def checkpoints(self) -> Path:
        return self.workdir / "checkpoints"

    @property
    def tokens_per_step(self) -> int:
        return self.config.train.batch_size * self.config.model.context


class Position(NamedTuple):
    """Where a run is.

    Attributes:
        routes: tiles of the validation tokens at the last evaluation.
        best: lowest validation loss.
        seconds: trained so far.
        skipped: steps in a row, up to this one, without a finite loss and gradient.
    """

    step: int
    state: TrainState
    routes: np.ndarray
    best: float
    seconds: float
    skipped: int


def open_data(
    config: RunConfig, workdir: Path, report: Report = print, is_new: bool = True
) -> Store:
    """The run's token store: the one at `data.path`, or `workdir/data`, prepared on
    first use.

    Text that changed since stops a new run; one that goes on has its tokens, and is
    told.
    """
    if config.data.path and is_store(config.data.path):
        return open_store(config.data.path)
    changed = "refuse" if is_new else "tell"
    context = config.model.context
    return prepare(config.data, workdir / "data", report, context, changed)


def as_made(config: RunConfig, store: Store) -> RunConfig:
    """The config with what is true of a store that was there: a preset yields to it."""
    if not config.data.path or not is_store(config.data.path):
        return config
    data = made_with(store, config.data.path)
    return dataclasses.replace(config, data=data)


def resume_step(workdir: Path, resume: Resume, report: Report) -> int | None:
    """The step to go on from, None for a new run.

    Damaged newer steps are set aside, with a message; what a killed save left is
    cleared.
    """
    checkpoints = workdir / "checkpoints"
    steps = checkpoint.steps(checkpoints) if checkpoints.is_dir() else []
    if resume == "never" and (steps or (workdir / "config.yaml").exists()):
        raise ValueError(
            f"resume='never' needs a workdir without a run. Got {workdir}, which holds one."
        )
    if not steps and (aside := sorted(checkpoints.glob("damaged-*"))):
        raise ValueError(
            f"{workdir} has no checkpoint but one that was set aside, {aside[-1].name}, "
            "and a run is never restarted silently: use another workdir."
        )
    if not steps and (workdir / "config.yaml").exists():
        report(f"{workdir} holds a run without a checkpoint: it starts at step 0")
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
    if good is not None:
        checkpoint.clear(checkpoints)
    if resume == "must" and good is None:
        raise ValueError(
            f"resume='must' needs a workdir with a checkpoint. Got {workdir}, which has none."
        )
    return good


def read_config(workdir: Path) -> RunConfig | None:
    """What a run was begun with; None if nothing says so."""
    path = workdir / "config.yaml"
    return run_config.load(path) if path.exists() else None


@contextlib.contextmanager
def held(workdir: Path, report: Report) -> Iterator[None]:
    """Keeps other processes out of a run directory, until this one ends in whatever way.

    Raises:
        RuntimeError: another process trains there.
    """
    with writing(workdir / ".lock"):
        file = (workdir / ".lock").open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"another process trains in {workdir}: wait for it, or use another workdir."
            ) from None
        except OSError as error:
            report(
                f"{workdir} cannot be locked ({error.strerror}): train here once only"
            )
        yield


def settle(
    config: RunConfig,
    workdir: Path,
    store: Store,
    devices: list[jax.Device],
    is_new: bool,
) -> None:
    """Writes the resolved config, the tokenizer and the environment; a run that is
    there must have the same config and tokenizer, since without it nobody can read its
    steps again.

    Raises:
        ValueError: it has another; says which, and nothing is written.
    """
    path, own = workdir / "config.yaml", workdir / "tokenizer.json"
    tokenizer = (store.directory / "tokenizer.json").read_bytes()
    if not is_new and own.is_file() and own.read_bytes() != tokenizer:
        raise ValueError(
            f"{store.directory} must have the tokenizer of {workdir}, {own}: with "
            "another one its steps could not be read again. Use another workdir."
        )
    if path.exists():
        written = run_config.load(path)
        before, now = (provenance.flat(to_tree(c)) for c in (written, config))
        if (lines := provenance.changes(before, now)) and not is_new:
            raise ValueError(
                f"{workdir} holds a run with other settings: {'; '.join(lines)}. Use "
                "another workdir, or the same settings."
            )
    workdir.mkdir(parents=True, exist_ok=True)
    write_whole(path, yaml.safe_dump(to_tree(config), sort_keys=False))
    write_whole(own, tokenizer)
    write_json(workdir / "env.json", metrics.environment(devices))


def restore(
    run: Run, step: int | None, report: Report, other_data: bool = False
) -> Position:
    """Where training starts: a fresh state, or that of a checkpoint.

    Args:
        other_data: whether to go on though the data is not what the run was trained on.

    Raises:
        ValueError: the checkpoint is of another model or was trained on other data.
    """
    state = init_state(run.model, run.optimizer, run.config.seed)
    routes = np.zeros(_routes_shape(run), np.uint16)
    if step is None:
        return Position(0, state, routes, math.inf, 0.0, 0)
    tree, meta = checkpoint.restore(
        run.checkpoints, step, {**state._asdict(), "routes": routes}
    )
    before, now = meta["data_fingerprint"], run.store.fingerprint
    if before != now and not other_data:
        raise ValueError(
            f"{run.workdir} was trained on other data: its fingerprint is {before[:12]}, "
            f"that of {run.store.directory} is {now[:12]}. To go on all the same: --other-data."
        )
    if before == now:
        tokenizer, what = (
            run.workdir / "tokenizer.json",
            f"step {step} of {run.workdir}",
        )
        provenance.check(meta, run.config, tokenizer, what)
    routes = np.asarray(tree.pop("routes"))
    report(f"resuming {run.workdir} from step {step}")
    best = meta["best_val_loss"] if meta["best_val_loss"] is not None else math.inf
    seconds, skipped = meta["seconds"], meta.get("skipped", 0)
    return Position(step, TrainState(**tree), routes, best, seconds, skipped)


def save(run: Run, position: Position, val_loss: float | None) -> None:
    """Writes a checkpoint: everything that goes on, and notes on what it belongs to."""
    meta = {
        "val_loss": val_loss,
        "best_val_loss": position.best if math.isfinite(position.best) else None,
        "seconds": position.seconds,
        "skipped": position.skipped,
        **provenance.notes(run.config, run.store),
    }
    state = {**position.state._asdict(), "routes": position.routes}
    checkpoint.save(run.checkpoints, position.step, state, meta)


def _routes_shape(run: Run) -> tuple[int, int, int]:
    model = run.model.config
    if model.ffn == "dense":
        return (0, min(ROUTES_KEPT, len(run.store.val) - 1), 1)
    return (
        model.n_layers,
        min(ROUTES_KEPT, len(run.store.val) - 1),
        model.tiles_per_token,
    )
