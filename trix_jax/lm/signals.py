"""Stopping politely: the first SIGTERM or SIGINT is noted for the loop to save, a
second one, of either kind, acts as usual. And what a process's exit code says.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

# Exit codes of `trix-jax`: done; the run failed; bad usage or input; interrupted after
# saving, so that the same command goes on.
DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 75


class Interrupted(BaseException):
    """A signal ended the run, whose state is on the disk; the same command goes on.

    No Exception, as KeyboardInterrupt is none: it comes at any moment, and what handles
    errors must not take it for one.
    """


class Signals:
    """While it is open, `caught` names the first SIGTERM or SIGINT, or is empty."""

    def __init__(self):
        self.caught = ""
        self._before: dict[int, Any] = {}
        self._state = ""

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                before = signal.signal(number, self._note)
                # None: a handler that is not Python's, such as jax.distributed's.
                self._before[number] = signal.SIG_DFL if before is None else before
        return self

    def __exit__(self, *_):
        self._restore()

    @contextlib.contextmanager
    def at_once(self, state: str) -> Iterator[None]:
        """Inside, a signal raises Interrupted: for what leaves nothing half done when
        it stops.

        Args:
            state: goes into the message: where the run is and what is on the disk.
        """
        self._state = state
        try:
            yield
        finally:
            self._state = ""

    def _note(self, number, _frame):
        self.caught = signal.Signals(number).name
        self._restore()
        if self._state:
            raise Interrupted(
                f"stopped by {self.caught} {self._state}. The same command goes on."
            )

    def _restore(self):
        for number, handler in self._before.items():
            signal.signal(number, handler)
