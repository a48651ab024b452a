"""Runs side by side: a process each, in a slot each.

A schedule says which runs may start now, given the results so far: of a grid all of
them, of a sweep the next ones. A run whose process dies starts again from its
checkpoint, `retries` times; one that diverges is a result. What a run does is
`trix-jax train`; clusters get the same runs by a job file
(`trix_jax.lm.experiment.job_files`).

Workers that share a folder of runs and a results file share the work: a run under way
is locked, also while only its process is left.
"""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any, Literal

from trix_jax.lm.experiment import results
from trix_jax.lm.experiment.directory import claim, is_diverged, last_lines, progress
from trix_jax.lm.experiment.results import Result
from trix_jax.lm.experiment.slots import Slot, prelude
from trix_jax.lm.experiment.spec import Spec, command
from trix_jax.lm.signals import (
    BAD_INPUT,
    DONE,
    FAILED,
    INTERRUPTED,
    Interrupted,
    Signals,
)

POLL_SECONDS = 0.5
PROGRAM = "import sys; from MODULE import main; sys.exit(main())"
TRIX_JAX = "trix_jax.cli.main"

State = Literal["waiting", "running", "done", "diverged", "failed", "stopped"]
Rows = list[dict[str, Any]]
Schedule = Callable[[Sequence[Result]], Iterable[Spec]]


class _Status:
    """A run while the worker is at it."""

    def __init__(self, spec: Spec, folder: Path):
        self.spec, self.folder = spec, folder
        self.state: State = "waiting"
        self.restarts = 0
        self.process: subprocess.Popen | None = None
        self.hold: IO[str] | None = None
        self.slot: Slot | None = None
        self.why = ""

    @property
    def directory(self) -> Path:
        return self.folder / self.spec.name


def grid(specs: Sequence[Spec]) -> Schedule:
    """The schedule of a grid: all of them."""
    return lambda _: specs


def run_all(
    schedule: Schedule,
    folder: Path,
    path: Path,
    slots: Sequence[Slot],
    retries: int,
    show: Callable[[Rows], None],
    hours: float = math.inf,
) -> Rows:
    """Runs what the schedule asks for, until it asks for nothing that no other worker
    is at; returns a row for every run it asked for.

    Args:
        schedule: its runs may be done; these are passed over.
        folder: of the run directories.
        path: the results file.
        show: takes the rows twice a second.
        hours: after which no run starts.

    Raises:
        Interrupted: SIGTERM or SIGINT, after every run has saved.
    """
    statuses: dict[str, _Status] = {}
    free, end = list(slots), time.monotonic() + 3600 * hours
    with Signals() as signals:
        while True:
            if signals.caught:
                _stop(statuses.values(), path)
                show([_row(s) for s in statuses.values()])
                what = f"stopped by {signals.caught}; every run has saved."
                raise Interrupted(f"{what} The same command goes on.")
            for status in statuses.values():
                if status.state == "running":
                    _reap(status, path, free, retries)
            if free:
                room = free if time.monotonic() < end else []
                _start_more(schedule, statuses, folder, path, room)
            rows = [_row(s) for s in statuses.values()]
            show(rows)
            if all(row["state"] != "running" for row in rows):
                return rows
            time.sleep(POLL_SECONDS)


def _start_more(
    schedule: Schedule,
    statuses: dict[str, _Status],
    folder: Path,
    path: Path,
    free: list[Slot],
) -> None:
    """Starts what may start and is not done, while there is room."""
    done = results.read(path)
    finished = {result.name: result for result in done}
    for spec in schedule(done):
        status = statuses.setdefault(spec.name, _Status(spec, folder))
        if status.state == "waiting" and spec.name not in finished and free:
            hold = claim(status.directory)
            if hold is None:
                status.why = "another worker is at it"
            elif any(result.name == spec.name for result in results.read(path)):
                hold.close()  # who held it a moment ago has finished it
            else:
                _start(status, free.pop(0), hold)
    for name, status in statuses.items():
        if status.state == "waiting" and name in finished:
            status.why = ""
            _note_end(status, finished[name])


def _start(status: _Status, slot: Slot, hold: IO[str]) -> None:
    module = status.spec.patch[0] if status.spec.patch else TRIX_JAX
    code = prelude(slot) + PROGRAM.replace("MODULE", module)
    status.why = status.why if status.process else ""
    with (status.directory / "log.txt").open("a") as log:
        status.process = subprocess.Popen(
            [sys.executable, "-c", code, *command(status.spec, status.folder)],
            env=os.environ | slot.env,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            pass_fds=[hold.fileno()],  # a run that outlives us is still locked
            start_new_session=True,  # Ctrl-C reaches us, and we ask each to save once
        )
    status.state, status.slot, status.hold = "running", slot, hold


def _reap(status: _Status, path: Path, free: list[Slot], retries: int) -> None:
    assert status.process
    assert status.slot
    code = status.process.poll()
    if code is None:
        return
    free.append(status.slot)
    status.slot = None
    if code == DONE or (code == FAILED and is_diverged(status.directory)):
        _finish(status, path)
    elif code != INTERRUPTED and (code == BAD_INPUT or status.restarts >= retries):
        status.state, status.why = "failed", _why(code, status.directory)
    else:
        status.restarts += code != INTERRUPTED  # who saved and stopped may go on
        status.state, status.why = "waiting", _why(code, status.directory)
    _release(status)


def _finish(status: _Status, path: Path) -> None:
    """Adds the result of a run whose process has come to its end."""
    try:
        result = results.result_of(status.spec, status.folder)
    except ValueError as error:
        status.state, status.why = "failed", str(error)
        return
    results.add(path, result, status.folder)
    _note_end(status, result)


def _note_end(status: _Status, result: Result) -> None:
    status.state = "done" if result.is_finite else "diverged"


def _release(status: _Status) -> None:
    if status.hold:
        status.hold.close()
        status.hold = None


def _stop(statuses: Iterable[_Status], path: Path) -> None:
    running = [s for s in statuses if s.state == "running"]
    processes = [s.process for s in running if s.process]
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for status, process in zip(running, processes, strict=True):
        if process.wait() == DONE:
            _finish(status, path)
        else:
            status.state = "stopped"
        _release(status)


def _why(code: int, directory: Path) -> str:
    """Exit code, or signal, and the last line of the log."""
    ended = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    lines = last_lines(directory)
    return f"{ended}: {lines[-1][:200]}" if lines else ended


def _row(status: _Status) -> dict[str, Any]:
    spec = status.spec
    return {
        "name": spec.name,
        "size": spec.size,
        "arm": spec.arm,
        "seed": spec.seed,
        "state": status.state,
        "steps": spec.steps,
        "restarts": status.restarts,
        "slot": status.slot.name if status.slot else "",
        "why": status.why,
        **progress(status.directory)._asdict(),
    }
