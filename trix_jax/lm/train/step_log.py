"""What a run writes of its steps, and when it stops: after more than
`train.max_skipped` in a row whose loss or gradient is not finite.

A step whose loss or gradient is not finite changes nothing (`trix_jax.lm.train.step`). Its
line in metrics.jsonl has the event "skipped" in place of "step", `loss` and `grad_norm`
(null where they are not finite), `in_a_row`, and `windows`: where the windows of its
batch start in the training tokens.
"""

import math
import time
from typing import Any

import jax

from trix_jax.lm.data import batch_windows
from trix_jax.lm.train import metrics
from trix_jax.lm.train.display import Display
from trix_jax.lm.train.run import Run
from trix_jax.lm.train.step import Metrics


class Diverged(ArithmeticError):
    """Losses or gradients stopped being finite."""


class StepLog:
    """Writes the metrics of a step once the next one has been dispatched, so that the
    device never waits for the host.

    Attributes:
        skipped: steps in a row, up to the last one, that were skipped.
    """

    def __init__(
        self,
        run: Run,
        log: metrics.MetricsFile | metrics.NoFile,
        display: Display,
        skipped: int,
    ):
        self._run, self._log, self._display = run, log, display
        self._pending: tuple[int, Metrics] | None = None
        self.skipped = skipped
        self.restart_clock()

    def restart_clock(self) -> None:
        """What was done since the last step is none."""
        self._clock = time.perf_counter()
        self._display.restart_clock()

    def after(self, step: int, values: Metrics) -> None:
        """Takes what a step returned, and writes the one before."""
        self.flush()
        self._pending = step, values

    def flush(self) -> None:
        """Writes what is pending.

        Raises:
            Diverged: one step more than `train.max_skipped` was skipped in a row.
        """
        if self._pending is None:
            return
        (step, values), self._pending = self._pending, None
        values = jax.device_get(values)
        line = {"step": step, "tokens": step * self._run.tokens_per_step}
        if values.finite:
            self.skipped = 0
            self._write(line, values)
        else:
            self.skipped += 1
            self._write_skipped(line, values)

    def _write(self, line: dict[str, Any], values: Metrics) -> None:
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        line = {
            "event": "step",
            **line,
            "loss": float(values.loss),
            "lr": float(values.learning_rate),
            "grad_norm": float(values.grad_norm),
            "tokens_per_second": self._run.tokens_per_step / seconds,
            "memory_bytes": metrics.memory_bytes(jax.local_devices()[0]),
            "routing_entropy": values.entropy.tolist(),
            "aux_balance": float(values.aux_balance),
            "aux_diversity": float(values.aux_diversity),
        }
        config = self._run.config.train
        if line["step"] % config.log_every == 0 or line["step"] == config.steps:
            self._log.write(**line)
        self._display.step(line)

    def _write_skipped(self, line: dict[str, Any], values: Metrics) -> None:
        self.restart_clock()
        run, config, step = self._run, self._run.config, line["step"]
        loss, norm = float(values.loss), float(values.grad_norm)
        windows = batch_windows(
            run.store.train,
            batch_size=config.train.batch_size,
            context=config.model.context,
            seed=config.seed,
            batch=step - 1 - run.data_since,
            sampler=config.train.sampler,
        )
        self._log.write(
            event="skipped",
            **line,
            loss=loss if math.isfinite(loss) else None,
            grad_norm=norm if math.isfinite(norm) else None,
            in_a_row=self.skipped,
            windows=windows,
        )
        what = f"loss ({loss}) or gradient norm ({norm}) is not finite at step {step}"
        if self.skipped > config.train.max_skipped:
            raise Diverged(
                f"{what}, after {self.skipped - 1} skipped in a row "
                f"(train.max_skipped={config.train.max_skipped}): stopped. The newest "
                "good checkpoint is as it was. A learning rate below "
                f"{config.train.learning_rate} may help."
            )
        self._display.say(
            f"{what}: skipped, nothing changed; its batch is in metrics.jsonl"
        )
