"""Token files to a token store.

The tokens are taken as they are. Validation is the files that are (`token_files.py`), or
those of `val_path`, or else the end of the training tokens, from a document's beginning
where the end mark is known. A document's end is the tokenizer's end mark, or the id that
`end_of_text` gives; with neither, nobody knows where documents end.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer

from trix_jax.lm.data import origin, token_files
from trix_jax.lm.data.config import NONE, DataConfig, for_tokens, recipe
from trix_jax.lm.data.library_tokenizer import LibraryTokenizer
from trix_jax.lm.data.pipeline import check_context
from trix_jax.lm.data.store import TOKENIZER, SplitWriter, write_manifest
from trix_jax.lm.data.token_files import Sides
from trix_jax.lm.data.tokenizer import IdTokenizer, Tokenizer, own_tokenizer

Report = Callable[[str], None]


def build_tokens(
    config: DataConfig, building: Path, context: int, report: Report
) -> None:
    """Writes a store of the token files that a config names.

    Raises:
        ValueError: A file is none of tokens, or an id is not the tokenizer's.
    """
    sides = _sides(config, report)
    opened = origin.Opened()
    files = list(opened.noting(sides.files))
    tokenizer = _tokenizer(config, files)
    tokenizer.save(building / TOKENIZER)
    with (
        SplitWriter(building, "train", tokenizer.vocab_size) as train,
        SplitWriter(building, "val", tokenizer.vocab_size) as val,
    ):
        for side, writer in (("train", train), ("val", val)):
            for ids in _documents(_line(sides, side, config, tokenizer), tokenizer):
                left = len(ids)
                if side == "train" and config.max_tokens:
                    left = min(left, config.max_tokens - train.tokens)
                writer.append(ids[:left], num_bytes(tokenizer, ids[:left]))
    for name, split in (("training", train), ("validation", val)):
        check_context(name, split, context)
    noted = origin.note(opened, _base(config))
    written = {"train": train, "val": val}
    write_manifest(building, recipe(config), _about(config), written, sources=noted)
    _tell(sides, tokenizer, written, report)


def changes(config: DataConfig, manifest: dict[str, Any], report: Report) -> str:
    """How the files differ from those that a store was made from, or nothing. Files
    that are gone are as they were.
    """
    for path in filter(None, (config.path, config.val_path)):
        if not Path(path).exists():
            report(f"{path} is not there any more; the store holds its tokens")
            return ""
    try:
        files = _sides(config, lambda _: None).files
    except ValueError as error:
        return str(error).rstrip(".")
    return origin.in_words(origin.changes(manifest["sources"], _base(config), files))


def vocabulary(config: DataConfig) -> int:
    """The number of ids that a store of the token files would have.

    Raises:
        ValueError: As `build_tokens`.
    """
    config = for_tokens(dataclasses.replace(config, source="tokens"))
    if config.tokenizer == NONE and config.vocab_size:
        return config.vocab_size
    return _tokenizer(config, _sides(config, lambda _: None).files).vocab_size


def num_bytes(tokenizer: Tokenizer, ids: Integer[np.ndarray, " T"]) -> int | None:
    """UTF-8 bytes of the text of some ids, marks and special tokens left out; None where
    there is no tokenizer.
    """
    sizes = tokenizer.token_bytes()
    if sizes is not None:
        return int(sizes[ids].sum())
    if not isinstance(tokenizer, LibraryTokenizer):
        return None
    ends = np.flatnonzero(ids == tokenizer.eot) + 1 if tokenizer.eot is not None else []
    parts = np.split(ids, ends)
    return sum(len(tokenizer.text_of(part).encode()) for part in parts)


def _sides(config: DataConfig, report: Report) -> Sides:
    assert config.path is not None
    found = token_files.find(Path(config.path), report)
    if config.val_path is None:
        return found
    val = token_files.all_of(Path(config.val_path), report)
    own = {file.resolve() for file in val}
    return Sides([file for file in found.train if file.resolve() not in own], val)


def _base(config: DataConfig) -> Path:
    """The folder that names of files are relative to."""
    path = Path(config.path or "")
    return path if path.is_dir() else path.parent


def _about(config: DataConfig) -> str:
    val = config.val_path
    more = f"; validation from {Path(val).name}" if val else ""
    return f"tokens from {Path(config.path or '').name}{more}"


def _tokenizer(config: DataConfig, files: Sequence[Path]) -> Tokenizer:
    """That of the tokens, after a look at each of them."""
    if config.tokenizer != NONE:
        own = own_tokenizer(config.tokenizer, config.end_of_text)
        size = own.vocab_size
        token_files.greatest(files, size, f"those of {Path(config.tokenizer).name}")
        if size > 2**16 and (raw := _raw(files)):
            raise ValueError(
                f"{raw} holds uint16, too few for the {size:,} ids of "
                f"{Path(config.tokenizer).name}: give .npy files."
            )
        return own
    mark, size = config.end_of_text, config.vocab_size
    if mark is not None and not mark.isdecimal():
        raise ValueError(
            f"end_of_text must be an id where tokens have no tokenizer. Got {mark!r}."
        )
    most = token_files.greatest(files, size, f"below vocab_size={size}")
    size = size or most + 1
    if mark is not None and int(mark) >= size:
        raise ValueError(f"end_of_text must be an id below {size}. Got {mark}.")
    return IdTokenizer(size, None if mark is None else int(mark))


def _raw(files: Sequence[Path]) -> Path | None:
    """The first of nanoGPT's files."""
    kinds = {file: token_files.open_tokens(file).dtype for file in files}
    bins = (file for file in files if file.suffix.lower() == ".bin")
    return next((file for file in bins if kinds[file] == np.uint16), None)


def _line(
    sides: Sides, side: str, config: DataConfig, tokenizer: Tokenizer
) -> Iterator[Integer[np.ndarray, " T"]]:
    """The tokens of one side, some at a time."""
    total = sum(len(token_files.open_tokens(file)) for file in sides.train)
    if side == "val" and sides.val:
        length = sum(len(token_files.open_tokens(file)) for file in sides.val)
        return token_files.chunks(sides.val, 0, length)
    if sides.val:
        return token_files.chunks(sides.train, 0, total)
    at = token_files.cut(sides.train, config.val_fraction, tokenizer.eot)
    start, stop = (0, at) if side == "train" else (at, total)
    return token_files.chunks(sides.train, start, stop)


def _documents(
    chunks: Iterator[Integer[np.ndarray, " T"]], tokenizer: Tokenizer
) -> Iterator[Integer[np.ndarray, " T"]]:
    """The same tokens, cut where documents end if that can be, so that the text of each
    part is whole.
    """
    rest = np.zeros(0, np.int64)
    for chunk in chunks:
        line = np.concatenate([rest, chunk])
        ends = [] if tokenizer.eot is None else np.flatnonzero(line == tokenizer.eot)
        at = int(ends[-1]) + 1 if len(ends) else len(line)
        yield line[:at]
        rest = line[at:]
    if len(rest):
        yield rest


def _tell(
    sides: Sides, tokenizer: Tokenizer, written: dict[str, SplitWriter], report: Report
) -> None:
    size = tokenizer.vocab_size
    report(f"took {len(sides.files)} token file(s), with a vocabulary of {size:,}")
    where = "in files of its own" if sides.val else "the end of the training tokens"
    for name, split in written.items():
        about = f", {where}" if name == "val" else ""
        told = "" if split.bytes is None else f", {split.bytes:,} bytes of text"
        report(f"{name}: {split.tokens:,} tokens{told}{about}")
    if tokenizer.kind == "none":
        report(
            "no tokenizer: bits per byte are not known (--data.tokenizer PATH gives one)"
        )
    if tokenizer.eot is None:
        report(
            "no end mark is known, so that nobody can tell documents apart "
            "(--data.end-of-text gives it)"
        )
