"""Files of token ids that somebody else made.

| file | holds |
|---|---|
| `.bin` | nanoGPT's: uint16, little-endian, no header |
| `.bin` of llm.c | a header of 256 int32 (magic number, version, tokens), then uint16 (magic number 20240520, GPT-2) or uint32 (20240801, Llama 3) |
| `.npy` | a line of integers of any type |

In a folder a file whose name has the word "val" (or "valid", "validation") is validation,
as in `val.bin` and `fineweb_val_000000.bin`, one with "test" is passed over, and the others
are training, in order of their paths; so too `val.bin` beside a `train.bin` that is named.
"dev" is validation, and "testing", "eval" and "evaluation" are passed over, where others
say "train".
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, Integer

from trix_jax.lm.data.files import tell_passed_over, walk
from trix_jax.lm.data.sides import TEST, TRAIN, VAL, words

SUFFIXES = (".bin", ".npy")
HEADER_BYTES = 256 * 4
LLM_C = {20240520: (1, "<u2"), 20240801: (7, "<u4")}  # magic number: version, type
FOREIGN = {b"PK\x03\x04": "a PyTorch or zip file", b"GGUF": "a GGUF model"}
SAMPLE = 4096  # ids that tell a file of wider integers
ALONE = {"val", "valid", "validation", "test"}  # that count beside no "train" too
CHUNK = 2**22  # ids that are looked at at a time


class Sides(NamedTuple):
    """Files of training and, where there are any, of validation."""

    train: list[Path]
    val: list[Path]

    @property
    def files(self) -> list[Path]:
        return [*self.train, *self.val]


def find(path: Path, report: Callable[[str], None]) -> Sides:
    """The token files at a path; says what of a folder is passed over.

    Raises:
        ValueError: There is none to train on.
    """
    if not path.exists():
        raise ValueError(f"path={str(path)!r} does not exist (source='tokens').")
    if path.is_file():
        _check_suffix(path)
        beside = [path.with_name(f"{name}{path.suffix}") for name in sorted(VAL)]
        is_train = path.stem == "train"
        return Sides([path], [p for p in beside if is_train and p.is_file()])
    everything = walk(path)
    files = [p for p in everything if p.suffix.lower() in SUFFIXES and p.is_file()]
    named = {p: words(p.relative_to(path).as_posix()) for p in files}
    has_train = any(TRAIN & found for found in named.values())
    counted = {
        p: f if has_train and not TRAIN & f else f & ALONE for p, f in named.items()
    }
    val = [p for p in files if VAL & counted[p]]
    train = [p for p in files if not (VAL | TEST) & counted[p]]
    taken = {*train, *val}
    tell_passed_over("tokens", path, [p for p in everything if p not in taken], report)
    if not train:
        raise ValueError(
            f"path={str(path)!r} must hold .bin or .npy files of training tokens. "
            f"Got {', '.join(p.name for p in files) or 'none'}."
        )
    return Sides(train, val)


def _check_suffix(file: Path) -> None:
    if file.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"{file} must be a .bin or .npy file of tokens, not packed. Got {file.name}."
        )


def all_of(path: Path, report: Callable[[str], None]) -> list[Path]:
    """The token files of a validation set of its own, whatever their names.

    Raises:
        ValueError: There is none.
    """
    everything = [path] if path.is_file() else walk(path)
    files = [p for p in everything if p.suffix.lower() in SUFFIXES]
    if not files:
        raise ValueError(f"val_path={str(path)!r} must hold .bin or .npy files.")
    tell_passed_over("tokens", path, sorted({*everything} - {*files}), report)
    return files


def open_tokens(file: Path) -> Integer[np.ndarray, " T"]:
    """Maps the ids of a file.

    Raises:
        ValueError: It is missing, or of another format; says which.
    """
    try:
        found = _open_npy(file) if file.suffix.lower() == ".npy" else _open_bin(file)
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}).") from error
    if not len(found):
        raise ValueError(f"{file} holds no tokens.")
    return found


def _open_npy(file: Path) -> Integer[np.ndarray, " T"]:
    try:
        found = np.load(file, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # a header can hold anything
        raise ValueError(f"{file} is not a readable .npy file ({error}).") from error
    if (
        not isinstance(found, np.ndarray)
        or found.ndim != 1
        or found.dtype.kind not in "iu"
    ):
        what = f"{getattr(found, 'dtype', '')}{list(getattr(found, 'shape', []))}"
        raise ValueError(f"{file} must hold a line of integers. Got {what}.")
    return found


def _open_bin(file: Path) -> Integer[np.ndarray, " T"]:
    size = file.stat().st_size
    with file.open("rb") as opened:
        head = opened.read(HEADER_BYTES)
    if file.with_suffix(".idx").is_file():
        raise ValueError(
            f"{file} is of Megatron, with an .idx beside it, which is not read here: "
            "convert it to .npy."
        )
    for magic, what in FOREIGN.items():
        if head.startswith(magic):
            raise ValueError(f"{file} holds no tokens: it is {what}.")
    magic = int.from_bytes(head[:4], "little")
    if magic in LLM_C and len(head) == HEADER_BYTES:
        return _open_llm_c(file, np.frombuffer(head, "<i4"), size)
    if size % 2:
        raise ValueError(
            f"{file} must hold uint16, two bytes a token, as nanoGPT writes it. Got "
            f"{size} bytes; give other types as .npy."
        )
    found = np.memmap(file, "<u2", "r") if size else np.zeros(0, np.uint16)
    head = found[:SAMPLE]
    high = head[1::2]  # of int32, -1 included
    is_wide = ((high < 4) | (high == 0xFFFF)).all()
    if len(head) > 32 and is_wide and head.max() >= 4:
        raise ValueError(
            f"{file} must hold uint16, as nanoGPT writes it. Every second of its first "
            f"{len(head)} is below 4 or 65,535, as in a file of wider integers: give these as .npy."
        )
    return found


def _open_llm_c(
    file: Path, header: Integer[np.ndarray, "256"], size: int
) -> Integer[np.ndarray, " T"]:
    version, kind = LLM_C[int(header[0])]
    if header[1] != version:
        raise ValueError(
            f"{file} is of llm.c, and must be of version {version}. Got {header[1]}."
        )
    tokens, width = int(header[2]), np.dtype(kind).itemsize
    if size != HEADER_BYTES + tokens * width:
        raise ValueError(
            f"{file} is of llm.c and must have {HEADER_BYTES + tokens * width} bytes for "
            f"the {tokens} tokens that its header tells. Got {size}: it may be cut off."
        )
    return np.memmap(file, kind, "r", offset=HEADER_BYTES, shape=(tokens,))


def greatest(files: Sequence[Path], limit: int | None, named: str) -> int:
    """The greatest id of some files.

    Args:
        limit: That all must be below; None: any.
        named: Where the limit comes from.

    Raises:
        ValueError: An id is negative, or not below the limit; says where.
    """
    found = -1
    for file in files:
        tokens = open_tokens(file)
        for start in range(0, len(tokens), CHUNK):
            chunk = tokens[start : start + CHUNK]
            most = 2**31 if limit is None else limit
            if (bad := (chunk < 0) | (chunk >= most)).any():
                at = start + int(np.argmax(bad))
                raise ValueError(
                    f"{file} must hold ids in 0 to {most - 1}, {named}. Got "
                    f"{tokens[at]} at position {at}."
                )
            found = max(found, int(chunk.max()))
    return found


def chunks(
    files: Sequence[Path], start: int, stop: int
) -> Iterator[Int64[np.ndarray, " T"]]:
    """Yields tokens `start` to `stop - 1` of the line that some files make."""
    for file in files:
        tokens = open_tokens(file)
        here = slice(max(start, 0), max(min(stop, len(tokens)), 0))
        for at in range(here.start, here.stop, CHUNK):
            yield tokens[at : min(at + CHUNK, here.stop)].astype(np.int64)
        start, stop = start - len(tokens), stop - len(tokens)


def cut(files: Sequence[Path], share: float, eot: int | None) -> int:
    """Where the last `share` of the tokens begins: at the document nearest to it, if
    that changes the smaller part by a quarter at most.
    """
    total = sum(len(open_tokens(file)) for file in files)
    at = total - round(total * share)
    if eot is None:
        return at
    reach = min(at, total - at) // 4
    low = max(at - reach, 1)
    best, place = None, low
    for chunk in chunks(files, low - 1, min(at + reach, total - 1)):
        starts = np.flatnonzero(chunk == eot) + place
        if len(starts):
            near = int(starts[np.argmin(np.abs(starts - at))])
            best = near if best is None or abs(near - at) < abs(best - at) else best
        place += len(chunk)
    return at if best is None else best
