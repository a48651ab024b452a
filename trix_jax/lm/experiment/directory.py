"""What a run's directory says of its run, also while another process is at it."""

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from trix_jax.files import read_json
from trix_jax.lm.experiment.spec import Spec

TAIL_BYTES = 65_536
# A run that diverged says so, in these words, and stops.
DIVERGED = ("is not finite", "stopped")
LAST_LINES = 5  # of a log: after its last words Python may have some


class Progress(NamedTuple):
    """How far a run is, from the end of its metrics."""

    step: int = 0
    loss: float | None = None
    val_loss: float | None = None
    tokens_per_second: float | None = None


def is_done(spec: Spec, folder: Path) -> bool:
    """Whether a run has come to its last step, its report included."""
    directory = folder / spec.name
    try:
        summary = read_json(directory / "summary.json")
    except (OSError, ValueError):
        return False
    return summary["steps"] == spec.steps and (directory / "REPORT.md").is_file()


def has_ended(spec: Spec, folder: Path) -> bool:
    """Whether a run is a result: it is done, or it diverged."""
    return is_done(spec, folder) or is_diverged(folder / spec.name)


def is_diverged(directory: Path) -> bool:
    """Whether the last thing a run said is that it stopped because it diverged."""
    if (directory / "summary.json").exists():
        return False
    ends = last_lines(directory)[-LAST_LINES:]
    return any(all(word in line for word in DIVERGED) for line in ends)


def last_lines(directory: Path) -> list[str]:
    """A run's log without empty lines; nothing without a log."""
    path = directory / "log.txt"
    lines = path.read_text(errors="replace").split("\n") if path.exists() else []
    return [line for line in lines if line.strip()]


def progress(directory: Path) -> Progress:
    """Reads the end of `metrics.jsonl`."""
    found: dict[str, Any] = {}
    try:
        with (directory / "metrics.jsonl").open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().splitlines()[1 if size > TAIL_BYTES else 0 :]
    except OSError:
        return Progress()
    for line in lines:
        try:
            found |= json.loads(line)
        except ValueError:
            continue  # being written
    names = ("loss", "val_loss", "tokens_per_second")
    return Progress(found.get("step", 0), *(found.get(name) for name in names))


def claim(directory: Path) -> IO[str] | None:
    """An open file that keeps other workers from a run until it is closed, even by
    SIGKILL; None if another one has it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    file = (directory / "lock").open("w", encoding="utf-8")
    if _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
        return file
    file.close()
    return None


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Keeps others who would hold this file waiting, until the end or a SIGKILL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        _lock(file, fcntl.LOCK_EX)
        yield


def _lock(file: IO[str], how: int) -> bool:
    """Whether nobody else has it; where the file system knows no locks nobody has."""
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    return True
