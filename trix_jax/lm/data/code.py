"""Source files: of repositories by language and licence, and of The Stack v2.

`path` of the source `code` is a folder: one repository, or one that holds repositories;
or a text file with the path of a repository on each line. A folder holds repositories
if it has no known licence file and a folder in it has one; folders that are hidden or of
LEFT_OUT are none, which is said. Source files beside the repositories are read as well,
before them; where licences count, no licence covers them, which is said.

A repository's licence is read off its licence files by the words that only that licence
has; copyleft in any of them leaves it out.
"""

import concurrent.futures
import gzip
import hashlib
import os
import time
import urllib.error
import urllib.request
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from trix_jax.files import write_whole
from trix_jax.lm.data.datasets import Dataset
from trix_jax.lm.data.download import folder_of

LANGUAGES = {
    "python": ".py .pyi",
    "c": ".c .h",
    "cpp": ".cc .cpp .hpp .cu .cuh",
    "rust": ".rs",
    "go": ".go",
    "java": ".java",
    "kotlin": ".kt",
    "scala": ".scala",
    "javascript": ".js .jsx",
    "typescript": ".ts .tsx",
    "ruby": ".rb",
    "php": ".php",
    "swift": ".swift",
    "csharp": ".cs",
    "lua": ".lua",
    "r": ".r",
    "julia": ".jl",
    "haskell": ".hs",
    "ocaml": ".ml",
    "elixir": ".ex",
    "erlang": ".erl",
    "clojure": ".clj",
    "perl": ".pl",
    "shell": ".sh .bash",
    "sql": ".sql",
    "zig": ".zig",
}
LEFT_OUT = frozenset(
    "node_modules vendor vendored third_party site-packages dist-packages venv env build dist target __pycache__".split()
)
FILE_BYTES = 1_000_000  # larger ones are generated or data

# What only this licence says, lower case and single spaces. What is not here is not
# known to be permissive, and left out.
PERMISSIVE = {
    "Apache-2.0": "apache license version 2.0",
    "BSL-1.0": "boost software license - version 1.0",
    "PSF-2.0": "python software foundation license version 2",
    "Unlicense": "this is free and unencumbered software released into the public domain",
    "CC0-1.0": "cc0 1.0 universal",
    "Zlib": "this software is provided 'as-is', without any express or implied warranty",
    "ISC": "permission to use, copy, modify, and/or distribute this software for any purpose with or without fee",
    "MIT": "permission is hereby granted, free of charge, to any person obtaining a copy of this software",
    "BSD": "redistribution and use in source and binary forms, with or without modification, are permitted provided that",
}
COPYLEFT = ("gnu general public license", "gnu affero", "gnu lesser", "mozilla public")

CONTENTS = "https://softwareheritage.s3.amazonaws.com/content/"
CONTENT_JOBS = 32
TRIES = 3

Report = Callable[[str], None]


def code_files(
    path: Path, languages: str | None, licenses: str | None, report: Report
) -> Iterator[Path]:
    """Yields the source files of the repositories at `path`, those beside them first,
    then repository by repository, files by sorted path.

    Args:
        path: a folder or a list of folders.
        languages: names, separated by commas; None takes all that are known.
        licenses: "permissive" takes only repositories whose licence file says so; None
            all.
        report: is told how many repositories of which licence were taken, and how many
            links, large files, folders and files beside repositories were not.

    Raises:
        ValueError: no such folder or language, or no repository is left.
    """
    suffixes = suffixes_of(languages)
    repositories = _repositories(path, report)
    passed: list[Path] = []
    is_beside = path.is_dir() and repositories != [path]
    beside = [*_files(path, suffixes, passed, is_deep=False)] if is_beside else []
    if licenses == "permissive":
        repositories = _permissive(repositories, path, report)
        beside = _without_licence(beside, report)
    yield from beside
    for repository in repositories:
        yield from _files(repository, suffixes, passed)
    if passed:
        report(
            f"skipped {len(passed)} link(s) or file(s) over {FILE_BYTES:,} bytes, the "
            f"first {passed[0].name}"
        )


def suffixes_of(languages: str | None) -> frozenset[str]:
    """File suffixes of some languages.

    Raises:
        ValueError: one is not known.
    """
    names = [n.strip() for n in languages.split(",")] if languages else [*LANGUAGES]
    for name in names:
        if name not in LANGUAGES:
            raise ValueError(
                f"languages must be of {', '.join(LANGUAGES)}. Got {name!r}."
            )
    return frozenset(" ".join(LANGUAGES[name] for name in names).split())


def license_of(repository: Path) -> str | None:
    """The licence that a repository's own files state, the first by name that is known;
    None if there is none, or a file is about copyleft.
    """
    stated = []
    for file in sorted(repository.iterdir()):
        if not file.is_file() or not file.stem.upper().startswith(
            ("LICENSE", "LICENCE", "COPYING", "UNLICENSE")
        ):
            continue
        text = file.read_bytes()[:100_000].decode(errors="replace").lower()
        text = " ".join(text.replace("*", " ").replace("#", " ").split())
        found = [name for name, words in PERMISSIVE.items() if words in text]
        # Python's own licence speaks of the GPL, which it is compatible with.
        if any(w in text for w in COPYLEFT) and "PSF-2.0" not in found:
            return None
        stated += found[:1]
    return stated[0] if stated else None


def stack_documents(
    dataset: Dataset, shards: Iterable[Path], report: Report, cache: Path | None = None
) -> Iterator[str]:
    """Yields the texts of the rows of The Stack v2 that are permissive, neither vendored
    nor generated, and up to a megabyte: fetched from Software Heritage once, in
    parallel, checked by their sha1, kept compressed.

    Raises:
        ConnectionError: a content could not be fetched; the same command goes on.
        RuntimeError: a content is not what its sha1 says.
    """
    folder = folder_of(dataset, cache) / "contents"
    absent = 0
    ahead: deque = deque()
    # Not `with`, which joins: the garbage collector may close a reader that was dropped
    # half-way in any thread, one of these too.
    pool = concurrent.futures.ThreadPoolExecutor(CONTENT_JOBS)
    try:
        for row in _rows(shards):
            ahead.append(pool.submit(_content, row, folder))
            if len(ahead) >= 4 * CONTENT_JOBS:
                text = ahead.popleft().result()
                absent += text is None
                yield text or ""
        while ahead:
            text = ahead.popleft().result()
            absent += text is None
            yield text or ""
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        if absent:
            report(
                f"left out {absent:,} file(s) that Software Heritage does not serve "
                "any more, or that are not text"
            )


def _rows(shards: Iterable[Path]) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    columns = "blob_id src_encoding license_type is_vendor is_generated length_bytes"
    for shard in shards:
        with pyarrow.parquet.ParquetFile(shard) as table:
            if missing := set(columns.split()) - set(table.schema_arrow.names):
                raise ValueError(
                    f"{shard} must have the columns {columns}. It lacks {', '.join(sorted(missing))}."
                )
            for batch in table.iter_batches(batch_size=1024, columns=columns.split()):
                for row in batch.to_pylist():
                    if (
                        row["license_type"] == "permissive"
                        and not (row["is_vendor"] or row["is_generated"])
                        and 0 < row["length_bytes"] <= FILE_BYTES
                    ):
                        yield row


def _content(row: dict[str, Any], folder: Path) -> str | None:
    """The text of a row, or None where there is none."""
    name = row["blob_id"]
    path = folder / name[:2] / f"{name}.gz"
    if path.is_file():
        data = path.read_bytes()
    else:
        fetched = _get(f"{os.environ.get('TRIX_CONTENTS') or CONTENTS}{name}")
        if fetched is None:
            return None
        data = fetched
    try:
        text = gzip.decompress(data)
    except (OSError, EOFError, ValueError) as error:
        path.unlink(missing_ok=True)
        raise RuntimeError(
            f"content {name} is not what it should be ({error})."
        ) from error
    if (got := hashlib.sha1(text, usedforsecurity=False).hexdigest()) != name:
        path.unlink(missing_ok=True)
        raise RuntimeError(f"content {name} must have that sha1. Got {got}.")
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data)
    try:
        return text.decode(row["src_encoding"] or "utf-8")
    except (UnicodeDecodeError, LookupError):
        return None


def _get(url: str) -> bytes | None:
    """None for what is not there (any more)."""
    for attempt in range(TRIES):
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            if error.code in (403, 404):
                return None
            failure: Exception = error
        except OSError as error:
            failure = error
        time.sleep(attempt)
    raise ConnectionError(
        f"{url} could not be fetched ({failure}). What has arrived is kept: the same command goes on."
    )


def _repositories(path: Path, report: Report) -> list[Path]:
    if path.is_file():
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        found = [Path(line.strip()) for line in lines if line.strip()]
        for repository in found:
            if not repository.is_dir():
                raise ValueError(
                    f"source='code' needs a folder, or a text file that lists folders. {path} "
                    f"lists {str(repository)[:80]!r}, which is none."
                )
        return found
    everything = sorted(f for f in path.iterdir() if f.is_dir())
    folders = [f for f in everything if _is_read(f.name)]
    if license_of(path) or not any(map(license_of, folders)):
        return [path]
    if left := [f.name for f in everything if f not in folders]:
        report(f"left out {len(left)} folder(s) by their names, the first {left[0]}")
    return folders


def _is_read(folder: str) -> bool:
    return not folder.startswith(".") and folder not in LEFT_OUT


def _without_licence(beside: list[Path], report: Report) -> list[Path]:
    """Says which files lie beside repositories, and leaves them out."""
    if beside:
        report(
            f"left out {len(beside)} source file(s) beside the repositories, under no "
            f"permissive licence file, the first {beside[0].name}"
        )
    return []


def _permissive(repositories: list[Path], path: Path, report: Report) -> list[Path]:
    licences = {repository: license_of(repository) for repository in repositories}
    kept = [r for r in repositories if licences[r]]
    counts = Counter(
        licence or "no permissive licence file" for licence in licences.values()
    )
    report(
        "repositories by licence: "
        + ", ".join(f"{name} {n}" for name, n in sorted(counts.items()))
        + ("; those without are left out" if len(kept) < len(repositories) else "")
    )
    if not kept:
        raise ValueError(
            f"path={str(path)!r} must hold a repository with a permissive licence file "
            f"({', '.join(PERMISSIVE)}). Got none of {len(repositories)}; every file's licence "
            "binds who trains on it."
        )
    return kept


def _files(
    repository: Path,
    suffixes: frozenset[str],
    passed: list[Path],
    is_deep: bool = True,
) -> Iterator[Path]:
    """Yields source files, with `is_deep` those of folders too; links, of which another
    repository is full, and what is too large go to `passed`.
    """
    for folder, folders, names in os.walk(repository):
        folders[:] = sorted(filter(_is_read, folders)) if is_deep else []
        passed += [p for f in folders if (p := Path(folder, f)).is_symlink()]
        for name in sorted(names):
            file = Path(folder, name)
            if name.startswith(".") or file.suffix.lower() not in suffixes:
                continue
            if file.is_symlink() or file.stat().st_size > FILE_BYTES:
                passed.append(file)
            else:
                yield file
