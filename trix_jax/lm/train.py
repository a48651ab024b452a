"""The training loop: prepare, resume, step, evaluate, save."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trix_jax import routing
from trix_jax.lm import metrics, parallel
from trix_jax.lm.accounting import costs
from trix_jax.lm.config import RunConfig, TrainConfig, fingerprint, resolve
from trix_jax.lm.data import train_batches
from trix_jax.lm.evaluate import Evaluation, evaluate
from trix_jax.lm.optimizer import make_optimizer
from trix_jax.lm.progress import Progress, StepLog
from trix_jax.lm.rundir import (
    Position,
    Resume,
    Run,
    open_data,
    restore,
    resume_step,
    save,
    settle,
)
from trix_jax.lm.signals import Interrupted, Signals
from trix_jax.lm.step import TrainState, make_train_step
from trix_jax.nn.transformer import TransformerConfig, TransformerLM


def train(
    config: RunConfig,
    workdir: str | Path,
    *,
    resume: Resume = "auto",
    reference: TransformerConfig | None = None,
    devices: Sequence[jax.Device] | None = None,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Trains a run in `workdir`, or goes on with the one that is there, and returns its summary.

    Args:
        config: what to train.
        workdir: the run directory.
        resume: "auto" goes on where a run left off, "never" refuses a directory that holds one, "must" an empty one.
        reference: the model whose parameters a "match-params" dense width matches; None takes the hierarchical FFN.
        devices: what to train on, `jax.pmap` over several; None takes all of this process.
        report: takes one-line messages.

    Raises:
        ValueError: bad input: a config, corpus or directory that does not do.
        Interrupted: SIGTERM or SIGINT, after saving.
        Diverged: a non-finite loss or gradient; the last checkpoint is kept.
    """
    workdir = Path(workdir)
    step = resume_step(workdir, resume, report)
    store = open_data(config, workdir, report)
    reference = reference or dataclasses.replace(
        config.model, ffn="hierarchical", ffn_width=None
    )
    config = resolve(config, reference, store.tokenizer.vocab_size)
    devices = list(devices or jax.local_devices())
    parallel.check_batch(config.train.batch_size, config.train.accumulate, devices)
    settle(config, workdir, store, devices, is_new=step is None)
    model, optimizer = TransformerLM(config.model), make_optimizer(config.train)
    run = Run(config, workdir, store, model, optimizer, devices)
    position = restore(run, step, report)
    with (
        metrics.MetricsFile(workdir / "metrics.jsonl", position.step) as log,
        Progress(config.train.steps, position.step, report) as progress,
        Signals() as signals,
    ):
        seconds = _loop(run, position, log, progress, signals)
    return _summarize(run, seconds)


def _loop(
    run: Run,
    position: Position,
    log: metrics.MetricsFile,
    progress: Progress,
    signals: Signals,
) -> float:
    """Steps to the end; the metrics of a step are fetched after the next one is under way. Returns seconds trained."""
    train_config, model = run.config.train, run.model
    began = time.perf_counter() - position.seconds
    routes, best = position.routes, position.best
    step_fn = _compiled_step(model.config, train_config, tuple(run.devices))
    state = parallel.place(position.state, run.devices)
    batches = train_batches(
        run.store.train,
        batch_size=train_config.batch_size,
        context=run.config.model.context,
        seed=run.config.seed,
        start_step=position.step,
    )
    logger = StepLog(run, log, progress)
    shape = (train_config.accumulate, -1, model.config.context + 1)
    for step in range(position.step + 1, train_config.steps + 1):
        if _is_multiple(step - 1, train_config.rebuild_every):
            state = _rebuild_clusters(state, run.devices)
        state, values = step_fn(state, next(batches).reshape(shape))
        logger.after(step, values)
        is_last = step == train_config.steps
        wants_eval = is_last or _is_multiple(step, train_config.eval_every)
        wants_save = wants_eval or _is_multiple(step, train_config.checkpoint_every)
        if not (wants_save or signals.caught):
            continue
        logger.flush()
        whole = parallel.fetch(state, run.devices)
        val_loss = None
        if wants_eval:
            result = _evaluate(run, step, whole)
            log.write(**_eval_line(run, step, result, routes))
            progress.evaluation(step, result)
            routes, val_loss, best = (
                result.routes,
                result.val_loss,
                min(best, result.val_loss),
            )
        seconds = time.perf_counter() - began
        meta = {"val_loss": val_loss, "best_val_loss": best, "seconds": seconds}
        save(run, step, whole, routes, meta)
        logger.restart_clock()
        if signals.caught and not is_last:
            raise Interrupted(
                f"stopped by {signals.caught} after step {step}, saved. "
                "The same command goes on."
            )
    return time.perf_counter() - began


@lru_cache(maxsize=4)
def _compiled_step(
    model: TransformerConfig, config: TrainConfig, devices: tuple[jax.Device, ...]
) -> Callable:
    """The step, compiled once for runs of the same model and settings in a process."""
    optimizer = make_optimizer(config)
    make_step = partial(make_train_step, TransformerLM(model), optimizer, config)
    return parallel.compile_step(make_step, devices)


def _evaluate(run: Run, step: int, state: TrainState) -> Evaluation:
    variables = {"params": state.params}
    if state.routing:
        variables["routing"] = state.routing
    config = run.config.train
    progress = step / config.steps
    return evaluate(run.model, variables, run.store, config.eval_batch_size, progress)


def _is_multiple(step: int, every: int) -> bool:
    return bool(every) and step > 0 and step % every == 0


def _rebuild_clusters(state: TrainState, devices) -> TrainState:
    if not state.routing:
        return state
    whole = parallel.fetch(state, devices)
    rebuilt = jax.tree.map(np.asarray, routing.rebuild_clusters(whole.routing))
    return parallel.place(whole._replace(routing=rebuilt), devices)


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
        "val_ppl": result.val_ppl,
        "val_bits_per_byte": result.val_bits_per_byte,
        "tile_usage": result.tile_usage,
        "routing_entropy": result.entropy,
        "routing_stability": kept,
        "dead_tiles": result.dead_tiles,
    }


def _summarize(run: Run, seconds: float) -> dict[str, Any]:
    """Writes and returns `summary.json`, from the lines of metrics.jsonl."""
    evals = [
        line
        for line in metrics.read(run.workdir / "metrics.jsonl")
        if line["event"] == "eval"
    ]
    best, last = min(evals, key=lambda line: line["val_loss"]), evals[-1]
    counted = costs(run.model.config)
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
        "params": counted._asdict(),
        "routing": [
            {
                "entropy": entropy,
                "max_load": max(usage) * len(usage),
                "dead_tiles": dead,
            }
            for entropy, usage, dead in zip(
                last["routing_entropy"],
                last["tile_usage"],
                last["dead_tiles"],
                strict=True,
            )
        ],
        "min_entropy_share": min(
            (
                e / math.log(len(u))
                for line in evals
                for e, u in zip(
                    line["routing_entropy"], line["tile_usage"], strict=True
                )
            ),
            default=None,
        ),
        "max_dead_tiles": max(
            (d for line in evals for d in line["dead_tiles"]), default=None
        ),
        "config_sha256": fingerprint(run.config),
        "git_commit": metrics.git_commit(),
    }
    metrics.write_json(run.workdir / "summary.json", summary)
    return summary
