"""Stopping politely: the first SIGTERM or SIGINT is noted for the loop to save, a second one acts as usual."""

import signal
import threading
from typing import Any


class Interrupted(RuntimeError):
    """A signal ended the run after its state was saved; the same command goes on."""


class Signals:
    """While it is open, `caught` names the first SIGTERM or SIGINT, or is empty."""

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
