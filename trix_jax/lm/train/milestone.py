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


def wants_checkpoint(run: Run, step: int) -> bool:
    """Whether a checkpoint is due: with every evaluation, and in between."""
    is_between = is_multiple(step, run.config.train.checkpoint_every)
    return is_between or wants_evaluation(run, step)


def epochs(run: Run, step: int) -> int:
    """Whole epochs, so many windows as the training split has, up to a step."""
    return math.floor(_epochs(run, step))


def _epochs(run: Run, step: int) -> Fraction:
    windows = epoch_windows(run.store.train, run.config.model.context)
    return Fraction(step * run.config.train.batch_size, windows)


def keep(
    run: Run, position: Position, began: float, log: Log, display: Display
) -> Position:
    """Evaluates if that is due, and saves; the state is as it lies on the devices."""
    val_loss = None
    if wants_evaluation(run, position.step):
        position, val_loss = _evaluate(run, position, log, display)
    position = position._replace(seconds=time.perf_counter() - began)
    save(run, position, val_loss)
    allocator.trim_memory()
    return position


def _evaluate(
    run: Run, position: Position, log: Log, display: Display
) -> tuple[Position, float]:
    """Evaluates and logs; returns the position with its new routes and best loss, and
    the loss.

    Raises:
        Diverged: the loss is not finite, so that this step must not become a
            checkpoint.
    """
    config, step = run.config.train, position.step
    variables = parallel.variables_of(position.state, run.devices, run.mapping)
    batch_size, progressed = config.eval_batch_size, step / config.steps
    result = evaluate(run.model, variables, run.store, batch_size, progressed)
    if not math.isfinite(result.val_loss):
        raise Diverged(
            f"validation loss ({result.val_loss}) is not finite after step {step}: "
            "stopped, and not saved. The newest good checkpoint is as it was."
        )
    log.write(**_eval_line(run, step, result, position))
    display.evaluation(step, result)
    best = min(position.best, result.val_loss)
    return position._replace(routes=result.routes, best=best), result.val_loss


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
