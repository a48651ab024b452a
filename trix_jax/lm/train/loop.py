"""The training loop: prepare, resume, step, evaluate, save.

A file called `checkpoint-now` in the run directory asks for a checkpoint after the next
step; it is removed once that is on the disk.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trix_jax import routing
from trix_jax.lm import allocator, hosts
from trix_jax.lm.config import RunConfig, TrainConfig, resolve
from trix_jax.lm.data import check_context, train_batches
from trix_jax.lm.signals import Interrupted, Signals
from trix_jax.lm.train import metrics, parallel
from trix_jax.lm.train.display import Display
from trix_jax.lm.train.evaluate import Evaluation, evaluate
from trix_jax.lm.train.optimizer import make_optimizer
from trix_jax.lm.train.run import (
    Position,
    Resume,
    Run,
    as_made,
    held,
    open_data,
    read_config,
    restore,
    resume_step,
    save,
    settle,
)
from trix_jax.lm.train.step import make_train_step
from trix_jax.lm.train.step_log import Diverged, StepLog
from trix_jax.lm.train.summary import write_summary
from trix_jax.lm.train.trace import StepTrace
from trix_jax.nn.transformer import TransformerConfig, TransformerLM

TRIGGER = "checkpoint-now"


def train(
    config: RunConfig,
    workdir: str | Path,
    *,
    resume: Resume = "auto",
    devices: Sequence[jax.Device] | None = None,
    other_data: bool = False,
    shard_state: bool = False,
    shard_tiles: int = 1,
    trace_steps: int = 0,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Trains a run in `workdir`, or goes on with the one that is there, and returns its
    summary.

    The process keeps the memory that it frees (`trix_jax.lm.allocator`).

    Args:
        config: what to train.
        workdir: the run directory.
        resume: "auto" goes on where a run left off, "never" refuses a directory that
            holds one, "must" an empty one.
        devices: what to train on, `jax.pmap` over several; None takes all,
            `jax.shard_map` over those of several processes.
        other_data: go on with a run though the data is not what it was trained on.
        shard_state: slice parameters and optimizer state over the devices.
        shard_tiles: devices that the tiles of a layer are spread over.
        trace_steps: steps to trace into `workdir/trace`, for xprof.
        report: takes one-line messages.

    Raises:
        ValueError: bad input: a config, corpus or directory that does not do.
        Interrupted: SIGTERM or SIGINT, after saving.
        Diverged: too many steps in a row without a finite loss and gradient, or a
            validation loss that is not finite; the last checkpoint is kept.
    """
    workdir = Path(workdir)
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"workdir must be a folder, or new. Got {workdir}, a file.")
    allocator.keep_freed_memory()  # before JAX starts its threads
    parallel.check_spread(config.model, shard_tiles, devices or jax.devices())
    with Signals() as signals, contextlib.ExitStack() as lock:
        is_there = workdir.is_dir()
        if is_there and hosts.is_first():
            lock.enter_context(held(workdir, report))
        with signals.at_once(f"before its first step; {workdir} is as it was"):
            step = _resume_step(workdir, resume, report)
            run = _open(config, workdir, step, devices, report)
            if not is_there and hosts.is_first():
                lock.enter_context(held(workdir, report))
            mapping = parallel.mapping_over(run.devices, shard_state, shard_tiles)
            run = run._replace(mapping=mapping)
            position = restore(run, step, report, other_data)
        with (
            metrics.open_log(workdir, position.step, hosts.is_first()) as log,
            Display(run.config.train.steps, position.step, report) as display,
            StepTrace(workdir / "trace", position.step, trace_steps) as trace,
        ):
            seconds = _loop(run, position, log, display, signals, trace)
        hosts.wait_for_all("the last step is saved")
        return write_summary(run, seconds)


def _resume_step(workdir: Path, resume: Resume, report: Callable) -> int | None:
    """The first process looks, tells the others, and is the only one that moves
    anything.
    """
    step = resume_step(workdir, resume, report) if hosts.is_first() else None
    step = hosts.from_first(-1 if step is None else step)
    return None if step < 0 else step


def _open(
    config: RunConfig,
    workdir: Path,
    step: int | None,
    devices: Sequence[jax.Device] | None,
    report: Callable[[str], None],
) -> Run:
    """Checks and prepares everything that stays the same from the first step on."""
    store = hosts.first_then_others(
        lambda: open_data(config, workdir, report, step is None),
        "the data is prepared",
    )
    hosts.check_same("the token store", store.fingerprint)
    before = read_config(workdir) if step is not None else None
    config = as_made(config, store)
    vocabulary, end = store.tokenizer.vocab_size, store.tokenizer.eot
    config = resolve(config, vocabulary, before, end)
    for name, split in (("training", store.train), ("validation", store.val)):
        check_context(name, split, config.model.context)
    devices = list(devices or jax.devices())
    parallel.check_batch(config.train.batch_size, config.train.accumulate, devices)
    if hosts.is_first():
        settle(config, workdir, store, devices, is_new=step is None)
    hosts.wait_for_all("the run directory is settled")
    model, optimizer = TransformerLM(config.model), make_optimizer(config.train)
    mapping = parallel.mapping_over(devices)
    return Run(config, workdir, store, model, optimizer, devices, mapping)


def _loop(
    run: Run,
    position: Position,
    log: metrics.MetricsFile | metrics.NoFile,
    display: Display,
    signals: Signals,
    trace: StepTrace,
) -> float:
    """Steps to the end; the metrics of a step are fetched after the next one is under
    way. Returns seconds trained.
    """
    config, devices, mapping = run.config.train, tuple(run.devices), run.mapping
    began = time.perf_counter() - position.seconds
    step_fn = _compiled_step(run.config.model, config, devices, mapping)
    state = parallel.place(position.state, devices, mapping)
    batches = _batches(run, position.step)
    logger = StepLog(run, log, display, position.skipped)
    trigger = run.workdir / TRIGGER
    for step in range(position.step + 1, config.steps + 1):
        if _is_multiple(step - 1, config.rebuild_every):
            state = parallel.rebuild_clusters(state, devices, mapping)
        trace.before(step)
        state, values = step_fn(state, next(batches))
        trace.after(step, values)
        logger.after(step, values)
        is_last = step == config.steps
        wants_eval = is_last or _is_multiple(step, config.eval_every)
        wants_save = wants_eval or _is_multiple(step, config.checkpoint_every)
        is_asked, must_stop = hosts.any_asks(
            step % hosts.AGREE_EVERY == 0, trigger.exists(), bool(signals.caught)
        )
        if not (wants_save or is_asked or must_stop):
            continue
        logger.flush()
        whole = parallel.fetch(state, devices, mapping)
        position = position._replace(step=step, state=whole, skipped=logger.skipped)
        position = _keep(run, position, wants_eval, began, log, display)
        logger.restart_clock()
        if is_asked:
            trigger.unlink(missing_ok=True)
            display.say(f"step {step} is saved, as {TRIGGER} asked")
        (must_stop,) = hosts.any_asks(True, must_stop or bool(signals.caught))
        if must_stop and not is_last:
            raise Interrupted(
                f"stopped by {signals.caught or 'another process'} after step {step}, saved. "
                "The same command goes on.",
                signals.caught,
            )
    return time.perf_counter() - began


def _batches(run: Run, start: int) -> Iterator[np.ndarray]:
    """`[accumulate, B, L + 1]` tokens for each step after `start`."""
    config, context = run.config.train, run.config.model.context
    batches = train_batches(
        run.store.train,
        batch_size=config.batch_size,
        context=context,
        seed=run.config.seed,
        start_step=start,
        sampler=config.sampler,
    )
    shape = (config.accumulate, -1, context + 1)
    return (batch.reshape(shape) for batch in batches)


def _keep(
    run: Run,
    position: Position,
    wants_eval: bool,
    began: float,
    log: metrics.MetricsFile | metrics.NoFile,
    display: Display,
) -> Position:
    """Evaluates if that is due, and saves."""
    val_loss = None
    if wants_eval:
        position, val_loss = _evaluate(run, position, log, display)
    position = position._replace(seconds=time.perf_counter() - began)
    save(run, position, val_loss)
    allocator.trim_memory()
    return position


@lru_cache(maxsize=4)
def _compiled_step(
    model: TransformerConfig,
    config: TrainConfig,
    devices: tuple[jax.Device, ...],
    mapping: parallel.Mapping,
) -> Callable:
    """The step, compiled once for runs of the same model and settings in a process."""
    optimizer = make_optimizer(config)
    make_step = partial(make_train_step, TransformerLM(model), optimizer, config)
    return parallel.compile_step(make_step, devices, mapping)


def _evaluate(
    run: Run,
    position: Position,
    log: metrics.MetricsFile | metrics.NoFile,
    display: Display,
) -> tuple[Position, float]:
    """Evaluates and logs; returns the position with its new routes and best loss, and
    the loss.

    Raises:
        Diverged: the loss is not finite, so that this step must not become a
            checkpoint.
    """
    config, step, state = run.config.train, position.step, position.state
    variables = {"params": state.params}
    if state.routing:
        variables["routing"] = state.routing
    batch_size, progressed = config.eval_batch_size, step / config.steps
    result = evaluate(run.model, variables, run.store, batch_size, progressed)
    if not math.isfinite(result.val_loss):
        raise Diverged(
            f"validation loss ({result.val_loss}) is not finite after step {step}: "
            "stopped, and not saved. The newest good checkpoint is as it was."
        )
    log.write(**_eval_line(run, step, result, position.routes))
    display.evaluation(step, result)
    best = min(position.best, result.val_loss)
    return position._replace(routes=result.routes, best=best), result.val_loss


def _is_multiple(step: int, every: int) -> bool:
    return bool(every) and step > 0 and step % every == 0


def _eval_line(
    run: Run, step: int, result: Evaluation, routes: np.ndarray
) -> dict[str, Any]:
    kept = []
    if step > run.config.train.eval_every:
        pairs = zip(jnp.asarray(routes), jnp.asarray(result.routes), strict=True)
        kept = [float(routing.stability(before, after)) for before, after in pairs]
    return {
        "event": "eval",
        "step": step,
        "tokens": step * run.tokens_per_step,
        "val_loss": result.val_loss,
        **_unquantized(result),
        "val_ppl": result.val_ppl,
        "val_bits_per_byte": result.val_bits_per_byte,
        "tile_usage": result.tile_usage,
        "routing_entropy": result.entropy,
        "routing_stability": kept,
        "dead_tiles": result.dead_tiles,
    }


def _unquantized(result: Evaluation) -> dict[str, float]:
    """The loss of the weights that training computes with, where they are others."""
    value = result.val_loss_unquantized
    return {} if value is None else {"val_loss_unquantized": value}
