"""Where text comes from: eight kinds of source, one stream of documents.

| source | a document is | `path` |
|---|---|---|
| `stdlib` | one module of the running Python's standard library | none |
| `shakespeare` | all of TinyShakespeare | a local copy, or None to download it |
| `text` | one file | a file, or a folder whose `*.txt` are taken |
| `jsonl` | the `"text"` of one line, or of one entry of a `.json` array | a file, or a folder whose `*.jsonl` and `*.ndjson`, else `*.json`, are taken |
| `parquet` | the `text` of one row (FineWeb-Edu shards read as they are) | a file, or a folder of `*.parquet` |
| `tokens` | up to the end mark, if it is known | a `.bin` or `.npy` file, or a folder of them (`token_files.py`); no text |
| `code` | one source file | a folder of repositories, or a list of them (`code.py`) |
| `fineweb_5m`, ... | one row of FineWeb-Edu, one file of The Stack | None downloads (`datasets.py`), or as `parquet` or `code` |

Documents are UTF-8, in a fixed order (files by sorted path), newlines as they stand in
the file, without a byte order mark at its start (`files.py`: links, suffixes, archives).
Files of a folder whose names say that they are validation or test are documents like the
others here; `prepare` divides them (`sides.py`). A file named by the caller that cannot
be read is an error; inside a folder it is skipped, and the number of skipped files is
reported.
"""

import hashlib
import platform
import sysconfig
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from trix_jax.files import cache_folder, write_whole
from trix_jax.lm.data.code import code_files, stack_documents
from trix_jax.lm.data.datasets import DATASETS, Dataset
from trix_jax.lm.data.download import fetch
from trix_jax.lm.data.files import (
    BYTE_ORDER_MARK,
    TABLES,
    files_of,
    json_texts,
    read,
    suffix_of,
    walk,
)
from trix_jax.lm.data.origin import Opened
from trix_jax.lm.data.sides import TRAIN, words
from trix_jax.lm.data.token_files import SUFFIXES

Source = Literal[
    "stdlib",
    "shakespeare",
    "text",
    "jsonl",
    "parquet",
    "code",
    "tokens",
    "fineweb_5m",
    "fineweb_50m",
    "fineweb_500m",
    "fineweb_10b",
    "stack_250m",
]

STDLIB_BYTES = 1_500_000
STDLIB_FILE_BYTES = 32_000  # small files only: a document is then about a hundredth of the slice, so the split is even
STDLIB_LEFT_OUT = frozenset(
    "test tests site-packages dist-packages idlelib lib2to3 encodings pydoc_data __pycache__".split()
)

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE = "tinyshakespeare.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def iter_documents(
    source: Source,
    path: str | Path | None,
    max_bytes: int | None = None,
    report: Callable[[str], None] = print,
    languages: str | None = None,
    licenses: str | None = None,
    opened: Opened | None = None,
    files: Iterable[Path] | None = None,
) -> Iterator[str]:
    """Yields the documents of a source, none of them empty, in a fixed order.

    Args:
        source: One of the names in the table above.
        path: What the table says; None where the source needs no file.
        max_bytes: Stop after this much UTF-8 text; the last document is cut, between
            characters, to fit. None: no limit.
        report: Is told in one line how many files of a folder were skipped.
        languages, licenses: What of `code` to take (`code.code_files`).
        opened: Notes the local files that are read.
        files: Those of `path` that are read; None: all that `local_files` gives.

    Raises:
        ValueError: The path is missing, empty, not what the source expects, or holds
            something unreadable; the hub refuses.
        ConnectionError: Something could not be downloaded.
        RuntimeError: A download is not what it should be.
    """

    def local(kind: str, path: Path) -> Iterator[str]:
        found = files
        if found is None:
            found = local_files(kind, path, report, languages, licenses)
        if opened is not None:
            found = opened.noting(found)
        return _local(kind, found, path.is_file(), report)

    match source:
        case "stdlib":
            if path is not None:
                raise ValueError(
                    f"source='stdlib' reads the running Python and takes no path. Got {str(path)!r}."
                )
            documents = _python_stdlib()
        case "shakespeare":
            documents = iter([_shakespeare(path, report)])
        case "text" | "jsonl" | "parquet" | "code":
            if path is None:
                raise ValueError(
                    f"source={source!r} needs a path: a file or a folder. Got None."
                )
            documents = local(source, Path(path))
        case "tokens":
            raise ValueError(
                f"path={str(path)!r} holds tokens, and text is needed: give what they "
                "were made from."
            )
        case name if name in DATASETS and path is not None:
            documents = local(kind_of(name), Path(path))
        case name if name in DATASETS:
            documents = _downloaded(DATASETS[name], report)
        case _:
            raise ValueError(
                f"source must be stdlib, shakespeare, text, jsonl, parquet, code, tokens or "
                f"{', '.join(DATASETS)}. Got {source!r}."
            )
    return _limit((text for text in documents if text), max_bytes)


def infer_source(path: str | Path) -> Source:
    """The source that a raw path looks like, by suffix; for a folder, by the first kind
    of file it holds.

    Raises:
        ValueError: a folder holds nothing to read, or text beside tokens; a table.
    """
    path = Path(path)
    kinds: dict[str, Source] = {".parquet": "parquet", ".jsonl": "jsonl"}
    kinds |= {".ndjson": "jsonl", ".txt": "text", ".json": "jsonl"}
    files = walk(path) if path.is_dir() else []
    held = {suffix_of(file) for file in files}
    tokens = [f for f in files if suffix_of(f) in SUFFIXES and TRAIN & words(f.name)]
    for suffix, source in kinds.items():
        if suffix in (held or {suffix_of(path)}):
            if found := [file.name for file in tokens if file.parent == path]:
                raise ValueError(
                    f"path={str(path)!r} holds text ({suffix}) and tokens ({found[0]}): "
                    f"say which, --data.source {source} or --data.source tokens."
                )
            return source
    if {*SUFFIXES} & (held or {suffix_of(path)}):
        return "tokens"
    if not path.is_dir():
        if suffix_of(path) in TABLES:
            raise ValueError(
                f"path={str(path)!r} is a table: say --data.source text to read it all."
            )
        return "text"
    raise ValueError(
        f"path={str(path)!r} holds no .parquet, .jsonl, .ndjson, .txt, .json, .bin or .npy file; for source files say source='code'."
    )


def describe(source: Source, path: str | Path | None) -> str:
    """One line on what a source is, for manifests and reports; no machine paths."""
    match source:
        case "stdlib":
            return f"standard library of Python {platform.python_version()}, files up to {STDLIB_FILE_BYTES:,} bytes"
        case "shakespeare":
            return f"TinyShakespeare (karpathy/char-rnn), sha256 {SHAKESPEARE_SHA256}"
        case name if name in DATASETS and path is None:
            data = DATASETS[name]
            return f"{name}: {data.repo} at {data.revision}, {', '.join(data.files)}"
        case _:
            return f"{source} from {Path(path or '').name}"


def _downloaded(dataset: Dataset, report: Callable[[str], None]) -> Iterator[str]:
    shards = fetch(dataset, report)
    if dataset.is_code:
        return stack_documents(dataset, shards, report)
    return (text for shard in shards for text in _parquet(shard))


def local_files(
    source: str,
    path: Path,
    report: Callable[[str], None],
    languages: str | None = None,
    licenses: str | None = None,
) -> Iterable[Path]:
    """The files that a source reads at a path, in order.

    Raises:
        ValueError: there is none.
    """
    if not path.exists():
        raise ValueError(f"path={str(path)!r} does not exist (source={source!r}).")
    if kind_of(source) == "code":
        return code_files(path, languages, licenses, report)
    return files_of(kind_of(source), path, report)


def kind_of(source: str) -> str:
    """What a source's local files hold: that of a data set is parquet or code."""
    if source not in DATASETS:
        return source
    return "code" if DATASETS[source].is_code else "parquet"


def _local(
    source: str, files: Iterable[Path], named: bool, report: Callable[[str], None]
) -> Iterator[str]:
    if source == "code":
        return _read_files(files, named=False, report=report)
    if source == "text":
        return _read_files(files, named, report)
    texts = json_texts if source == "jsonl" else _parquet
    return (text for file in files for text in texts(file))


def _limit(documents: Iterable[str], max_bytes: int | None) -> Iterator[str]:
    left = max_bytes
    for text in documents:
        if left is None:
            yield text
            continue
        data = text.encode()
        if len(data) >= left:
            if head := data[:left].decode(errors="ignore"):
                yield head
            return
        left -= len(data)
        yield text


def _decode(data: bytes, path: Path) -> str:
    if b"\0" in data:
        raise ValueError(
            f"{path} is not text: it has a NUL byte at offset {data.index(0)}."
        )
    try:
        return data.decode("utf-8").removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: {error.reason} at offset {error.start}."
        ) from error


def _read_files(
    files: Iterable[Path], named: bool, report: Callable[[str], None]
) -> Iterator[str]:
    """Yields each file's text; with `named` an unreadable or empty one raises, else it
    is counted and reported.
    """
    skipped: list[Path] = []
    try:
        for file in files:
            try:
                text = _decode(read(file), file)
            except (ValueError, OSError):
                if named:
                    raise
                skipped.append(file)
                continue
            if named and not text:
                raise ValueError(f"{file} is empty.")
            yield text
    finally:
        if skipped:
            report(
                f"skipped {len(skipped)} file(s) that cannot be read as UTF-8 text, the first {skipped[0]}"
            )


def _python_stdlib() -> Iterator[str]:
    """About 1.5 MB of the standard library: whole files ordered by the sha256 of their
    path, up to the first that overflows.

    Left out: files over 32 kB, tests, site-packages, idlelib, lib2to3, the tables of
    `encodings` and `pydoc_data`, build settings of this machine (`_sysconfigdata*`),
    and what is not UTF-8. The same Python version gives the same text.
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = (
        path.relative_to(root)
        for path in root.rglob("*.py")
        if path.stat().st_size <= STDLIB_FILE_BYTES
    )
    names = (
        n
        for n in names
        if STDLIB_LEFT_OUT.isdisjoint(n.parts)
        and not n.name.startswith("_sysconfigdata")
    )
    total = 0
    for name in sorted(
        names, key=lambda n: hashlib.sha256(n.as_posix().encode()).digest()
    ):
        try:
            text = _decode((root / name).read_bytes(), root / name)
        except ValueError:
            continue
        total += len(text.encode())
        if total > STDLIB_BYTES:
            return
        yield text


def _shakespeare(path: str | Path | None, report: Callable[[str], None]) -> str:
    if path is not None:
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise ValueError(
                f"path={str(path)!r} cannot be read ({error.strerror})."
            ) from error
        _check_shakespeare(data, str(path))
        return data.decode()
    if (kept := _kept_shakespeare()) is not None:
        return kept.decode()
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=30) as response:
            data = response.read()
    except OSError as error:
        raise ConnectionError(
            f"TinyShakespeare could not be downloaded from {SHAKESPEARE_URL} ({error}); "
            "give a local copy as path (--data.path FILE)."
        ) from error
    _check_shakespeare(data, SHAKESPEARE_URL)
    try:
        cached = cache_folder() / SHAKESPEARE
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_whole(cached, data)
    except OSError as error:
        report(f"TinyShakespeare is not kept for the next time: {error}")
    return data.decode()


def _kept_shakespeare() -> bytes | None:
    """The text of an earlier download, if one can be read."""
    try:
        data = (cache_folder() / SHAKESPEARE).read_bytes()
    except OSError:
        return None
    return data if hashlib.sha256(data).hexdigest() == SHAKESPEARE_SHA256 else None


def _check_shakespeare(data: bytes, origin: str) -> None:
    if (got := hashlib.sha256(data).hexdigest()) != SHAKESPEARE_SHA256:
        raise ValueError(
            f"{origin} is not TinyShakespeare: sha256 must be {SHAKESPEARE_SHA256}. Got {got}."
        )


def _is_text(kind: Any) -> bool:
    """Whether a column's Arrow type is of strings, be they in a dictionary as pandas'
    categories are.
    """
    from pyarrow import types

    if kind is None:
        return False
    if types.is_dictionary(kind):
        kind = kind.value_type
    is_text = types.is_string, types.is_large_string, types.is_string_view
    return any(check(kind) for check in is_text)


def _parquet(file: Path) -> Iterator[str]:
    """Yields the `text` column row group by row group; nulls are passed over."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            kinds = dict(
                zip(table.schema_arrow.names, table.schema_arrow.types, strict=True)
            )
            if not _is_text(kinds.get("text")):
                columns = ", ".join(f"{name}: {kind}" for name, kind in kinds.items())
                raise ValueError(
                    f'{file} must have a string column "text". Got columns {columns}.'
                )
            for batch in table.iter_batches(batch_size=256, columns=["text"]):
                yield from (text for text in batch.column(0).to_pylist() if text)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not a readable parquet file ({error}).") from error
