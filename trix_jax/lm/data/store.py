"""Tokens on disk: memory-mapped `.npy` shards under a sha256 manifest.

```
train_00000.npy ...   val_00000.npy ...   uint16, or uint32 for vocabularies over 65,536; at most 64M tokens a shard
tokenizer.json        see tokenizer.py
manifest.json         format, files {name: sha256, bytes, tokens}, splits {train, val: tokens, bytes}, config, source,
                      near_duplicates_removed, sources (origin.py), fingerprint (sha256 over the files' names and hashes), checksum
                      (sha256 of all the rest of the manifest)
```

A split's `bytes` are the UTF-8 bytes of its text, end-of-text marks not counted: the
unit of bits per byte; null where tokens came without a tokenizer. A store appears under its name complete or not at all: it is
written beside it, flushed to disk, and renamed.
"""

import contextlib
import glob
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Int32, Integer

from trix_jax.files import (
    file_sha256,
    is_another_process,
    json_sha256,
    sync,
    write_whole,
    writing,
)
from trix_jax.lm.data.tokenizer import TOKENIZER, Tokenizer, load_tokenizer

FORMAT = "trix_jax tokens 1"
COMPACT = (",", ":")  # how the format writes the JSON that it hashes
MANIFEST = "manifest.json"
SHARD_TOKENS = 64 * 2**20
_FILE_NAME = re.compile(r"(train|val)_\d{5}\.npy|tokenizer\.json")


class Split:
    """One side of a store: a long line of tokens, read window by window from
    memory-mapped shards.
    """

    def __init__(self, shards: list[Integer[np.ndarray, " _"]]):
        # Still memory-mapped, and cheaper to slice than np.memmap.
        self._shards = [np.asarray(shard) for shard in shards]
        self._starts = np.cumsum([0, *(len(shard) for shard in shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def window(self, start: int, length: int) -> Int32[np.ndarray, " T"]:
        """Tokens `start` to `start + length - 1`, copied out of however many shards
        they lie in.

        Raises:
            ValueError: The window does not lie inside the split.
        """
        stop = start + length
        if not (0 <= start and 0 <= length and stop <= len(self)):
            raise ValueError(
                f"window must lie inside 0 to {len(self)}. Got start={start}, length={length}."
            )
        tokens = np.empty(length, np.int32)
        index = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            shard, base = self._shards[index], int(self._starts[index])
            piece = shard[start - base : stop - base]
            tokens[length - (stop - start) :][: len(piece)] = piece
            start += len(piece)
            index += 1
        return tokens


class Store(NamedTuple):
    """An open, checked token store."""

    directory: Path
    train: Split
    val: Split
    tokenizer: Tokenizer
    manifest: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """Identifies the tokens and the tokenizer: sha256 over the hashes of their
        files.
        """
        return self.manifest["fingerprint"]

    @property
    def val_tokens(self) -> int:
        """Tokens of the validation split, end-of-text marks counted."""
        return self.manifest["splits"]["val"]["tokens"]

    @property
    def val_bytes(self) -> int | None:
        """UTF-8 bytes of the validation text, end-of-text marks not counted; None where
        the text of the tokens is not known.
        """
        return self.manifest["splits"]["val"]["bytes"]


class SplitWriter:
    """Appends tokens to the shards of one split, holding none of them in memory.

    Attributes:
        tokens: Tokens written so far.
        bytes: UTF-8 bytes of text they stand for; None is not known.
    """

    def __init__(
        self,
        directory: Path,
        split: str,
        vocab_size: int,
        shard_tokens: int = SHARD_TOKENS,
    ):
        self.tokens = 0
        self.bytes: int | None = 0
        self._directory, self._split = directory, split
        self._dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self._shard_tokens = shard_tokens
        self._file: BinaryIO | None = None
        self._in_shard, self._shards = 0, 0

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._finish(self._file)

    def __len__(self) -> int:
        return self.tokens

    def append(
        self, tokens: Integer[np.ndarray, " T"], num_bytes: int | None = 0
    ) -> None:
        """Appends tokens of `num_bytes` of UTF-8 text; None: nobody knows."""
        if self.bytes is not None:
            self.bytes = None if num_bytes is None else self.bytes + num_bytes
        self.tokens += len(tokens)
        tokens = tokens.astype(self._dtype)
        while len(tokens):
            file = self._file or self._start()
            head, tokens = np.split(tokens, [self._shard_tokens - self._in_shard])
            with writing(file.name):
                file.write(head.tobytes())
            self._in_shard += len(head)
            if self._in_shard == self._shard_tokens:
                self._finish(file)

    def _start(self) -> BinaryIO:
        name = f"{self._split}_{self._shards:05d}.npy"
        self._file = (self._directory / name).open("wb")
        self._write_header(self._file)
        return self._file

    def _write_header(self, file: BinaryIO) -> None:
        """Numpy pads the header so that a longer length fits in its place later."""
        file.seek(0)
        shape = (self._in_shard,)
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)

    def _finish(self, file: BinaryIO) -> None:
        with writing(file.name), contextlib.closing(file):
            self._write_header(file)
            file.flush()
            os.fsync(file.fileno())
        self._file, self._in_shard, self._shards = None, 0, self._shards + 1


def check_free(directory: Path) -> None:
    """Raises a ValueError where a store would lie among other things.

    What a killed preparation left counts as nothing, and so does `lost+found`, which a
    new disk has.
    """
    if not directory.exists() or is_store(directory):
        return
    if directory.is_dir():
        names = {path.name for path in directory.iterdir()} - {"lost+found"}
        if left := {path.name for path in _leftovers(directory, directory)}:
            names = {n for n in names - left if not _FILE_NAME.fullmatch(n)}
        if not names:
            return
    raise ValueError(
        f"directory={str(directory)!r} must be new, empty or a token store; it holds something else, without a manifest.json."
    )


@contextlib.contextmanager
def new_store(directory: Path) -> Iterator[Path]:
    """Gives a temporary folder and, if the body succeeds, makes it `directory`; else
    removes it.

    It lies beside a `directory` that is new, and is renamed. A folder that is there, be
    it a link or where a disk is mounted, stays: the temporary one lies inside, on the
    same disk, its files move up, and the manifest is the last. What processes that died
    here have left is removed first.
    """
    if directory.is_symlink():  # also one to a place that is still to be made
        directory = directory.resolve()
    directory = Path(os.path.abspath(directory))
    is_there = directory.is_dir()
    place = directory if is_there else directory.parent
    with writing(directory):
        place.mkdir(parents=True, exist_ok=True)
    for left in _leftovers(directory, place):
        pid = left.name.split(".")[-2].partition("-")[0]
        if pid.isdecimal() and not is_another_process(int(pid)):
            shutil.rmtree(left)
    unique = f"{os.getpid()}-{secrets.token_hex(4)}"
    building = place / f".{directory.name}.{unique}.tmp"
    with writing(directory):
        building.mkdir()
    try:
        yield building
        sync(building)
        if is_there:
            _move_up(building, directory)
        else:  # over nothing; anything else is an OSError
            os.rename(building, directory)
        sync(place)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _leftovers(directory: Path, place: Path) -> Iterator[Path]:
    return place.glob(f".{glob.escape(directory.absolute().name)}.*.tmp")


def _move_up(building: Path, directory: Path) -> None:
    """Puts a store's files where the former ones were, if there were any; in between
    there is none.
    """
    (directory / MANIFEST).unlink(missing_ok=True)
    for path in directory.iterdir():
        if _FILE_NAME.fullmatch(path.name):
            path.unlink()
    sync(directory)
    for name in sorted(os.listdir(building), key=lambda name: name == MANIFEST):
        sync(directory)
        os.rename(building / name, directory / name)


def write_manifest(
    directory: Path,
    config: dict[str, Any],
    source: str,
    splits: dict[str, SplitWriter],
    removed: int = 0,
    sources: dict[str, Any] | None = None,
) -> None:
    """Hashes the files of a store that is complete but for its manifest, and writes
    that.

    Args:
        removed: training documents left out as near-duplicates of validation.
        sources: the files it was made from (`origin.py`).
    """
    files = {}
    for path in sorted(directory.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.name] = {"sha256": file_sha256(path), "bytes": path.stat().st_size}
        if path.suffix == ".npy":
            files[path.name]["tokens"] = len(
                np.load(path, mmap_mode="r", allow_pickle=False)
            )
    manifest = {
        "format": FORMAT,
        "source": source,
        "config": config,
        "splits": {
            name: {"tokens": split.tokens, "bytes": split.bytes}
            for name, split in splits.items()
        },
        "near_duplicates_removed": removed,
        "sources": sources or {"complete": True, "files": []},
        "files": files,
        "fingerprint": json_sha256(
            {name: file["sha256"] for name, file in files.items()}, COMPACT
        ),
    }
    manifest["checksum"] = json_sha256(manifest, COMPACT)
    write_whole(directory / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())


def open_store(directory: str | Path, verify: bool = True) -> Store:
    """Opens a store after checking it against its manifest.

    Args:
        directory: The folder that holds `manifest.json`.
        verify: Hash every file (about a second a gigabyte) and compare its tokens with
            the vocabulary; False checks only that each has its size.

    Raises:
        ValueError: Names the file that is missing, truncated, altered or no shard.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    for name, entry in manifest["files"].items():
        path = directory / name
        if not path.is_file():
            raise ValueError(
                f"{path} is missing from the token store; prepare it again."
            )
        if (size := path.stat().st_size) != entry["bytes"]:
            raise ValueError(
                f"{path} must have {entry['bytes']} bytes. Got {size}; prepare the store again."
            )
        if verify and file_sha256(path) != entry["sha256"]:
            raise ValueError(
                f"{path} was altered: its sha256 is not the manifest's; prepare the store again."
            )
    tokenizer = load_tokenizer(directory / TOKENIZER)
    limit = tokenizer.vocab_size if verify else None
    return Store(
        directory,
        train=_open_split(directory, "train", manifest, limit),
        val=_open_split(directory, "val", manifest, limit),
        tokenizer=tokenizer,
        manifest=manifest,
    )


def is_store(path: str | Path) -> bool:
    """Whether a folder claims to be a store."""
    return (Path(path) / MANIFEST).is_file()


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """Reads and checks `manifest.json`, not the files it lists.

    Raises:
        ValueError: It is missing, of another format, or altered.
    """
    path = Path(directory) / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        if manifest["format"] != FORMAT:
            raise ValueError(f"format must be {FORMAT!r}, got {manifest['format']!r}")
        rest = {key: value for key, value in manifest.items() if key != "checksum"}
        if manifest["checksum"] != json_sha256(rest, COMPACT):
            raise ValueError("its checksum does not match its contents")
        if odd := [
            name for name in manifest["files"] if not _FILE_NAME.fullmatch(name)
        ]:
            raise ValueError(f"it lists {odd[0]!r}, which is no file of a store")
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise ValueError(
            f"{path} is not a readable store manifest ({error})."
        ) from error
    return manifest


def _open_split(
    directory: Path, split: str, manifest: dict[str, Any], limit: int | None
) -> Split:
    names = sorted(name for name in manifest["files"] if name.startswith(split + "_"))
    return Split([_open_shard(directory / name, limit) for name in names])


def _open_shard(path: Path, limit: int | None) -> np.ndarray:
    """Maps a line of tokens, all below `limit` if there is one."""
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a header can hold anything
        raise ValueError(
            f"{path} is not a readable .npy file ({type(error).__name__}: {error})."
        ) from error
    if tokens.ndim != 1 or tokens.dtype not in (np.uint16, np.uint32):
        raise ValueError(
            f"{path} must hold a line of uint16 or uint32. "
            f"Got {tokens.dtype}{list(tokens.shape)}."
        )
    if limit is not None and tokens.size and (most := int(tokens.max())) >= limit:
        raise ValueError(
            f"{path} must hold tokens of its tokenizer, below {limit}. Got {most}."
        )
    return tokens
