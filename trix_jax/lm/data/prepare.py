"""Raw text to a token store, in one call.

Documents are split before they are cut into windows. One document: its last
`val_fraction` of characters is validation, as in nanoGPT. Several: each goes by the
sha256 of its text, so that copies land on the same side and order does not matter;
validation is the documents of smallest hash that together hold at least `val_fraction`
of the bytes. Several documents end in the tokenizer's end-of-text id each; a single one
has none, so its tokens are exactly its characters or bytes.

The source is read three times at most (sizes, tokenizer, tokens) and never held: memory
grows by 16 bytes a document, and with `near_duplicates` by a kilobyte a validation
document.
"""

import dataclasses
import hashlib
import math
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from trix_jax.lm.data.datasets import filled_in
from trix_jax.lm.data.near_duplicates import NearDuplicates
from trix_jax.lm.data.sources import Source, describe, infer_source, iter_documents
from trix_jax.lm.data.store import (
    TOKENIZER,
    SplitWriter,
    Store,
    is_store,
    new_store,
    open_store,
    read_manifest,
    write_manifest,
)
from trix_jax.lm.data.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    train_bpe,
)

TOKENIZER_BYTES = 200_000_000  # of training text that a BPE learns from
BATCH_CHARACTERS = 4_000_000
SECONDS_BETWEEN_LINES = 10.0


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What text to learn from, and how it becomes tokens.

    Attributes:
        source: Where documents come from (the table in `sources.py`). With the default
            and a `path`, it is read off the path.
        path: A prepared store, a file or a folder. None: the embedded default, or a
            download.
        tokenizer: Ids are characters of the corpus, UTF-8 bytes, or a byte-level BPE
            trained on the training documents.
        vocab_size: Size of the BPE vocabulary; the other tokenizers have their own.
        val_fraction: Share of the text that is never trained on.
        max_bytes: Stop reading after this much text. None: read all.
        max_tokens: Stop after this many training tokens. None: take all.
        near_duplicates: Leave out training documents whose sets of five successive
            words are at least this similar (Jaccard) to a validation document's. None:
            only exact copies land on one side.
        languages: Of source code, separated by commas. None: all that are known.
        licenses: Of source code; "permissive" takes repositories whose licence file
            says so. None: does not look.
    """

    source: Source = "stdlib"
    path: str | None = None
    tokenizer: Literal["char", "byte", "bpe"] = "byte"
    vocab_size: int = 8192
    val_fraction: float = 0.1
    max_bytes: int | None = None
    max_tokens: int | None = None
    near_duplicates: float | None = None
    languages: str | None = None
    licenses: Literal["permissive"] | None = None


class _Survey(NamedTuple):
    """What a first reading of the documents tells."""

    documents: int
    characters: frozenset[str]  # empty unless asked for
    last_val_key: int  # documents with a key up to this one are validation


def prepare(
    config: DataConfig, directory: str | Path, report: Callable[[str], None] = print
) -> Store:
    """Opens the store that `config` describes, building it in `directory` if it is not
    there yet.

    A store at `config.path` is opened as it is. A store in `directory` is verified and
    opened if it was prepared from the same config; its source is not read again.

    Args:
        config: What to prepare.
        directory: Where the store goes: a name that is free, an empty folder, or a
            store.
        report: Is told in lines what happens.

    Raises:
        ValueError: The config, its source or `directory` is unusable, or the store
            there has another config.
        ConnectionError: Something could not be downloaded.
        RuntimeError: A download is not what it should be.
    """
    _check(config)
    if config.path is not None and is_store(config.path):
        return open_store(config.path)
    if config.source == "stdlib" and config.path is not None:
        config = dataclasses.replace(config, source=infer_source(config.path))
    config = filled_in(config)
    directory = Path(directory)
    if not is_store(directory):
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise ValueError(
                f"directory={str(directory)!r} must be new, empty or a token store; it holds something else, without a manifest.json."
            )
        try:
            with new_store(directory) as building:
                _build(config, building, report)
        except OSError:
            if not is_store(directory):  # else another process prepared it meanwhile
                raise
    _check_same(directory, _recipe(config))
    return open_store(directory)


def _check(config: DataConfig) -> None:
    if not 0 < config.val_fraction < 1:
        raise ValueError(
            f"val_fraction must be between 0 and 1, both excluded. Got {config.val_fraction}."
        )
    for name in ("max_bytes", "max_tokens"):
        if (most := getattr(config, name)) is not None and most < 1:
            raise ValueError(f"{name} must be at least 1, or None. Got {most}.")
    if config.near_duplicates is not None and not 0 < config.near_duplicates < 1:
        raise ValueError(
            "near_duplicates must be between 0 and 1, both excluded, or None. "
            f"Got {config.near_duplicates}."
        )
    if config.tokenizer not in ("char", "byte", "bpe"):
        raise ValueError(
            f"tokenizer must be char, byte or bpe. Got {config.tokenizer!r}."
        )


def _recipe(config: DataConfig) -> dict[str, Any]:
    """The config as the manifest has it: without what has no effect."""
    moot = () if config.tokenizer == "bpe" else ("vocab_size",)
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in moot}


def _check_same(directory: Path, recipe: dict[str, Any]) -> None:
    found = read_manifest(directory)["config"]
    names = sorted(
        name for name in found | recipe if found.get(name) != recipe.get(name)
    )
    if names:
        differ = ", ".join(
            f"{name}={found.get(name)!r} there and {recipe.get(name)!r} here"
            for name in names
        )
        raise ValueError(
            f"directory={str(directory)!r} holds a store of another config: {differ}."
        )


def _build(config: DataConfig, building: Path, report: Callable[[str], None]) -> None:
    def documents(report: Callable[[str], None] = lambda line: None) -> Iterator[str]:
        return iter_documents(
            config.source,
            config.path,
            config.max_bytes,
            report,
            config.languages,
            config.licenses,
        )

    survey = _survey(documents(report), config)
    tokenizer = _make_tokenizer(documents, survey, config)
    tokenizer.save(building / TOKENIZER)
    copies = _near_duplicates(documents, survey, config, report)
    with (
        SplitWriter(building, "train", tokenizer.vocab_size) as train,
        SplitWriter(building, "val", tokenizer.vocab_size) as val,
    ):
        splits = {"train": train, "val": val}
        removed = _write(documents(), splits, survey, tokenizer, copies, config, report)
    source = describe(config.source, config.path)
    write_manifest(building, _recipe(config), source, splits, removed)
    report(
        f"prepared {survey.documents:,} document(s): {source}; {tokenizer.kind} vocabulary of {tokenizer.vocab_size:,}"
    )
    for name, split in splits.items():
        report(f"{name}: {split.tokens:,} tokens, {split.bytes:,} bytes of text")
    if copies:
        report(f"{removed:,} near-duplicate(s) of validation left out of training")
    if config.max_tokens and train.tokens < config.max_tokens:
        report(
            f"the source ended before max_tokens={config.max_tokens:,}: {train.tokens:,} are all there are"
        )


def _near_duplicates(
    documents: Callable[[], Iterable[str]],
    survey: _Survey,
    config: DataConfig,
    report: Callable[[str], None],
) -> NearDuplicates | None:
    if config.near_duplicates is None or survey.documents < 2:
        return None
    report("indexing validation documents, to find their near-duplicates")
    sides = _sides(documents(), survey, config.val_fraction)
    val = (text for side, text in sides if side == "val")
    return NearDuplicates(val, config.near_duplicates)


def _write(
    documents: Iterable[str],
    splits: dict[str, SplitWriter],
    survey: _Survey,
    tokenizer: Tokenizer,
    copies: NearDuplicates | None,
    config: DataConfig,
    report: Callable[[str], None],
) -> int:
    """Writes the tokens of both sides; returns how many documents were left out."""
    end = np.asarray([tokenizer.eot] if survey.documents > 1 else [], np.int32)
    train, removed = splits["train"], 0
    began = last = time.monotonic()
    for batch in _batches(_sides(documents, survey, config.val_fraction)):
        kept = [
            (side, text)
            for side, text in batch
            if side == "val" or copies is None or not copies.holds(text)
        ]
        removed += len(batch) - len(kept)
        encoded = tokenizer.encode_batch([text for _, text in kept])
        for (side, text), ids in zip(kept, encoded, strict=True):
            ids, num_bytes = np.append(ids, end), len(text.encode())
            left = (config.max_tokens or math.inf) - train.tokens
            if side == "train" and len(ids) >= left:
                head = ids[: int(left)]
                train.append(head, num_bytes=num_bytes * len(head) // len(ids))
                return removed
            splits[side].append(ids, num_bytes=num_bytes)
        if time.monotonic() - last > SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            done = sum(split.bytes for split in splits.values())
            report(
                f"{train.tokens:,} training tokens, {done / 1e6 / (last - began):.1f} MB/s"
            )
    return removed


def _batches(sides: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Documents for the cores to share, a few megabytes at a time."""
    batch, characters = [], 0
    for side, text in sides:
        batch.append((side, text))
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _survey(documents: Iterable[str], config: DataConfig) -> _Survey:
    """Reads every document once; keeps 16 bytes of each."""
    keys, sizes, characters = array("Q"), array("Q"), set()
    for text in documents:
        keys.append(_key(text))
        sizes.append(len(text.encode()))
        if config.tokenizer == "char":
            characters.update(text)
    if not keys:
        raise ValueError(
            f"source={config.source!r} at path={config.path!r} holds no text."
        )
    threshold = (
        _last_val_key(np.array(keys), np.array(sizes), config.val_fraction)
        if len(keys) > 1
        else 0
    )
    return _Survey(len(keys), frozenset(characters), threshold)


def _last_val_key(keys: np.ndarray, sizes: np.ndarray, val_fraction: float) -> int:
    order = np.argsort(keys, kind="stable")
    held = np.cumsum(sizes[order])
    last = keys[order[np.searchsorted(held, val_fraction * held[-1])]]
    if last == keys.max():  # leave something to train on
        if keys.min() == keys.max():
            raise ValueError(
                f"the {len(keys)} documents must not all be the same text: validation would repeat training."
            )
        last = keys[keys < keys.max()].max()
    return int(last)


def _key(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _sides(
    documents: Iterable[str], survey: _Survey, val_fraction: float
) -> Iterator[tuple[str, str]]:
    """Yields `("train" | "val", text)` for every document; a single one is cut in two."""
    if survey.documents > 1:
        for text in documents:
            yield ("val" if _key(text) <= survey.last_val_key else "train"), text
        return
    (text,) = documents
    cut = int(len(text) * (1 - val_fraction))
    if not 0 < cut < len(text):
        raise ValueError(
            f"val_fraction={val_fraction} leaves one side of a document of {len(text)} character(s) empty."
        )
    yield "train", text[:cut]
    yield "val", text[cut:]


def _make_tokenizer(
    documents: Callable[[], Iterable[str]], survey: _Survey, config: DataConfig
) -> Tokenizer:
    match config.tokenizer:
        case "char":
            return CharTokenizer(survey.characters, with_eot=survey.documents > 1)
        case "byte":
            return ByteTokenizer()
        case "bpe":
            sides = _sides(documents(), survey, config.val_fraction)
            train = (text for side, text in sides if side == "train")
            return train_bpe(_first(train, TOKENIZER_BYTES), config.vocab_size)


def _first(documents: Iterable[str], num_bytes: int) -> Iterator[str]:
    for text in documents:
        yield text
        num_bytes -= len(text.encode())
        if num_bytes < 0:
            return
