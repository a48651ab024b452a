"""The parts in a process of their own: what ends it, or never ends, costs one part.

An illegal address leaves a CUDA context that answers nothing more, a barrier that nobody
reaches waits for ever, and a failed check in LLVM ends the process. Then the part has its
error in the file and a new process goes on with the others.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.speed.gpu import record
from experiments.speed.gpu.parts import PARTS
from trix_jax.lm.signals import BAD_INPUT, DONE, FAILED

LIMIT = 3  # times its seconds, after which a part is ended
START = 120  # seconds that a process may take to begin with its first part
TOO_FEW_MINUTES = 3
ENDED_BY_ITSELF = DONE, FAILED, BAD_INPUT, TOO_FEW_MINUTES
Command = Callable[[Sequence[str], float], list[str]]


def watched(
    parts: Sequence[str], path: Path, minutes: float, command: Command | None = None
) -> int:
    """Measures the parts into `path` in other processes, and returns the exit code.

    Args:
        command: the process that measures some parts in so many minutes.
    """
    command, began = command or _command(path), time.monotonic()
    if (line := record.unfinished(path)) is not None:
        record.append(path, _closed(line))  # of a watch that was ended itself
    before, left, failed = len(record.read(path)), list(parts), False
    while left:
        spent = (time.monotonic() - began) / 60
        code, why = _ended(command(left, minutes - spent), path)
        if code in ENDED_BY_ITSELF:
            return FAILED if failed and code != BAD_INPUT else code
        failed, line = True, record.unfinished(path)
        if line is None:
            print(f"The process {why} between parts.", file=sys.stderr)
            return FAILED
        record.append(path, _closed(line) | {"error": f"the process {why}"})
        print(f"{line['part']}: FAILED, the process {why}", flush=True)
        tried = {line["part"] for line in record.read(path)[before:]}
        left = [name for name in left if name not in tried]
    return FAILED if failed else DONE


def _command(path: Path) -> Command:
    def command(parts: Sequence[str], minutes: float) -> list[str]:
        here = [sys.executable, "-m", "experiments.speed.gpu", "--here"]
        how = ["--output", str(path.parent), "--minutes", str(max(minutes, 0.01))]
        return [*here, *how, "--parts", *parts]

    return command


def _closed(line: record.Line) -> record.Line:
    """An unfinished line that stays."""
    return {k: v for k, v in line.items() if k not in ("unfinished", "started")}


def _ended(command: list[str], path: Path) -> tuple[int, str]:
    """Waits for a process; its exit code, and how it ended in words."""
    # A stopped watch takes the process with it.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    began, process = time.time(), subprocess.Popen(command)
    try:
        while process.poll() is None:
            time.sleep(0.2)
            part = record.unfinished(path)
            start = max(began, part["started"] if part else 0)
            allowed = LIMIT * PARTS[part["part"]].seconds if part else START
            if time.time() - start > allowed:
                process.kill()
                process.wait()
                return process.returncode, f"was ended after {allowed} s"
    finally:
        process.kill()
        process.wait()
        signal.signal(signal.SIGTERM, before)
    return process.returncode, f"ended with {process.returncode}"
