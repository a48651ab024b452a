"""Where a run is: its state and what goes with it, restored and saved."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trix_jax.lm.checkpoint import arrays, checkpoint
from trix_jax.lm.data import Store, eval_targets
from trix_jax.lm.train import extend, parallel, provenance
from trix_jax.lm.train.evaluate import ROUTES_KEPT
from trix_jax.lm.train.run import Report, Run, finished
from trix_jax.lm.train.step import TrainState, init_state


class Position(NamedTuple):
    """Where a run is.

    Attributes:
        state: on the host at the start, and then as it lies on the devices.
        routes: tiles of the validation tokens at the last evaluation.
        best: lowest validation loss on the present data.
        seconds: trained so far.
        skipped: steps in a row, up to this one, without a finite loss and gradient.
        is_owed: whether the evaluation of this step is still to be made, because the run
            stopped before it or it failed.
    """

    step: int
    state: TrainState
    routes: Any
    best: float
    seconds: float
    skipped: int
    is_owed: bool = False


def check_data(workdir: Path, step: int, store: Store) -> None:
    """Raises a ValueError unless the store is what a step was trained on."""
    meta = checkpoint.read_meta(workdir / "checkpoints", step)
    before, now = meta["data_fingerprint"], store.fingerprint
    if before != now:
        raise ValueError(
            f"{workdir} was trained on other data: its fingerprint is {before[:12]}, "
            f"that of {store.directory} is {now[:12]}. To go on all the same: --other-data."
        )


def data_since(run: Run, step: int | None) -> int:
    """The step after which the run's data came: where its checkpoint is of other data,
    that one.
    """
    if step is None:
        return 0
    before = checkpoint.read_meta(run.checkpoints, step)
    return step if _is_other(run, before) else before.get("data_since", 0)


def restore(
    run: Run,
    step: int | None,
    report: Report,
    weights: dict[str, Any] | None = None,
) -> Position:
    """Where training starts: a fresh state, or that of a checkpoint. Losses and routes
    on other data, or on other tokens of it, are not carried on: nothing compares to them.

    Args:
        weights: of a new run, in place of random ones (`initial.read`).

    Raises:
        ValueError: the checkpoint is of another model.
    """
    state = init_state(run.model, run.optimizer, run.config.seed)
    routes = np.zeros(_routes_shape(run), np.uint16)
    if step is None:
        state = state if weights is None else _started_from(run, state, weights)
        return Position(0, state, routes, math.inf, 0.0, 0)
    before = checkpoint.read_meta(run.checkpoints, step)
    is_apart = _is_apart(run, before)
    leaves = checkpoint.read_leaves(run.checkpoints, step)
    stored = arrays.empty(leaves["routes"]) if is_apart else routes
    template = {**state._asdict(), "routes": stored}
    tree, meta = checkpoint.restore(run.checkpoints, step, template)
    stored = np.asarray(tree.pop("routes"))
    if _is_other(run, before):
        meta |= {"evaluation_owed": False}
    else:
        name = f"step {step} of {run.workdir}"
        provenance.check(meta, run.config, run.workdir / "tokenizer.json", step, name)
    if is_apart:
        meta["best_val_loss"] = None
    else:
        routes = stored
    report(f"resuming {run.workdir} from step {step}")
    best = math.inf if meta["best_val_loss"] is None else meta["best_val_loss"]
    seconds, skipped = meta["seconds"], meta.get("skipped", 0)
    state, is_owed = TrainState(**tree), meta.get("evaluation_owed", False)
    return Position(step, state, routes, best, seconds, skipped, is_owed)


def check_finished(run: Run, step: int) -> None:
    """Refuses other data, or other validation tokens, for a run that has nothing left to
    train and so nothing to evaluate on them.

    Raises:
        ValueError: says what does.
    """
    if not finished(run, step):
        return
    if not _is_apart(run, checkpoint.read_meta(run.checkpoints, step)):
        return
    raise ValueError(
        f"{run.workdir} is finished at step {step}: nothing is left to train, nor to "
        "evaluate on other data or another train.eval_tokens. `trix-jax eval "
        f"--checkpoint {run.workdir}` takes --data and --tokens."
    )


def _is_other(run: Run, before: dict[str, Any]) -> bool:
    return before["data_fingerprint"] != run.store.fingerprint


def _is_apart(run: Run, before: dict[str, Any]) -> bool:
    """Whether losses and routes of a checkpoint are of other tokens than the run's."""
    return _is_other(run, before) or before.get("val_tokens") != _val_tokens(run)


def _started_from(run: Run, state: TrainState, weights: dict[str, Any]) -> TrainState:
    params, routing = (
        jax.tree.map(jnp.asarray, weights[name]) for name in ("params", "routing")
    )
    opt_state = run.optimizer.init(params)
    return state._replace(params=params, opt_state=opt_state, routing=routing)


def save(run: Run, position: Position, val_loss: float | None) -> None:
    """Writes a checkpoint: everything that goes on, and notes on what it belongs to."""
    meta = {
        "val_loss": val_loss,
        "best_val_loss": position.best if math.isfinite(position.best) else None,
        "seconds": position.seconds,
        "skipped": position.skipped,
        "data_since": run.data_since,
        "val_tokens": _val_tokens(run),
        "evaluation_owed": position.is_owed,
        **provenance.notes(run.config, run.store),
    }
    if run.init_from:
        meta["init_from"] = run.init_from
    state = parallel.to_save(position.state, run.devices, run.mapping)
    state = {**state._asdict(), "routes": position.routes}
    held = extend.held_steps(run.config)
    checkpoint.save(run.checkpoints, position.step, state, meta, hold=held)


def _evaluated(run: Run) -> int:
    """Tokens that an evaluation predicts."""
    config = run.config
    return eval_targets(run.store.val, config.model.context, config.train.eval_tokens)


def _val_tokens(run: Run) -> int | None:
    """The same; None where these are all of the split, as in runs before this setting."""
    count = _evaluated(run)
    return None if count == len(run.store.val) - 1 else count


def _routes_shape(run: Run) -> tuple[int, int, int]:
    model, kept = run.model.config, min(ROUTES_KEPT, _evaluated(run))
    if model.ffn == "dense":
        return (0, kept, 1)
    return (model.n_layers, kept, model.tiles_per_token)
