"""The run directory's small files: `metrics.jsonl`, `summary.json`, `env.json`, and
what is measured for them.
"""

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from trix_jax.files import write_whole, writing

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class MetricsFile:
    """`metrics.jsonl`: an object a line, flushed at once.

    On resume the lines behind the restored step are dropped, so that the file reads as
    if nothing had happened; that of an evaluation which is still owed too.
    """

    def __init__(self, path: Path, step: int, is_owed: bool = False):
        there = read(path) if path.exists() else []
        kept = [line for line in there if line["step"] <= step]
        if is_owed:
            own = (step, "eval")
            kept = [line for line in kept if (line["step"], line["event"]) != own]
        write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._path, self._file = path, path.open("a", encoding="utf-8")

    def write(self, **values: Any) -> None:
        with writing(self._path):
            self._file.write(json.dumps(values, allow_nan=False) + "\n")
            self._file.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with writing(self._path):  # a line that did not fit is still in its buffer
            self._file.close()


class NoFile:
    """A metrics file of a process that is not the one that writes."""

    def write(self, **values: Any) -> None:
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def open_log(
    workdir: Path, step: int, is_first: bool, is_owed: bool = False
) -> MetricsFile | NoFile:
    """The run's `metrics.jsonl`, for the process that writes it."""
    path = workdir / "metrics.jsonl"
    return MetricsFile(path, step, is_owed) if is_first else NoFile()


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a metrics file; a last line that a crash cut short is left out.

    Raises:
        ValueError: another line is not JSON.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines) and not line.endswith("\n"):
                return
            raise ValueError(f"{path} line {number} is not JSON: {error}.") from error


def environment(devices) -> dict[str, Any]:
    """Versions and devices, without anything that names this machine or its folders."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        "devices": [device.device_kind for device in devices],
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "git_commit": git_commit(),
    }


def git_commit() -> str | None:
    """The commit of the checkout that this package runs from, with `+` where it has
    been changed; None elsewhere, and where there is no git.
    """
    root = Path(__file__).parents[3]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    git = ["git", "-C", str(root)]
    commit = subprocess.run(
        [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    changed = subprocess.run(
        [*git, "status", "--porcelain", "-uno"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    return (commit + "+" * bool(changed.strip())) or None


def memory_bytes(device: jax.Device) -> int:
    """Peak bytes in use on the device, or the largest resident size of this process on
    CPU.
    """
    stats = device.memory_stats()
    if stats:
        return int(stats.get("peak_bytes_in_use", stats.get("bytes_in_use", 0)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def bits(value: float | None) -> str:
    """Bits per byte for a table."""
    return "not known" if value is None else f"{value:.4f}"


def in_words(value: float | None) -> str:
    """Bits per byte for a sentence."""
    if value is None:
        return "bits per byte not known (the tokens came without a tokenizer)"
    return f"{value:.4f} bits per byte"
