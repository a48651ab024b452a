"""A trace of a few training steps, for xprof: what the device did, and when."""

from pathlib import Path
from typing import Any

import jax

WARM_UP = 2  # steps of a process that are not traced: the first ones compile


class StepTrace:
    """Traces `steps` steps of a process into a folder; 0 traces none.

        xprof --logdir RUN/trace        (pip install xprof)

    A context: a trace that is under way when the run ends is written.
    """

    def __init__(self, folder: Path, start_step: int, steps: int):
        self._folder = folder
        self._first = start_step + 1 + WARM_UP
        self._last = self._first + steps - 1 if steps else -1
        self._is_on = False

    def __enter__(self) -> "StepTrace":
        return self

    def before(self, step: int) -> None:
        """Starts at the first step that is traced."""
        if self._first == step <= self._last:
            jax.profiler.start_trace(str(self._folder))
            self._is_on = True

    def after(self, step: int, values: Any) -> None:
        """Stops behind the last, once the device has done it."""
        if self._is_on and step == self._last:
            jax.block_until_ready(values)
            self._stop()

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._is_on:
            self._is_on = False
            jax.profiler.stop_trace()
