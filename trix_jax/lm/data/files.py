"""Files of text: which there are, and what is in them.

Folders and files that are symbolic links are followed, each real folder once, so that a
cycle ends. Suffixes count in any case, and behind `.gz` or `.zst`, which are unpacked.
"""

import contextlib
import gzip
import io
import itertools
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

PACKED = (".gz", ".zst")
BYTE_ORDER_MARK = "\ufeff"  # at the start of a file; anywhere else it is text
# Suffixes by source, those of one group read together. In a folder a `.json` may
# describe the data: it is read only where no `.jsonl` is.
SUFFIXES = {
    "text": ((".txt",),),
    "jsonl": ((".jsonl", ".ndjson"), (".json",)),
    "parquet": ((".parquet",),),
}
TABLES = (".csv", ".tsv")  # as text they are one document, commas and all


def suffix_of(path: Path) -> str:
    """`.jsonl` for `A.JSONL.gz`."""
    packed = path.suffix.lower() in PACKED
    return (Path(path.stem) if packed else path).suffix.lower()


def walk(folder: Path) -> list[Path]:
    """All files under a folder and what it links to, sorted by path; a broken link is
    among them.
    """
    found, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        found += [Path(place, name) for name in names]
    return sorted(found)


def files_of(source: str, path: Path, report: Callable[[str], None]) -> list[Path]:
    """The files that a source reads: the one that is named, or those of a folder; says
    in one line what of the folder is passed over.

    Raises:
        ValueError: the folder has none.
    """
    if path.is_file():
        return [path]
    everything = walk(path)
    for group in SUFFIXES[source]:
        found = [p for p in everything if suffix_of(p) in group and p.is_file()]
        if found:
            tell_passed_over(source, path, sorted({*everything} - {*found}), report)
            return found
    suffixes = " or ".join(itertools.chain(*SUFFIXES[source]))
    raise ValueError(f"path={str(path)!r} is a folder without any {suffixes} file.")


def tell_passed_over(
    source: str, path: Path, passed: list[Path], report: Callable[[str], None]
) -> None:
    """Says how many files of which kind are not read, if any."""
    if passed:
        kinds = Counter(suffix_of(file) or "without a suffix" for file in passed)
        told = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))
        more = ", ..." if len(kinds) > 5 else ""
        report(
            f"skipped {len(passed)} file(s) that source={source} does not read "
            f"({told}{more}), the first {passed[0].relative_to(path)}"
        )


def read(file: Path) -> bytes:
    """All of a file, unpacked.

    Raises:
        ValueError: it is no such archive, or a damaged one.
    """
    with unpacked(file) as content:
        return content.read()


@contextlib.contextmanager
def unpacked(file: Path) -> Iterator[BinaryIO]:
    """Opens a file for reading; what is wrong with an archive is a ValueError."""
    with _open(file) as opened:
        try:
            yield opened
        except (OSError, EOFError, zlib.error) as error:
            if file.suffix.lower() not in PACKED:
                raise
            raise ValueError(
                f"{file} cannot be unpacked ({error}): it is damaged, or no {file.suffix} file."
            ) from error


def _open(file: Path) -> Any:
    match file.suffix.lower():
        case ".gz":
            return gzip.open(file, "rb")
        case ".zst":
            import pyarrow

            raw: Any = pyarrow.input_stream(str(file), compression="zstd")
            return io.BufferedReader(raw)
        case _:
            return file.open("rb")


def json_texts(file: Path) -> Iterator[str]:
    """Yields the "text" of each line, or of each entry of a `.json` file that is an
    array, where an entry may also be the text itself. Blank lines are passed over, and
    texts that are null, as those of a table are; anything else is an error with its
    number.
    """
    with unpacked(file) as lines:
        for where, entry in _entries(file, lines):
            try:
                value = json.loads(entry) if isinstance(entry, bytes) else entry
                is_text = isinstance(value, str) and not isinstance(entry, bytes)
                text = value if is_text else value["text"]
                if text is None:
                    continue
                text.encode()  # JSON can spell lone surrogates, which are not text
            except (
                ValueError,
                KeyError,
                TypeError,
                AttributeError,
                RecursionError,
            ) as error:
                raise ValueError(
                    f'{file}, {where}: must be a JSON object with a string "text" ({type(error).__name__}: {error}).'
                ) from error
            yield text


def _entries(file: Path, lines: BinaryIO) -> Iterator[tuple[str, Any]]:
    """Lines as bytes, or the values of an array, and where each is."""
    first = lines.readline().removeprefix(BYTE_ORDER_MARK.encode())
    number = 1
    while first and not first.strip():
        first, number = lines.readline(), number + 1
    if suffix_of(file) == ".json" and first.lstrip().startswith(b"["):
        try:
            values = json.loads(first + lines.read())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is not a JSON array ({error}).") from error
        yield from ((f"entry {i}", value) for i, value in enumerate(values, 1))
        return
    if first:
        yield f"line {number}", first
    rest = cast(Iterable[bytes], lines)
    for place, line in enumerate(rest, number + 1):
        if line.strip():
            yield f"line {place}", line
