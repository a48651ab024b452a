"""Which files are training and which validation."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path


def apart(
    train: Iterable[Path],
    val: Iterable[Path],
    path: Path,
    val_path: Path,
    report: Callable[[str], None],
) -> list[Path]:
    """The training files of `path` without those of a `val_path` inside of it; says how
    many these are.

    Raises:
        ValueError: The two share a file otherwise, be it through a link, or nothing is
            left to train on.
    """
    train, own = list(train), {os.path.realpath(file) for file in val}
    left = [file for file in train if os.path.realpath(file) not in own]
    shared = sorted({*train} - {*left})
    if shared and not (left and _is_inside(val_path, path)):
        raise ValueError(
            f"val_path={str(val_path)!r} must hold other files than path={str(path)!r}, "
            f"or be a part of it, which is then no training. Both hold {shared[0]}."
        )
    if shared:
        report(f"{len(shared)} file(s) of path are those of val_path: no training")
    return left


def _is_inside(inner: Path, outer: Path) -> bool:
    """Also where a link inside leads out again."""
    is_there = inner.resolve().is_relative_to(outer.resolve())
    return is_there or inner.absolute().is_relative_to(outer.absolute())
