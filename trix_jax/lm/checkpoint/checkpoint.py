"""Checkpoints: Orbax arrays under a sha256 manifest, published by one rename.

    checkpoints/00001000/            one step: an Orbax checkpoint, which `orbax.checkpoint.v1.load` also reads, plus
        state/, ...                  what Orbax writes
        leaves.json                  path -> dtype[shape] of every leaf, so that a mismatch can be told in words
        meta.json                    the caller's JSON: val_loss, position, data fingerprint, ...
        manifest.json                format, step, and size and sha256 of every other file
    checkpoints/.tmp-PID*            a step being written or removed; the next save clears those of dead processes
    checkpoints/.old-00001000        the former step while it is replaced: readers use it if 00001000 is not there
    checkpoints/damaged-00001000     moved aside by `set_aside`

Orbax has no content checksums: it restores a flipped bit without a word, hence the
manifest. Arrays are stored as numpy (typed PRNG keys as their key data, zero-sized
arrays, which Orbax refuses, as None), but for those of which devices have parts: Orbax
gets them as they lie, writes them part by part, and notes where they lay. That note is
not read here: `restore` puts each leaf where the template says, whatever a step was
trained on. A plain `load` of such a step needs as many devices, or told places. This is
the only module that imports orbax, and only when it is used: the import takes a second.
One process writes a directory at a time.
"""

import contextlib
import itertools
import json
import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from trix_jax.files import read_json, sync
from trix_jax.lm import hosts
from trix_jax.lm.checkpoint import arrays, step_files
from trix_jax.lm.checkpoint.step_files import steps as steps
from trix_jax.lm.checkpoint.step_files import verify as verify

Report = Callable[[str], None]


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or not of the expected kind.

    A ValueError, since what the caller named is at fault; a disk that fails while
    saving is an OSError instead.
    """


def _print(message: str) -> None:
    print(message, file=sys.stderr)


def save(
    directory: Path,
    step: int,
    state: Any,
    meta: dict[str, Any],
    *,
    keep: int = 2,
    hold: Collection[int] = (),
) -> Path:
    """Writes a step, waits until it is on the disk, then removes the steps that are no
    longer needed.

    Several processes call it together, each with the whole state but for the parts of
    arrays that are elsewhere; the folder must be one for all of them. The newest `keep` good steps, the best one, those of `hold` and
    this one stay. A step that exists is replaced.

    Args:
        directory: the `checkpoints` folder of a run; made if missing.
        step: optimizer steps done, from 0.
        state: pytree of jax and numpy arrays, typed PRNG keys and Python numbers; None
            means absent.
        meta: what JSON can hold; a finite `val_loss` takes part in the choice of the
            best step, where no later one has another `data_fingerprint` or `val_tokens`.
        keep: at least 1.
        hold: numbers of steps that stay.

    Returns:
        The folder of the step.

    Raises:
        OSError: the disk did not take it; earlier steps are as they were and nothing
            partial is left.
        TypeError, ValueError: an argument cannot be saved.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"{step=} must be at least 0 and {keep=} at least 1.")
    stored, described = arrays.to_stored(state)
    notes = {"meta.json": _to_json(meta), "leaves.json": _to_json(described)}
    final = directory / f"{step:08d}"
    temporary = directory / f".tmp-{hosts.from_first(os.getpid())}"
    try:
        if hosts.is_first():
            directory.mkdir(parents=True, exist_ok=True)
            step_files.tidy(directory)
            _check_space(directory, stored)
        try:
            if hosts.is_first():
                temporary.mkdir()
            hosts.wait_for_all("the folder of a step is made")
            _write_arrays(temporary / "step", stored)
            if hosts.is_first():
                _write_notes(temporary / "step", step, notes)
                step_files.publish(temporary / "step", final)
        finally:
            if hosts.is_first():
                step_files.clear(temporary)
    except Exception as error:
        place = f"Step {step} could not be saved in {directory}"
        raise OSError(
            f"{place} (earlier steps are as they were): {_reason(error)}"
        ) from error
    if hosts.is_first():
        _prune(directory, {step, *hold}, keep)
    hosts.wait_for_all("a step is saved")
    return final


def newest_good(
    directory: Path, *, report: Report = _print, up_to: int | None = None
) -> int | None:
    """The newest undamaged step, of those up to number `up_to`, or None; `report` gets a
    sentence for each damaged one that was passed over.
    """
    there = [s for s in steps(directory) if up_to is None or s <= up_to]
    return next(_good(directory, reversed(there), report), None)


def resolve(directory: Path, which: str | int, *, report: Report = _print) -> int:
    """The step meant by "latest", "best" (lowest finite val_loss on the data of the
    newest that has one, the earlier of equals) or a number.

    Raises:
        CheckpointError: there is none, or the named step is missing or damaged.
        ValueError: `which` is something else.
    """
    wanted = "good step"
    if which == "latest":
        step = newest_good(directory, report=report)
    elif which == "best":
        wanted = "good step with a finite val_loss"
        step = next(_good(directory, _by_loss(directory), report), None)
    elif isinstance(which, int) or which.isdecimal():
        step = int(which)
        _good_path(directory, step)
    else:
        raise ValueError(f"{which=} must be 'latest', 'best' or a step number.")
    if step is None:
        there = steps(directory) or "none at all"
        raise CheckpointError(f"{directory} has no {wanted}; its steps: {there}.")
    return step


def restore(directory: Path, step: int, template: Any) -> tuple[Any, dict[str, Any]]:
    """Verifies a step and returns `(state, meta)`; `state` has the structure and kinds
    of leaf of `template`.

    A jax leaf that is committed to devices, or a ShapeDtypeStruct with a sharding, says
    where its array goes; other jax leaves come back uncommitted on the default device,
    numpy leaves as numpy, Python numbers as such.

    Raises:
        CheckpointError: the step is missing or damaged, or its tree, shapes or dtypes
            are not the template's.
    """
    path = _good_path(directory, step)
    named, treedef = jax.tree_util.tree_flatten_with_path(template)
    expected = {arrays.name_of(key): arrays.describe(leaf) for key, leaf in named}
    found = read_json(path / "leaves.json")
    if lines := arrays.difference(expected, found):
        diff = "\n  ".join(lines)
        raise CheckpointError(f"{path} is not a checkpoint of this model:\n  {diff}")
    kinds = treedef.unflatten(map(arrays.kind_of, expected.values()))
    values = treedef.flatten_up_to(_load(path, kinds))
    pairs = zip(named, values, strict=True)
    try:
        placed = [arrays.place(leaf, value) for (_, leaf), value in pairs]
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be restored: {error}") from error
    return treedef.unflatten(placed), read_json(path / "meta.json")


def restore_arrays(
    directory: Path, step: int, subtree: tuple[str, ...] | None = None
) -> dict[str, Any]:
    """Verifies a step and returns its state as nested dicts of numpy arrays, without a
    template.

    Args:
        directory: the `checkpoints` folder of a run.
        step: a step in it.
        subtree: top-level names of the state, such as ("params", "routing"), which are
            then the keys of the result; nothing else is read, and a name without leaves
            gives {}. Their containers must be dicts. None: everything; a tuple's items
            are under "0", "1", ..., typed keys are key data.

    Raises:
        CheckpointError: the step is missing or damaged, or has none of the names.
    """
    path = _good_path(directory, step)
    described = read_json(path / "leaves.json")
    names = sorted({name.split("/")[0] for name in described})
    if subtree is not None and not set(subtree) & set(names):
        raise CheckpointError(f"{path} has none of {subtree}; its state has {names}.")
    if subtree is not None:
        described = {
            n: text for n, text in described.items() if n.split("/")[0] in subtree
        }
    kinds = {name: arrays.kind_of(text) for name, text in described.items()}
    loaded = _load(path, None if subtree is None else arrays.nest(kinds), partial=True)
    values = jax.tree_util.tree_flatten_with_path(loaded)[0]
    found = {arrays.name_of(key): np.asarray(value) for key, value in values}
    empty = {
        name: arrays.empty(described[name]) for name in described if kinds[name] is None
    }
    nothing: dict[str, Any] = {name: {} for name in subtree or ()}
    return nothing | arrays.nest({name: (empty | found)[name] for name in described})


def read_meta(directory: Path, step: int) -> dict[str, Any]:
    """The caller's notes on a step, as they stand there: `restore` and `restore_arrays`
    verify them.
    """
    return read_json(step_files.step_path(directory, step) / "meta.json")


def read_leaves(directory: Path, step: int) -> dict[str, str]:
    """Type and shape of every leaf of a step by its path, as they stand there."""
    return read_json(step_files.step_path(directory, step) / "leaves.json")


def fingerprint(directory: Path, step: int) -> str:
    """sha256 of a step: of its manifest, which has that of every file."""
    return read_json(step_files.step_path(directory, step) / "manifest.json")["sha256"]


def clear(directory: Path, *, keep: int = 2, hold: Collection[int] = ()) -> None:
    """Does what a `save` that was killed could not: removes its leavings, and steps no
    longer needed.
    """
    step_files.tidy(directory)
    if len(there := steps(directory)) > keep:
        _prune(directory, {there[-1], *hold}, keep)


def set_aside(directory: Path, step: int) -> Path:
    """Renames a damaged step so that nobody takes it for a step again, and returns its
    new path.
    """
    first = directory / f"damaged-{step:08d}"
    others = (first.with_name(f"{first.name}-{k}") for k in itertools.count(1))
    target = next(p for p in itertools.chain([first], others) if not p.exists())
    step_files.step_path(directory, step).rename(target)
    sync(directory)
    return target


# Files and folders.


def _good_path(directory: Path, step: int) -> Path:
    path = step_files.step_path(directory, step)
    if not path.exists():
        there = steps(directory) or "none"
        raise CheckpointError(f"{directory} has no step {step}; its steps: {there}.")
    if fault := verify(path):
        raise CheckpointError(f"{path} is damaged: {fault}")
    return path


def _good(directory: Path, among: Iterable[int], report: Report) -> Iterator[int]:
    for step in among:
        if fault := verify(step_files.step_path(directory, step)):
            report(f"Step {step} in {directory} is passed over: {fault}")
        else:
            yield step


def _by_loss(directory: Path) -> list[int]:
    """The steps with a finite val_loss, the best first. Losses on two data sets, or on
    other tokens of one, are not compared: those on the newest one's come before the rest.
    """
    found = []
    for step in steps(directory):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            meta = read_meta(directory, step)
            if math.isfinite(loss := float(meta["val_loss"])):
                data = meta.get("data_fingerprint"), meta.get("val_tokens")
                found.append((loss, step, data))
    present = found[-1][2] if found else None
    ordered = sorted(found, key=lambda one: (one[2] != present, one[:2]))
    return [step for _, step, _ in ordered]


def _check_space(directory: Path, stored: Any) -> None:
    """Says no beforehand: on a full disk TensorStore prints a traceback for every
    array.
    """
    needed = sum(map(arrays.nbytes, jax.tree.leaves(stored)))
    if (free := shutil.disk_usage(directory).free) < needed:
        raise OSError(f"it needs {needed} bytes and the disk has {free} left")


def _write_arrays(path: Path, stored: Any) -> None:
    with _orbax() as ocp:
        context = ocp.Context()
        # Else an error before the first file is raised only after a time-out of five
        # minutes.
        context.asynchronous.create_directories_asynchronously = False
        with context:
            ocp.save(path.absolute(), stored)


def _write_notes(path: Path, step: int, notes: dict[str, str]) -> None:
    for name, text in notes.items():
        (path / name).write_text(text)
    step_files.write_manifest(path, step)


def _prune(directory: Path, hold: Collection[int], keep: int) -> None:
    """Removes what is older than the newest `keep` good steps, but for the best step
    and those to hold.
    """

    def quiet(_):
        return None

    good = _good(directory, reversed(steps(directory)), quiet)
    newest = list(itertools.islice(good, keep))
    best = next(_good(directory, _by_loss(directory), quiet), None)
    for step in steps(directory) if len(newest) == keep else ():
        if step < newest[-1] and step not in (*hold, best):
            step_files.discard(step_files.step_path(directory, step))


def _to_json(value: dict[str, Any]) -> str:
    try:
        return json.dumps(value, indent=1)
    except (TypeError, ValueError) as error:
        raise TypeError(f"meta must be what JSON can hold: {error}.") from error


def _reason(error: Exception) -> str:
    """The first line of a message, or what the system said if that is buried in one of
    TensorStore's.
    """
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(code[1])) if code else str(error).partition("\n")[0]


# Orbax.


@contextlib.contextmanager
def _orbax() -> Iterator[Any]:
    """The `orbax.checkpoint.v1` module, its logging off: before it raises, it prints
    the traceback of a thread.
    """
    from orbax.checkpoint import v1

    logger = logging.getLogger("absl")
    before, logger.disabled = logger.disabled, True
    try:
        yield v1
    finally:
        logger.disabled = before


def _load(path: Path, kinds: Any, *, partial: bool = False) -> Any:
    try:
        with _orbax() as ocp:
            context = ocp.Context()
            context.pytree.loading.partial_load = partial and kinds is not None
            with context:
                if kinds is None:
                    kinds = arrays.kinds_in(ocp.metadata(path.absolute()).metadata)
                return ocp.load(path.absolute(), kinds)
    except Exception as error:
        raise CheckpointError(f"Orbax cannot read {path}: {_reason(error)}") from error
