"""`measured.jsonl`: a line a part, written when it begins and anew with every row.

```
{"part": "layer", "shapes": "full", "device": "NVIDIA H100 80GB HBM3", "git_commit": ..., "finished": ..., "seconds": 51.2, "rows": [...]}
{"part": "step", ..., "error": "XlaRuntimeError: RESOURCE_EXHAUSTED ...", "traceback": "...", "rows_before_error": [...]}
```

A row whose check did not hold has `failed`, in words. The file is meant to be committed:
errors are written by `portable`, without paths of the machine.

A part that has not ended is `unfinished`: its line has the rows so far, and stays so if
the process is ended. What such a process left of a line is cut off by the next one.
"""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

from trix_jax.files import sync

NAME = "measured.jsonl"
ROOT = Path(__file__).parents[3]
# An absolute path of two names or more: in quotes, or up to what ends it in a message.
PATH = re.compile(
    r"""(?<=["'])/[^"'\n]*/[^"'\n]*"""
    r"""|(?<![\w.)\]}/"'])/[^\s/"'<>:,;()]+/[^\s"'<>:,;()]*"""
)
Line = dict[str, Any]


def read(path: Path) -> list[Line]:
    """The whole lines of a file; none if there is no file.

    Raises:
        ValueError: a line that is no JSON object with a part; the message names it.
    """
    if not path.exists():
        return []
    whole = _whole(path.read_bytes()).decode("utf-8")
    return [_parsed(path, i, text) for i, text in enumerate(whole.splitlines(), 1)]


def _parsed(path: Path, number: int, text: str) -> Line:
    try:
        line = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {number}, must be JSON. Got {text[:60]!r}."
        ) from error
    if not isinstance(line, dict) or "part" not in line:
        raise ValueError(
            f"{path}, line {number}, must name its part. Got {text[:60]!r}."
        )
    return line


def append(path: Path, line: Line) -> None:
    """Adds a line, in the place of an unfinished one of the same part that ends the file,
    its numbers that are not finite as null, and returns when it is on the disk.
    """
    text = json.dumps(_finite(line), allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    before = unfinished(path)
    with path.open("r+b" if path.exists() else "w+b") as file:
        kept = _whole(file.read())
        if before and before["part"] == line["part"]:
            kept = _whole(kept[:-1])
        end = len(kept)
        file.truncate(end)
        file.seek(end)
        file.write(text.encode("utf-8") + b"\n")
        file.flush()
        os.fsync(file.fileno())
    sync(path.parent)


def unfinished(path: Path) -> Line | None:
    """The line that ends the file, if its part has not ended."""
    lines = read(path)
    return lines[-1] if lines and lines[-1].get("unfinished") else None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _whole(data: bytes) -> bytes:
    """Up to the end of the last whole line."""
    return data[: data.rfind(b"\n") + 1]


def check(path: Path, lines: list[Line], about: dict[str, str]) -> None:
    """Raises a ValueError where a file holds what another device or other shapes gave."""
    for line in lines:
        for name, value in about.items():
            if line.get(name) != value:
                raise ValueError(
                    f"--output must name a folder without measurements of another {name}: {path} is "
                    f"of {line.get(name)!r}, this is {value!r}."
                )


def measured(lines: list[Line]) -> set[str]:
    """The parts whose last line has rows, and nothing that went wrong."""
    last = {line["part"]: line for line in lines}
    return {
        name for name, line in last.items() if "rows" in line and not failures(line)
    }


def rows(line: Line) -> list[dict[str, Any]]:
    """The rows of a part; of one that an error ended, those before it."""
    return line.get("rows", line.get("rows_before_error", []))


def failures(line: Line) -> list[str]:
    """What went wrong in a part: its error, and what of it was not equal."""
    unequal = [
        f"{row['name']}: {row['failed']}" for row in rows(line) if "failed" in row
    ]
    return [line["error"], *unequal] if "error" in line else unequal


def portable(text: str) -> str:
    """A message or traceback with paths relative to the repository; of a path outside
    of it the last name alone.
    """

    def shortened(match: re.Match[str]) -> str:
        path = Path(match[0])
        inside = path.is_relative_to(ROOT)
        return path.relative_to(ROOT).as_posix() if inside else path.name

    return PATH.sub(shortened, text)
