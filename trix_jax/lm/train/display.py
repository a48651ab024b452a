"""What a run says to people while it goes: a live bar, or plain lines."""

import sys
import time
from collections.abc import Callable
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

SECONDS_BETWEEN_LINES = 15.0


class Display:
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
