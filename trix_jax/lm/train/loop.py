"""The training loop: prepare, resume, step, evaluate, save.

A file called `checkpoint-now` in the run directory asks for a checkpoint after the next
step; it is removed once that is on the disk.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from trix_jax.lm import allocator, hosts
from trix_jax.lm.config import RunConfig, TrainConfig, resolve
from trix_jax.lm.data import check_context, train_batches
from trix_jax.lm.signals import Interrupted, Signals
from trix_jax.lm.train import extend, initial, metrics, milestone, parallel
from trix_jax.lm.train.display import Display
from trix_jax.lm.train.header import header
from trix_jax.lm.train.optimizer import make_optimizer
from trix_jax.lm.train.position import (
    Position,
    check_data,
    check_finished,
    data_since,
    restore,
)
from trix_jax.lm.train.run import (
    Report,
    Resume,
    Run,
    as_made,
    check_free,
    check_same,
    held,
    open_data,
    read_config,
    resume_step,
    settle,
)
from trix_jax.lm.train.step import make_train_step
from trix_jax.lm.train.step_log import StepLog
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
    init_from: str | None = None,
    other_data: bool = False,
    shard_state: bool = False,
    shard_tiles: int = 1,
    trace_steps: int = 0,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Trains a run in `workdir`, or goes on with the one that is there, and returns its
    summary. A run that is there may have had fewer steps (`trix_jax.lm.train.extend`).

    The process keeps the memory that it frees (`trix_jax.lm.allocator`).

    Args:
        config: what to train.
        workdir: the run directory.
        resume: "auto" goes on where a run left off, "never" refuses a directory that
            holds one, "must" an empty one.
        devices: what to train on, `jax.pmap` over several; None takes all,
            `jax.shard_map` over those of several processes.
        init_from: a run directory (its best step), a step's folder or an export of real
            weights that a new run takes its first weights from; a run begun so goes on
            without it.
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
    devices = list(devices or jax.devices())
    parallel.check_spread(config.model, shard_tiles, devices)
    if config.train.optimizer == "muon" and (shard_state or shard_tiles > 1):
        raise ValueError(
            "train.optimizer='muon' needs whole matrices: it does not go with "
            "shard_state or shard_tiles."
        )
    mapping = parallel.mapping_over(devices, shard_state, shard_tiles)
    start = Start(resume, init_from, other_data, devices, mapping)
    with Signals() as signals, contextlib.ExitStack() as lock:
        with signals.at_once(f"before its first step; nothing of {workdir} is lost"):
            run, position = _begin(config, workdir, start, lock, report)
        with (
            metrics.open_log(
                workdir, position.step, hosts.is_first(), position.is_owed
            ) as log,
            Display(
                run.config.train.steps,
                position.step,
                report,
                milestone.evaluated_steps(run),
            ) as display,
            StepTrace(workdir / "trace", position.step, trace_steps) as trace,
        ):
            seconds = _loop(run, position, log, display, signals, trace)
        hosts.wait_for_all("the last step is saved")
        return write_summary(run, seconds, position)


class Start(NamedTuple):
    """How a run starts, beside its config: see `train`."""

    resume: Resume
    init_from: str | None
    other_data: bool
    devices: list[jax.Device]
    mapping: parallel.Mapping


def _begin(
    config: RunConfig,
    workdir: Path,
    start: Start,
    lock: contextlib.ExitStack,
    report: Report,
) -> tuple[Run, Position]:
    """Everything before the first step. What is wrong is said before anything of a run
    that is there changes; `lock` keeps other processes out of it.
    """
    if hosts.is_first():
        lock.enter_context(held(workdir, report))
    step = _resume_step(config, workdir, start, report)
    is_new = step is None
    source = initial.find(start.init_from) if start.init_from and is_new else None
    hosts.check_same("what it starts from", source.sha256 if source else "00")
    run = _open(config, workdir, step, start, report)
    weights = initial.weights(source, run.config, run.store, report) if source else None
    if hosts.is_first():
        _settle(run, step, source, start.other_data, report)
    hosts.wait_for_all("the run directory is settled")
    record, since = initial.read_record(workdir), data_since(run, step)
    run = run._replace(init_from=record, data_since=since)
    return run, restore(run, step, report, weights)


def _resume_step(
    config: RunConfig, workdir: Path, start: Start, report: Report
) -> int | None:
    """The step to go on from, None for a new run. The first process looks, tells the
    others, and is the only one that moves anything.
    """
    step = None
    if hosts.is_first():
        step = resume_step(workdir, start.resume, report)
        initial.check_workdir(workdir, start.init_from, step)
        if step is None:
            check_free(workdir)
        before = read_config(workdir)
        if step is not None and before:
            step = extend.first_step(workdir, before, config.train.steps, step)
    step = hosts.from_first(-1 if step is None else step)
    return None if step < 0 else step


def _open(
    config: RunConfig, workdir: Path, step: int | None, start: Start, report: Report
) -> Run:
    """Checks and prepares everything that stays the same from the first step on."""
    store = hosts.first_then_others(
        lambda: open_data(config, workdir, report, step is None, start.other_data),
        "the data is prepared",
    )
    hosts.check_same("the token store", store.fingerprint)
    before = read_config(workdir) if step is not None else None
    config = as_made(config, store)
    if before and config.arm == config.model.ffn:  # a label that nobody typed
        config = dataclasses.replace(config, arm=before.arm)
    vocabulary, end = store.tokenizer.vocab_size, store.tokenizer.eot
    config = resolve(config, vocabulary, before, end)
    for name, split in (("training", store.train), ("validation", store.val)):
        check_context(name, split, config.model.context)
    size, parts = config.train.batch_size, config.train.accumulate
    parallel.check_batch(size, parts, start.devices)
    model, optimizer = TransformerLM(config.model), make_optimizer(config.train)
    return Run(config, workdir, store, model, optimizer, start.devices, start.mapping)


def _settle(
    run: Run,
    step: int | None,
    source: initial.Source | None,
    other_data: bool,
    report: Report,
) -> None:
    """Writes the run's files, once what is there fits them; a run that gets more steps
    is extended.
    """
    if step is not None:
        check_same(run.config, run.workdir, run.store)
        if not other_data:
            check_data(run.workdir, step, run.store)
        check_finished(run, step)
        before, steps = read_config(run.workdir), run.config.train.steps
        if before and steps > before.train.steps:
            extend.extend(run.workdir, before, steps, step, report)
    if source:
        initial.write_record(run.workdir, source)
    settle(run, step)


def _loop(
    run: Run,
    position: Position,
    log: milestone.Log,
    display: Display,
    signals: Signals,
    trace: StepTrace,
) -> float:
    """Steps to the end; the metrics of a step are fetched after the next one is under
    way. Returns seconds trained.
    """
    config, devices, mapping = run.config.train, tuple(run.devices), run.mapping
    began = time.perf_counter() - position.seconds
    spread = mapping.tiles if isinstance(mapping, parallel.Spread) else 1
    lines = header(run.config, devices, run.workdir, position.step, spread)
    display.say("\n".join(lines))
    misses = _compiled_step.cache_info().misses
    step_fn = _compiled_step(run.config.model, config, devices, mapping)
    if _compiled_step.cache_info().misses > misses:
        display.say("compiling the training step")
    state = parallel.place(position.state, devices, mapping)
    batches, held = _batches(run, position.step), extend.held_steps(run.config)
    if position.is_owed:
        placed = position._replace(state=state)
        position = milestone.keep(run, placed, began, log, display)
    logger = StepLog(run, log, display, position.skipped)
    for step in range(position.step + 1, config.steps + 1):
        if milestone.is_multiple(step - 1, config.rebuild_every):
            state = parallel.rebuild_clusters(state, devices, mapping)
        trace.before(step)
        state, values = step_fn(state, next(batches))
        trace.after(step, values)
        logger.after(step, values)
        asked = _asked(run, step, signals)
        is_due = step in held or milestone.wants_checkpoint(run, step)
        if not (is_due or any(asked)):
            continue
        logger.flush()
        position = position._replace(step=step, state=state, skipped=logger.skipped)
        stops = _stops(asked, signals)
        position = milestone.keep(run, position, began, log, display, stops)
        logger.restart_clock()
        _answer(run, position, asked, signals, display)
    return time.perf_counter() - began


class Asked(NamedTuple):
    """What is asked of a run from outside, the same in all processes."""

    to_save: bool
    to_stop: bool


def _asked(run: Run, step: int, signals: Signals) -> Asked:
    is_time = step % hosts.AGREE_EVERY == 0
    is_there = (run.workdir / TRIGGER).exists()
    return Asked(*hosts.any_asks(is_time, is_there, bool(signals.caught)))


def _stops(asked: Asked, signals: Signals) -> bool:
    """Whether the run is to stop at a step at which all processes save."""
    (stops,) = hosts.any_asks(True, asked.to_stop or bool(signals.caught))
    return stops


def _answer(
    run: Run, position: Position, asked: Asked, signals: Signals, display: Display
) -> None:
    """Says that a step is saved, and stops if that is asked and anything is left to do.

    Raises:
        Interrupted: it stops.
    """
    step = position.step
    if asked.to_save:
        (run.workdir / TRIGGER).unlink(missing_ok=True)
        display.say(f"step {step} is saved, as {TRIGGER} asked")
    is_left = position.is_owed or step < run.config.train.steps
    if _stops(asked, signals) and is_left:
        raise Interrupted(
            f"stopped by {signals.caught or 'another process'} after step {step}, saved. "
            "The same command goes on.",
            signals.caught,
        )


def _batches(run: Run, start: int) -> Iterator[np.ndarray]:
    """`[accumulate, B, L + 1]` tokens for each step after `start`; other data than before
    is read from its first window on.
    """
    config, context = run.config.train, run.config.model.context
    batches = train_batches(
        run.store.train,
        batch_size=config.batch_size,
        context=context,
        seed=run.config.seed,
        start_step=start - run.data_since,
        sampler=config.sampler,
    )
    shape = (config.accumulate, -1, context + 1)
    return (batch.reshape(shape) for batch in batches)


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
