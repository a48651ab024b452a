"""What a run says to people while it goes: what it is, then a live bar or plain lines, ten
at least, each beginning `step N`.
"""

import sys
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

SECONDS_BETWEEN_LINES = 15.0
LINES = 10  # of a whole run, at least
RECENT = 50  # steps whose mean loss stands beside an evaluation


class Pace:
    """How fast steps go, without the first one, which compiles, and without what comes
    between steps.
    """

    def __init__(self) -> None:
        self.steps, self.seconds = 0, 0.0
        self._is_first, self._clock = True, time.monotonic()

    def step(self) -> None:
        """A step is done."""
        now = time.monotonic()
        if not self._is_first:
            self.steps, self.seconds = self.steps + 1, self.seconds + now - self._clock
        self._is_first, self._clock = False, now

    def restart(self) -> None:
        """Something else was done: an evaluation, a checkpoint."""
        self._clock = time.monotonic()

    @property
    def since(self) -> float:
        """Seconds since the last step, or what was done since."""
        return time.monotonic() - self._clock

    @property
    def per_step(self) -> float | None:
        """Seconds; None before two steps are done."""
        return self.seconds / self.steps if self.steps else None


class Display:
    """Shows steps as they go by and evaluations as they come.

    Args:
        evaluated: the steps after which evaluations are due, in order.
    """

    def __init__(
        self,
        steps: int,
        start: int,
        report: Callable[[str], None],
        evaluated: Sequence[int] = (),
    ):
        self._steps, self._report = steps, report
        self._evaluated, self._evaluations = evaluated, list[float]()
        self._began = self._last = time.monotonic()
        self._pace, self._losses = Pace(), deque[float](maxlen=RECENT)
        self._bar = None
        if sys.stdout.isatty():
            columns = (
                "{task.description}",
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self._bar = Bar(*columns, transient=True)
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
        step, is_first = line["step"], not self._losses
        self._pace.step()
        self._losses.append(line["loss"])
        text = self._step_text(line)
        if self._bar:
            self._bar.update(self._task, completed=step, text=text)
            return
        is_tenth = step % max(1, self._steps // LINES) == 0
        is_late = time.monotonic() - self._last > SECONDS_BETWEEN_LINES
        if is_first or is_tenth or is_late:
            self._last = time.monotonic()
            self._report(f"step {step}/{self._steps}  {text}")

    def _step_text(self, line: dict[str, Any]) -> str:
        parts = [f"loss {line['loss']:.4f}", f"rate {line['lr']:.2e}"]
        if seconds := self._pace.per_step:
            step = line["step"]
            due = len(self._evaluated) - bisect_left(self._evaluated, step)
            left = seconds_left(self._steps - step, seconds, due, self._evaluations)
            parts.append(f"{line['tokens'] / line['step'] / seconds:,.0f} tokens/s")
            parts.append(f"{clock(time.monotonic() - self._began)} elapsed")
            parts.append(f"{clock(left)} left")
        return "  ".join(parts)

    def restart_clock(self) -> None:
        """What was done since the last step is none."""
        self._pace.restart()

    def evaluation(self, step: int, result: Any) -> None:
        """Takes the result of an evaluation."""
        self._evaluations.append(self._pace.since)
        text = f"step {step}/{self._steps}  validation loss {result.val_loss:.4f}"
        if self._losses:
            text += f" (training {fmean(self._losses):.4f})"
        text += f", perplexity {result.val_ppl:.3f}"
        if result.entropy:
            dead = sum(result.dead_tiles)
            text += f"  entropy {min(result.entropy):.2f} nats, {dead} dead tiles"
        if result.val_loss_unquantized is not None:
            text += f"  (unquantized {result.val_loss_unquantized:.4f})"
        self._last = time.monotonic()
        self.say(text)

    def say(self, text: str) -> None:
        """Takes a message."""
        if self._bar:
            self._bar.console.print(text)
        else:
            self._report(text)


def seconds_left(
    steps: int, per_step: float, due: int, evaluations: Sequence[float]
) -> float:
    """Computes `steps * per_step + due * mean(evaluations)`.

    Args:
        due: evaluations that are still to come.
        evaluations: seconds of those that were; before the first nobody knows.
    """
    return steps * per_step + due * (fmean(evaluations) if evaluations else 0.0)


def clock(seconds: float) -> str:
    """`m:ss`, or `h:mm:ss`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
