"""Stopping politely: the first SIGTERM or SIGINT is noted for the loop to save, a
second one, of either kind, acts as usual. And what a process's exit code says.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any, ClassVar

# Exit codes of `trix-jax`: done; the run failed; bad usage or input; interrupted after
# saving, so that the same command goes on.
DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 75
PIPE_CLOSED = 128 + 13  # as a process that SIGPIPE ends


class Interrupted(BaseException):
    """A signal ended the run, whose state is on the disk; the same command goes on.

    No Exception, as KeyboardInterrupt is none: it comes at any moment, and what handles
    errors must not take it for one.

    Attributes:
        by: the name of the signal, "SIGPIPE" for a pipe that its reader closed.
    """

    def __init__(self, message: str, by: str = ""):
        super().__init__(message)
        self.by = by


class Signals:
    """While it is open, `caught` names the first SIGTERM or SIGINT, or is empty. A signal
    that the process was started to ignore, as `nohup` and `&` do, stays ignored.
    """

    _open: ClassVar[list["Signals"]] = []

    def __init__(self):
        self.caught = ""
        self._before: dict[int, Any] = {}
        self._state = ""

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) is signal.SIG_IGN:
                    continue
                before = signal.signal(number, self._note)
                # None: a handler that is not Python's, such as jax.distributed's.
                self._before[number] = signal.SIG_DFL if before is None else before
        self._open.append(self)
        return self

    def __exit__(self, *_):
        self._open.remove(self)
        self._restore()

    @classmethod
    def stop(cls, name: str) -> bool:
        """As if a signal of this name had come; False if nobody waits for one."""
        if cls._open:
            cls._open[-1]._catch(name)
        return bool(cls._open)

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
        self._restore()
        self._catch(signal.Signals(number).name)

    def _catch(self, name: str) -> None:
        self.caught = name
        if self._state:
            raise Interrupted(
                f"stopped by {name} {self._state}. The same command goes on.", name
            )

    def _restore(self):
        for number, handler in self._before.items():
            signal.signal(number, handler)
