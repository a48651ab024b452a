"""Which files are training and which validation.

The name of a file, or of a folder before it, may say so by a word: `val-00000.parquet`,
`fineweb_val_000000.bin`, `validation/a.jsonl`. What says "test" is neither. The words are
those of Hugging Face's `datasets`. Of token files the word is enough (`token_files.py`).
Texts have titles, such as `the_test_of_time.txt`: their words count beside a name in the
same folder that says "train" and has all the other words, suffixes and numbers aside. So
is what Hugging Face adds to a shard's name: `-00000-of-00001`, and once a hash behind it.

References:
    https://huggingface.co/docs/datasets/repository_structure
"""

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

TRAIN = {"train", "training"}
VAL = {"val", "valid", "validation", "dev"}
TEST = {"test", "testing", "eval", "evaluation"}
FORMATS = {"txt", "jsonl", "ndjson", "json", "parquet", "gz", "zst"}
SHARD = re.compile(r"-\d{5}-of-\d{5}(-[0-9a-f]{16})?(?![0-9a-z])")


class Named(NamedTuple):
    """The texts of a folder by what their names say.

    Attributes:
        train: those that are training.
        val, test: those that say so, beside training.
        doubtful: of `train` those that say validation or test beside no training.
    """

    train: list[Path]
    val: list[Path]
    test: list[Path]
    doubtful: list[Path]


def words(name: str) -> set[str]:
    """The words of a name, or of a path, in small letters; which shard it is is none."""
    return {*re.split(r"[^a-z]+", SHARD.sub("", name.lower()))} - {""}


def by_name(files: list[Path], folder: Path) -> Named:
    """Divides the texts of a folder."""
    places = {place for file in files for place in _places(file, folder)}
    beside: dict[Path, list[set[str]]] = {}
    for place in places:
        if TRAIN & (found := words(place.name)):
            beside.setdefault(place.parent, []).append(found)
    sides = Named([], [], [], [])
    for file in files:
        said = [_said(place, beside) for place in _places(file, folder)]
        side = next((said for said in said if said in ("val", "test")), "train")
        getattr(sides, side).append(file)
        if side == "train" and "doubtful" in said:
            sides.doubtful.append(file)
    return sides


def _places(file: Path, folder: Path) -> list[Path]:
    """A file and the folders before it, the outermost first."""
    return [*reversed([p for p in (file, *file.parents) if folder in p.parents])]


def _said(place: Path, beside: dict[Path, list[set[str]]]) -> str:
    """The side that a file or a folder says by its name, if it says one."""
    found = words(place.name)
    if TRAIN & found or not (VAL | TEST) & found:
        return ""
    rest = found - VAL - TEST - FORMATS
    if not any(rest <= training for training in beside.get(place.parent, ())):
        return "doubtful"
    return "val" if VAL & found else "test"


def tell(
    named: Named,
    val: Iterable[Path] | None,
    folder: Path,
    report: Callable[[str], None],
) -> None:
    """Says which files are no training by their names.

    Args:
        val: A validation set from elsewhere; None: that of the names is taken.
    """
    passed = [*named.test]
    if val is not None:
        passed = sorted({*named.val, *named.test} - {*val})
    elif named.val:
        _tell("are validation by their names", named.val, folder, report)
    _tell("are passed over, test or validation by their names", passed, folder, report)
    _tell(
        "are training although their names say test or validation, because none beside "
        "them of such a name says train",
        named.doubtful,
        folder,
        report,
    )


def _tell(
    what: str, files: list[Path], folder: Path, report: Callable[[str], None]
) -> None:
    if files:
        first = files[0].relative_to(folder)
        report(f"{len(files)} file(s) {what}, the first {first}")


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
