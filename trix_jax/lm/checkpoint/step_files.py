"""The folders and files of checkpoint steps: listed, hashed, put in place, cleared.
Knows no arrays.

`checkpoint.py` draws the layout. A folder appears and disappears by one rename, so
nobody ever sees half of one.
"""

import errno
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trix_jax.files import (
    file_sha256,
    is_another_process,
    json_sha256,
    read_json,
    sync,
)

FORMAT = 1
_STEP_NAME = re.compile(r"(?:\.old-)?(\d{8}|[1-9]\d{8,})")


def steps(directory: Path) -> list[int]:
    """The steps in `directory`, good or damaged, in ascending order."""
    names = (_STEP_NAME.fullmatch(path.name) for path in directory.glob("*"))
    return sorted({int(name[1]) for name in names if name})


def verify(step_dir: Path) -> str | None:
    """None if every file of the step is as it was saved, else a sentence that names the
    file and the reason.
    """
    try:
        manifest = read_json(step_dir / "manifest.json")
        digest, files = manifest.pop("sha256"), manifest["files"]
        if digest != json_sha256(manifest):
            return "manifest.json does not have the content it was saved with."
        if manifest["format"] != FORMAT:
            return f"manifest.json has format {manifest['format']}, not {FORMAT}."
        name = _STEP_NAME.fullmatch(step_dir.name)
        if name and int(name[1]) != manifest["step"]:
            return f"manifest.json is of step {manifest['step']}."
    except FileNotFoundError:
        return "manifest.json is missing."
    except Exception as error:  # it can hold anything
        return f"manifest.json cannot be read ({type(error).__name__}: {error})."
    there = dict(_files(step_dir))
    del there["manifest.json"]
    for name in sorted(files.keys() | there.keys()):
        if fault := _fault(there.get(name), files.get(name)):
            return f"{name} {fault}."
    return None


def step_path(directory: Path, step: int) -> Path:
    """The folder of a step, or the one it is replacing at this moment."""
    path = directory / f"{step:08d}"
    former = path.with_name(f".old-{path.name}")
    return former if former.exists() and not path.exists() else path


def write_manifest(path: Path, step: int) -> None:
    """Lists and hashes what is in the folder of a step, and waits until all of it is on
    the disk.
    """
    files = {
        name: {"size": file.stat().st_size, "sha256": file_sha256(file)}
        for name, file in _files(path)
    }
    manifest: dict[str, Any] = {"format": FORMAT, "step": step, "files": files}
    manifest["sha256"] = json_sha256(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for each in (*path.rglob("*"), path):
        sync(each)


def publish(new: Path, final: Path) -> None:
    """Puts a complete folder in the place of a step; at every moment the former one or
    the new one is found.
    """
    former = final.with_name(f".old-{final.name}")
    if final.exists():
        final.rename(former)
    new.rename(final)
    sync(final.parent)
    if former.exists():
        discard(former)


def tidy(directory: Path) -> None:
    """Clears what processes that died while saving have left."""
    for path in directory.glob(".tmp-*"):
        pid = re.match(r"\.tmp-(\d+)", path.name)
        if pid and not is_another_process(int(pid[1])):
            shutil.rmtree(path)
    for former in directory.glob(".old-*"):
        path = former.with_name(former.name.removeprefix(".old-"))
        if path.exists():
            discard(former)
        else:
            former.rename(path)


def move(directory: Path, step: int, target: Path) -> None:
    """Moves a step into another folder of checkpoints: by a rename, or to another disk by
    a copy that is complete before the step goes here. A step of its number there is
    replaced.
    """
    target.mkdir(parents=True, exist_ok=True)
    tidy(target)
    source, final = step_path(directory, step), target / f"{step:08d}"
    former = final.with_name(f".old-{final.name}")
    if final.exists():
        final.rename(former)
    try:
        source.rename(final)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        _copy(source, final)
        discard(source)
    if former.exists():
        discard(former)
    sync(target)
    sync(directory)


def _copy(source: Path, final: Path) -> None:
    new = final.with_name(f".tmp-{os.getpid()}-{final.name}")
    try:
        shutil.copytree(source, new)
        for path in (*new.rglob("*"), new):
            sync(path)
        new.rename(final)
    except BaseException:
        clear(new)
        raise


def discard(path: Path) -> None:
    """Removes a step in such a way that no moment shows half of one."""
    doomed = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def clear(folder: Path, looks: int = 20) -> None:
    """Removes a folder that threads of a failed save may still be writing to, and looks
    again for two seconds at most; what they write later goes with the next save
    (`tidy`).
    """
    for _ in range(looks):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    files = (path for path in folder.rglob("*") if not path.is_dir())
    return ((path.relative_to(folder).as_posix(), path) for path in files)


def _fault(path: Path | None, listed: Any) -> str | None:
    if path is None:
        return "is missing"
    if listed is None:
        return "is not in the manifest"
    try:
        if (size := path.stat().st_size) != listed["size"]:
            return f"has {size} bytes instead of {listed['size']}"
        same = file_sha256(path) == listed["sha256"]
        return None if same else "does not have the sha256 of the manifest"
    except OSError as error:
        return f"cannot be read ({error})"
