"""The training loop: prepare, resume, step, evaluate, save."""

import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import yaml

from trix_jax import routing
from trix_jax.lm import checkpoint, metrics, parallel
from trix_jax.lm.accounting import costs
from trix_jax.lm.config import RunConfig, TrainConfig, fingerprint, from_tree, read_yaml, resolve, to_tree
from trix_jax.lm.data import Store, is_store, open_store, prepare, train_batches
from trix_jax.lm.evaluate import ROUTES_KEPT, Evaluation, evaluate
from trix_jax.lm.optimizer import make_optimizer
from trix_jax.lm.progress import Progress
from trix_jax.lm.step import Metrics, TrainState, init_state, make_train_step
from trix_jax.nn.transformer import TransformerConfig, TransformerLM

Resume = Literal["auto", "never", "must"]


class Interrupted(RuntimeError):
    """A signal ended the run after its state was saved; the same command goes on."""


class Diverged(ArithmeticError):
    """Loss or gradient stopped being finite."""


class _Run(NamedTuple):
    """What stays the same from the first step to the last."""

    config: RunConfig
    workdir: Path
    store: Store
    model: TransformerLM
    optimizer: Any
    devices: list[jax.Device]

    @property
    def checkpoints(self) -> Path:
        return self.workdir / "checkpoints"

    @property
    def tokens_per_step(self) -> int:
        return self.config.train.batch_size * self.config.model.context


class _Position(NamedTuple):
    """Where a run is."""

    step: int
    state: TrainState
    routes: np.ndarray
    best: float
    seconds: float


def train(
    config: RunConfig,
    workdir: str | Path,
    *,
    resume: Resume = "auto",
    reference: TransformerConfig | None = None,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Trains a run in `workdir`, or goes on with the one that is there, and returns its summary.

    Args:
        config: what to train.
        workdir: the run directory.
        resume: "auto" goes on where a run left off, "never" refuses a directory that holds one, "must" an empty one.
        reference: the model whose parameters a "match-params" dense width matches; None takes the hierarchical FFN.
        report: takes one-line messages.

    Raises:
        ValueError: bad input: a config, corpus or directory that does not do.
        Interrupted: SIGTERM or SIGINT, after saving.
        Diverged: a non-finite loss or gradient; the last checkpoint is kept.
    """
    workdir = Path(workdir)
    step = _resume_step(workdir, resume, report)
    store = open_data(config, workdir, report)
    reference = reference or dataclasses.replace(config.model, ffn="hierarchical", ffn_width=None)
    config = resolve(config, reference, store.tokenizer.vocab_size)
    devices = jax.local_devices()
    parallel.check_batch(config.train.batch_size, config.train.accumulate, devices)
    _settle(config, workdir, store, devices, is_new=step is None)
    run = _Run(config, workdir, store, TransformerLM(config.model), make_optimizer(config.train), devices)
    position = _restore(run, step, report)
    log = metrics.MetricsFile(workdir / "metrics.jsonl", position.step)
    with Progress(config.train.steps, position.step, report) as progress, _Signals() as signals:
        seconds = _loop(run, position, log, progress, signals)
    log.close()
    return _summarize(run, seconds)


def _loop(run: _Run, position: _Position, log: metrics.MetricsFile, progress: Progress, signals: "_Signals") -> float:
    """Steps to the end; the metrics of a step are fetched after the next one is under way. Returns seconds trained."""
    train_config, model = run.config.train, run.model
    began = time.perf_counter() - position.seconds
    routes, best = position.routes, position.best
    make_step = partial(make_train_step, model, run.optimizer, train_config)
    step_fn = parallel.compile_step(make_step, run.devices)
    state = parallel.place(position.state, run.devices)
    batches = train_batches(
        run.store.train,
        batch_size=train_config.batch_size,
        context=run.config.model.context,
        seed=run.config.seed,
        start_step=position.step,
    )
    logger = _StepLog(run, log, progress)
    for step in range(position.step + 1, train_config.steps + 1):
        if _is_multiple(step - 1, train_config.rebuild_every) and model.config.ffn != "dense":
            state = _rebuild_clusters(state, run.devices)
        state, values = step_fn(state, next(batches).reshape(train_config.accumulate, -1, model.config.context + 1))
        logger.after(step, values)
        is_last = step == train_config.steps
        wants_eval = is_last or _is_multiple(step, train_config.eval_every)
        if not (wants_eval or _is_multiple(step, train_config.checkpoint_every) or signals.caught):
            continue
        logger.flush()
        whole = parallel.fetch(state, run.devices)
        val_loss = None
        if wants_eval:
            variables = {"params": whole.params, "routing": whole.routing} if whole.routing else {"params": whole.params}
            result = evaluate(model, variables, run.store, train_config.eval_batch_size, step / train_config.steps)
            log.write(**_eval_line(run, step, result, routes))
            progress.evaluation(step, result)
            routes, val_loss, best = result.routes, result.val_loss, min(best, result.val_loss)
        meta = {"val_loss": val_loss, "best_val_loss": best, "seconds": time.perf_counter() - began}
        _save(run, step, whole, routes, meta)
        logger.restart_clock()
        if signals.caught and not is_last:
            raise Interrupted(f"stopped by {signals.caught} after step {step}, saved. The same command goes on.")
    return time.perf_counter() - began


def _is_multiple(step: int, every: int) -> bool:
    return bool(every) and step > 0 and step % every == 0


def open_data(config: RunConfig, workdir: Path, report: Callable[[str], None] = print) -> Store:
    """The run's token store: the one at `data.path`, or `workdir/data`, prepared on first use."""
    if config.data.path and is_store(config.data.path):
        return open_store(config.data.path)
    return prepare(config.data, workdir / "data", report)


def _resume_step(workdir: Path, resume: Resume, report) -> int | None:
    """The step to go on from, None for a new run. Damaged newer steps are set aside, with a message."""
    checkpoints = workdir / "checkpoints"
    steps = checkpoint.steps(checkpoints) if checkpoints.is_dir() else []
    if resume == "never" and (steps or (workdir / "config.yaml").exists()):
        raise ValueError(f"resume='never' needs a workdir without a run. Got {workdir}, which holds one.")
    good = checkpoint.newest_good(checkpoints, report=lambda _: None) if steps else None
    if steps and good is None:
        reasons = " ".join(checkpoint.verify(checkpoints / f"{step:08d}") or "" for step in steps)
        raise ValueError(f"{workdir} has no good checkpoint to resume from, and a run is never restarted silently. {reasons}")
    for step in steps:
        if good is not None and step > good:
            reason = checkpoint.verify(checkpoints / f"{step:08d}")
            report(f"{reason} It is set aside as {checkpoint.set_aside(checkpoints, step).name}.")
    if resume == "must" and good is None:
        raise ValueError(f"resume='must' needs a workdir with a checkpoint. Got {workdir}, which has none.")
    return good


def _settle(config: RunConfig, workdir: Path, store: Store, devices, is_new: bool) -> None:
    """Writes the resolved config, the tokenizer and the environment; a run that is there must have the same config."""
    path = workdir / "config.yaml"
    if path.exists():
        before = from_tree(read_yaml(path))
        changed = sorted(_flat(to_tree(before)).items() ^ _flat(to_tree(config)).items())
        names = sorted({name for name, _ in changed} - {"data.path"})
        if names and not is_new:
            raise ValueError(
                f"{workdir} holds a run with other settings ({', '.join(names)}): use another workdir, or the same settings."
            )
    workdir.mkdir(parents=True, exist_ok=True)
    metrics.write_atomically(path, yaml.safe_dump(to_tree(config), sort_keys=False))
    store.tokenizer.save(workdir / "tokenizer.json")
    metrics.write_json(workdir / "env.json", metrics.environment(devices))


def _restore(run: _Run, step: int | None, report) -> _Position:
    state = init_state(run.model, run.optimizer, run.config.seed)
    routes = np.zeros(_routes_shape(run), np.uint16)
    if step is None:
        return _Position(0, state, routes, float("inf"), 0.0)
    tree, meta = checkpoint.restore(run.checkpoints, step, {**state._asdict(), "routes": routes})
    if meta["data_fingerprint"] != run.store.fingerprint:
        raise ValueError(f"{run.workdir} was trained on other data: its fingerprint is {meta['data_fingerprint'][:12]}.")
    routes = np.asarray(tree.pop("routes"))
    report(f"resuming {run.workdir} from step {step}")
    best = meta["best_val_loss"] if meta["best_val_loss"] is not None else float("inf")
    return _Position(step, TrainState(**tree), routes, best, meta["seconds"])


def _save(run: _Run, step: int, state: TrainState, routes: np.ndarray, meta: dict[str, Any]) -> None:
    if not np.isfinite(meta["best_val_loss"]):
        meta = {**meta, "best_val_loss": None}
    meta = {**meta, "data_fingerprint": run.store.fingerprint, "config_sha256": fingerprint(run.config)}
    checkpoint.save(run.checkpoints, step, {**state._asdict(), "routes": routes}, meta)


def _routes_shape(run: _Run) -> tuple[int, int, int]:
    model = run.model.config
    if model.ffn == "dense":
        return (0, min(ROUTES_KEPT, len(run.store.val) - 1), 1)
    return (model.n_layers, min(ROUTES_KEPT, len(run.store.val) - 1), model.tiles_per_token)


def _rebuild_clusters(state: TrainState, devices) -> TrainState:
    whole = parallel.fetch(state, devices)
    rebuilt = jax.tree.map(np.asarray, routing.rebuild_clusters(whole.routing))
    return parallel.place(whole._replace(routing=rebuilt), devices)


def _eval_line(run: _Run, step: int, result: Evaluation, routes: np.ndarray) -> dict[str, Any]:
    is_first = step <= run.config.train.eval_every
    kept = [] if is_first else [float(routing.stability(old, new)) for old, new in zip(routes, result.routes, strict=True)]
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


def _summarize(run: _Run, seconds: float) -> dict[str, Any]:
    """Writes and returns `summary.json`, from the lines of metrics.jsonl."""
    evals = [line for line in metrics.read(run.workdir / "metrics.jsonl") if line["event"] == "eval"]
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
            {"entropy": entropy, "max_load": max(usage) * len(usage), "dead_tiles": dead}
            for entropy, usage, dead in zip(last["routing_entropy"], last["tile_usage"], last["dead_tiles"], strict=True)
        ],
        "min_entropy_share": min(
            (e / math.log(len(u)) for line in evals for e, u in zip(line["routing_entropy"], line["tile_usage"], strict=True)),
            default=None,
        ),
        "max_dead_tiles": max((d for line in evals for d in line["dead_tiles"]), default=None),
        "config_sha256": fingerprint(run.config),
        "git_commit": metrics.git_commit(),
    }
    metrics.write_json(run.workdir / "summary.json", summary)
    return summary


class _StepLog:
    """Writes the metrics of a step once the next one has been dispatched, so that the device never waits for the host."""

    def __init__(self, run: _Run, log: metrics.MetricsFile, progress: Progress):
        self._run, self._log, self._progress = run, log, progress
        self._pending: tuple[int, Metrics] | None = None
        self.restart_clock()

    def restart_clock(self) -> None:
        self._clock = time.perf_counter()

    def after(self, step: int, values: Metrics) -> None:
        self.flush()
        self._pending = step, values

    def flush(self) -> None:
        if self._pending is None:
            return
        (step, values), self._pending = self._pending, None
        values = jax.device_get(values)
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        train_config = self._run.config.train
        line = {
            "event": "step",
            "step": step,
            "tokens": step * self._run.tokens_per_step,
            "loss": float(values.loss),
            "lr": float(values.learning_rate),
            "grad_norm": float(values.grad_norm),
            "tokens_per_second": self._run.tokens_per_step / seconds,
            "memory_bytes": metrics.memory_bytes(self._run.devices[0]),
            "routing_entropy": values.entropy.tolist(),
            "aux_balance": float(values.aux_balance),
            "aux_diversity": float(values.aux_diversity),
        }
        if not values.finite:
            raise Diverged(
                f"loss ({line['loss']}) or gradient norm ({line['grad_norm']}) is not finite at step {step}: stopped. The last "
                f"good checkpoint is kept. A learning rate below {train_config.learning_rate} may help."
            )
        if step % train_config.log_every == 0 or step == train_config.steps:
            self._log.write(**line)
        self._progress.step(line)


class _Signals:
    """Notes the first SIGTERM or SIGINT, for the loop to save and stop; a second one acts as usual."""

    def __init__(self):
        self.caught = ""
        self._before: dict[int, Any] = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, _frame):
        self.caught = signal.Signals(number).name
        signal.signal(number, self._before[number])


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
