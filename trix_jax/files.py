"""Files written whole or not at all, waited for, hashed, and where a cache of them lies.
Knows nothing of what is in them.
"""

import contextlib
import errno
import glob
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CACHE = "trix_jax"
# No permission, a read-only disk, a file where a folder should be.
PLACE_ERRORS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}


def write_whole(path: Path, data: bytes | str) -> None:
    """Writes a file whole or not at all: beside `path`, waited for, then renamed. Text
    is UTF-8.

    Raises:
        OSError: says which file could not be written, and why.
    """
    data = data.encode() if isinstance(data, str) else data
    building = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        _clear_left(path)
        try:
            with building.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(building, path)
            sync(path.parent)
        finally:
            building.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes an indented JSON file whole or not at all."""
    write_whole(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: it is not JSON; the message names the file.
    """
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error


@contextlib.contextmanager
def writing(what: object) -> Iterator[None]:
    """Inside, an error of the disk says what could not be written: a full disk's own
    names no file.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{what} could not be written: {reason}.") from error


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk. Some file systems
    (of networks, of other systems) cannot be asked about folders.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/trix_jax`, or `.cache/trix_jax` in the home folder. It may not be
    there yet.

    Raises:
        OSError: there is no home folder, as for a user number without an account.
    """
    if root := os.environ.get("XDG_CACHE_HOME"):
        return Path(root) / CACHE
    try:
        return Path.home() / ".cache" / CACHE
    except (RuntimeError, KeyError) as error:
        raise OSError(
            "there is no home folder to keep files in: set XDG_CACHE_HOME to a folder."
        ) from error


@contextlib.contextmanager
def needing_cache(folder: Path) -> Iterator[None]:
    """Inside, an error of the disk that is about the place says what to set."""
    try:
        yield
    except OSError as error:
        first = error.__cause__ if isinstance(error.__cause__, OSError) else error
        if first.errno not in PLACE_ERRORS:
            raise
        raise OSError(
            f"{folder} cannot be written ({first.strerror}): set XDG_CACHE_HOME to a "
            "folder that can."
        ) from error


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_sha256(value: Any, separators: tuple[str, str] | None = None) -> str:
    """sha256 of a value as JSON with sorted keys, in hexadecimal.

    Args:
        separators: as `json.dumps` takes them; part of what a format hashes.
    """
    text = json.dumps(value, sort_keys=True, separators=separators)
    return hashlib.sha256(text.encode()).hexdigest()


def is_another_process(pid: int) -> bool:
    """Whether a process of this number lives and is not this one."""
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return pid != os.getpid()


def _clear_left(path: Path) -> None:
    """Removes what processes that died while writing `path` have left beside it."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        owner = left.name.split(".")[-2]
        if owner.isdigit() and not is_another_process(int(owner)):
            left.unlink(missing_ok=True)
