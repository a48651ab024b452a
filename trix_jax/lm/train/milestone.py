"""The steps at which a run is evaluated and saved, and what happens there."""

import math
import time
from fractions import Fraction
from typing import Any

import jax

from trix_jax import routing
from trix_jax.lm import allocator
from trix_jax.lm.data.pipeline import epoch_windows
from trix_jax.lm.train import metrics, parallel
from trix_jax.lm.train.display import Display
from trix_jax.lm.train.evaluate import Evaluation, evaluate
from trix_jax.lm.train.position import Position, save
from trix_jax.lm.train.run import Run
from trix_jax.lm.train.step_log import Diverged

Log = metrics.MetricsFile | metrics.NoFile


def is_multiple(step: int, every: int) -> bool:
    """Whether something that happens every so many steps, 0 never, happens after one."""
    return bool(every) and step > 0 and step % every == 0


def wants_evaluation(run: Run, step: int) -> bool:
    """Whether the validation loss is due; at the last step it always is."""
    config = run.config.train
    is_end = config.eval_epochs and epochs(run, step) > epochs(run, step - 1)
    return is_end or step == config.steps or is_multiple(step, config.eval_every)


def evaluated_steps(run: Run) -> list[int]:
    """The steps after which the validation loss is due."""
    return [n for n in range(1, run.config.train.steps + 1) if wants_evaluation(run, n)]


def wants_checkpoint(run: Run, step: int) -> bool:
    """Whether a checkpoint is due: with every evaluation, and in between."""
    is_between = is_multiple(step, run.config.train.checkpoint_every)
    return is_between or wants_evaluation(run, step)


def epochs(run: Run, step: int) -> int:
    """Whole epochs of the present data, so many windows as the training split has, up to
    a step.
    """
    return math.floor(_epochs(run, step))


def _epochs(run: Run, step: int) -> Fraction:
    windows = epoch_windows(run.store.train, run.config.model.context)
    steps = step - run.data_since
    return Fraction(steps * run.config.train.batch_size, windows)


def keep(
    run: Run,
    position: Position,
    began: float,
    log: Log,
    display: Display,
    is_stopping: bool = False,
) -> Position:
    """Evaluates if that is due, and saves; the state is as it lies on the devices.

    A run that is stopping saves without the evaluation, and owes it: it is the first
    thing that the run does when it goes on.
    """
    val_loss = None
    if position.is_owed or wants_evaluation(run, position.step):
        position = position._replace(is_owed=True)
        if not is_stopping:
            position, val_loss = _evaluate(run, position, began, log, display)
    return _save(run, position, began, val_loss)


def _save(
    run: Run, position: Position, began: float, val_loss: float | None
) -> Position:
    position = position._replace(seconds=time.perf_counter() - began)
    save(run, position, val_loss)
    allocator.trim_memory()
    return position


def _evaluate(
    run: Run, position: Position, began: float, log: Log, display: Display
) -> tuple[Position, float]:
    """Evaluates and logs; returns the position with its new routes and best loss, and
    the loss. Where the evaluation fails, as for want of memory, the step is saved first.

    Raises:
        Diverged: the loss is not finite, so that this step must not become a
            checkpoint.
    """
    config, step = run.config.train, position.step
    how = config.eval_batch_size, step / config.steps
    tokens = config.eval_tokens
    try:
        variables = parallel.variables_of(position.state, run.devices, run.mapping)
        result = evaluate(run.model, variables, run.store, *how, most=tokens)
        line = _eval_line(run, step, result, position)
    except Exception:
        if jax.process_count() == 1:  # other processes would not come to this save
            _save(run, position, began, None)
            display.say(f"the evaluation failed; step {step} is saved without it")
        raise
    if not math.isfinite(result.val_loss):
        raise Diverged(
            f"validation loss ({result.val_loss}) is not finite after step {step}: "
            "stopped, and not saved. The newest good checkpoint is as it was."
        )
    log.write(**line)
    display.evaluation(step, result)
    best = min(position.best, result.val_loss)
    position = position._replace(routes=result.routes, best=best, is_owed=False)
    return position, result.val_loss


def _eval_line(
    run: Run, step: int, result: Evaluation, before: Position
) -> dict[str, Any]:
    kept, is_first = [], math.isinf(before.best)
    if len(result.routes) and not is_first:
        kept = jax.device_get(_stability(before.routes, result.routes)).tolist()
    return {
        "event": "eval",
        "step": step,
        "tokens": step * run.tokens_per_step,
        "epochs": float(_epochs(run, step)),
        "val_tokens": result.tokens,
        "val_loss": result.val_loss,
        **_unquantized(result),
        "val_ppl": result.val_ppl,
        "val_bits_per_byte": result.val_bits_per_byte,
        "tile_usage": result.tile_usage,
        "routing_entropy": result.entropy,
        "routing_stability": kept,
        "dead_tiles": result.dead_tiles,
    }


_stability = jax.jit(jax.vmap(routing.stability))  # a layer


def _unquantized(result: Evaluation) -> dict[str, float]:
    """The loss of the weights that training computes with, where they are others."""
    value = result.val_loss_unquantized
    return {} if value is None else {"val_loss_unquantized": value}
