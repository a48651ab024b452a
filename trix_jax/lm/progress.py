"""What a run says while it goes: metrics of every step to a file, a live bar or plain lines to people."""

import sys
import time
from collections.abc import Callable
from typing import Any

import jax
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from trix_jax.lm import metrics
from trix_jax.lm.rundir import Run
from trix_jax.lm.step import Metrics

SECONDS_BETWEEN_LINES = 15.0


class Progress:
    """Shows steps as they go by and evaluations as they come."""

    def __init__(self, steps: int, start: int, report: Callable[[str], None]):
        self._steps, self._report, self._last = steps, report, time.monotonic()
        self._bar = None
        if sys.stdout.isatty():
            columns = (
                "{task.description}",
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self._bar = Bar(*columns, TimeRemainingColumn(), transient=True)
            self._task = self._bar.add_task(
                "train", total=steps, completed=start, text=""
            )

    def __enter__(self):
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_):
        if self._bar:
            self._bar.stop()

    def step(self, line: dict[str, Any]) -> None:
        """Takes the metrics of a step."""
        text = f"loss {line['loss']:.3f}  {line['tokens_per_second']:,.0f} tokens/s"
        if self._bar:
            self._bar.update(self._task, completed=line["step"], text=text)
        elif time.monotonic() - self._last > SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            self._report(f"step {line['step']}/{self._steps}  {text}")

    def evaluation(self, step: int, result: Any) -> None:
        """Takes the result of an evaluation."""
        routing = (
            f"  entropy {min(result.entropy):.2f} nats, {sum(result.dead_tiles)} dead tiles"
            if result.entropy
            else ""
        )
        text = f"step {step}/{self._steps}  validation loss {result.val_loss:.4f}, perplexity {result.val_ppl:.3f}{routing}"
        self._last = time.monotonic()
        if self._bar:
            self._bar.console.print(text)
        else:
            self._report(text)


class Diverged(ArithmeticError):
    """Loss or gradient stopped being finite."""


class StepLog:
    """Writes the metrics of a step once the next one has been dispatched, so that the device never waits for the host."""

    def __init__(self, run: Run, log: metrics.MetricsFile, progress: Progress):
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
