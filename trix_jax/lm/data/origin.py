"""The files that a store was made from: name, size and sha256 of each, in its manifest
under `sources`, so that a corpus that changed is told from one that did not.

`{"complete": true, "files": [{"name", "bytes", "sha256"}, ...]}`, in the order in which
they were read; not complete where `max_bytes` ended the reading before the last. Stores
made before have no such note, and nothing to compare.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from trix_jax.files import file_sha256

NAMED = 3  # files that a message names


class Opened:
    """Notes the files of one reading.

    Attributes:
        files: size and time of each when it was opened.
        complete: whether the reading came to the end.
    """

    def __init__(self):
        self.files: dict[Path, tuple[int, int]] = {}
        self.complete = False

    def noting(self, files: Iterable[Path]) -> Iterator[Path]:
        """Yields the files, noting each."""
        for file in files:
            self.files[file] = _state(file)
            yield file
        self.complete = True


def note(opened: Opened, path: Path) -> dict[str, Any]:
    """What the manifest of a store says of its files.

    Raises:
        ValueError: one of them changed since it was opened.
    """
    files = []
    for file, state in opened.files.items():
        if state != (-1, -1) and state != _state(file):
            raise ValueError(f"{file} changed while it was read; prepare it again.")
        if state != (-1, -1):
            files.append(_entry(file, path))
    return {"complete": opened.complete, "files": files}


def changes(noted: dict[str, Any], path: Path, files: Iterable[Path]) -> list[str]:
    """What is another file now than a manifest noted, a few words each."""
    before = {entry["name"]: entry for entry in noted["files"]}
    now: dict[str, Path] = {}
    for file in files:
        if not noted["complete"] and len(now) == len(before):
            break  # the store holds nothing of what comes behind
        if _state(file) != (-1, -1):
            now[_name(file, path)] = file
    found = [_gone(name, path) for name in before if name not in now]
    found += [f"{name} is new" for name in now if name not in before]
    for name in before.keys() & now.keys():
        size, sha256 = (before[name][key] for key in ("bytes", "sha256"))
        if _state(now[name])[0] != size or file_sha256(now[name]) != sha256:
            found.append(f"{name} changed")
    return sorted(found)


def _gone(name: str, path: Path) -> str:
    """A file that is there may be of another side now."""
    return f"{name} is {'not taken any more' if (path / name).exists() else 'gone'}"


def in_words(found: list[str]) -> str:
    """The first few changes, and how many more there are."""
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return ", ".join(found[:NAMED]) + more


def _entry(file: Path, path: Path) -> dict[str, Any]:
    size = file.stat().st_size
    return {"name": _name(file, path), "bytes": size, "sha256": file_sha256(file)}


def _name(file: Path, path: Path) -> str:
    """Without the folders of this machine."""
    if file == path:
        return file.name
    if file.is_relative_to(path):
        return file.relative_to(path).as_posix()
    return "/".join(file.parts[-3:])


def _state(file: Path) -> tuple[int, int]:
    """Size and time of a file, (-1, -1) where it cannot be looked at."""
    try:
        found = os.stat(file)
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns
