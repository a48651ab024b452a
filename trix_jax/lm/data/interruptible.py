"""Long calls of a library that signals may end."""

import concurrent.futures
import threading
from collections.abc import Callable


def interruptible[Result](action: Callable[[], Result]) -> Result:
    """Runs what is deaf to signals, a library's long call, in a thread of its own, so
    that a handler may raise meanwhile; the thread then ends with the process.
    """
    if threading.current_thread() is not threading.main_thread():
        return action()
    future: concurrent.futures.Future[Result] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    while True:
        if concurrent.futures.wait([future], timeout=0.1).done:
            return future.result()
