"""Raw text to a token store, in one call.

Documents are split before they are cut into windows (`splits.py`). Several documents end
in the tokenizer's end-of-text id each; a single one has none, so its tokens are exactly
its characters or bytes.

The source is read three times at most (sizes, tokenizer, tokens) and never held: memory
grows by 16 bytes a document, and with `near_duplicates` by a kilobyte a validation
document. One document is held whole, and encoded in parts (`long_texts.py`).
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from trix_jax.lm.data import splits
from trix_jax.lm.data.config import (
    DataConfig,
    changed_tokenizer,
    check,
    check_same,
    check_source,
    for_tokens,
    is_elsewhere,
    recipe,
)
from trix_jax.lm.data.corpus import Corpus, corpus_of
from trix_jax.lm.data.datasets import filled_in
from trix_jax.lm.data.library_tokenizer import LibraryTokenizer
from trix_jax.lm.data.near_duplicates import NearDuplicates
from trix_jax.lm.data.pipeline import check_context
from trix_jax.lm.data.prepare_tokens import build_tokens
from trix_jax.lm.data.prepare_tokens import changes as token_changes
from trix_jax.lm.data.sources import infer_source
from trix_jax.lm.data.store import (
    TOKENIZER,
    SplitWriter,
    Store,
    check_free,
    is_store,
    new_store,
    open_store,
    read_manifest,
    write_manifest,
)
from trix_jax.lm.data.tokenizer import Tokenizer
from trix_jax.lm.data.vocabulary import Losses, make_tokenizer

BATCH_CHARACTERS = 4_000_000
LONG_CHARACTERS = 4_000_000  # of a text that is told when it is encoded in one piece
SECONDS_BETWEEN_LINES = 10.0

Changed = Literal["refuse", "tell", "rebuild"]


def prepare(
    config: DataConfig,
    directory: str | Path,
    report: Callable[[str], None] = print,
    context: int = 1,
    changed: Changed = "refuse",
) -> Store:
    """Opens the store that `config` describes, building it in `directory` if it is not
    there yet.

    A store at `config.path` is opened as it is. A store in `directory` is verified and
    opened if it was prepared from the same config and the same files, or files that are
    gone.

    Args:
        config: What to prepare.
        directory: Where the store goes: a name that is free, an empty folder, or a
            store.
        report: Is told in lines what happens.
        context: Of the model that will read it: both sides of a store that is built
            must hold a window of it.
        changed: What to do about a store whose files changed since: refuse it, tell and
            open it, or build the store again, whatever is there.

    Raises:
        ValueError: The config, its source or `directory` is unusable, the store
            there has another config or was made from other text, or `config.path` is a
            store and to be built again.
        ConnectionError: Something could not be downloaded.
        RuntimeError: A download is not what it should be.
    """
    check(config)
    if config.path is not None and is_store(config.path):
        if changed == "rebuild":
            raise ValueError(
                "path must be text, or tokens, to rebuild a store from. Got the store "
                f"{config.path}."
            )
        return open_store(config.path)
    directory = Path(directory)
    is_kept = changed != "rebuild" and is_store(directory)
    if config.source == "stdlib" and config.path is not None:
        # That of a store that stays, whose path may be gone or look otherwise now.
        made = read_manifest(directory)["config"] if is_kept else {}
        source = made.get("source") or infer_source(config.path)
        config = dataclasses.replace(config, source=source)
    config = for_tokens(filled_in(config))
    if not is_kept:
        check_source(config)
        check_free(directory)
        build = build_tokens if config.source == "tokens" else _build
        try:
            with new_store(directory) as building:
                build(config, building, context, report)
        except OSError:
            if changed == "rebuild" or not is_store(directory):
                raise  # else another process prepared it meanwhile
    wanted = recipe(config)
    moved = is_kept and is_elsewhere(directory, wanted)
    moved = moved and not _changes(config, directory, lambda _: None)
    check_same(directory, wanted, moved=moved)
    if is_kept and not moved and (found := _changes(config, directory, report)):
        said = f"{directory} was prepared from other text than there is now: {found}"
        if changed == "refuse":
            raise ValueError(
                f"{said}. To make it again: trix-jax prepare --rebuild. A run that was "
                "trained on it wants it as it is."
            )
        report(f"{said}. It is used as it is")
    return open_store(directory)


def _changes(config: DataConfig, directory: Path, report: Callable[[str], None]) -> str:
    """How the text, or the tokens, and a tokenizer of one's own differ from those that a
    store was made from, or nothing.
    """
    manifest = read_manifest(directory)
    is_tokens = config.source == "tokens"
    changes = token_changes if is_tokens else _text_changes
    found = (
        changes(config, manifest, report),
        changed_tokenizer(directory, config),
    )
    return ", ".join(filter(None, found))


def _text_changes(
    config: DataConfig, manifest: dict[str, Any], report: Callable[[str], None]
) -> str:
    return corpus_of(config).changes(manifest, report)


def _build(
    config: DataConfig, building: Path, context: int, report: Callable[[str], None]
) -> None:
    corpus = corpus_of(config)
    survey = corpus.survey(report)
    tokenizer = make_tokenizer(corpus, survey)
    tokenizer.save(building / TOKENIZER)
    copies = _near_duplicates(corpus, survey, report)
    with (
        SplitWriter(building, "train", tokenizer.vocab_size) as train,
        SplitWriter(building, "val", tokenizer.vocab_size) as val,
    ):
        written = {"train": train, "val": val}
        removed = _write(corpus, written, survey, tokenizer, copies, report)
    for name, split in (("training", train), ("validation", val)):
        check_context(name, split, context)
    source, sources = corpus.describe(), corpus.note()
    write_manifest(building, recipe(config), source, written, removed, sources)
    count = survey.documents + survey.val_documents
    report(
        f"prepared {count:,} document(s): {source}; {tokenizer.kind} vocabulary of {tokenizer.vocab_size:,}"
    )
    for name, split in written.items():
        report(f"{name}: {split.tokens:,} tokens, {split.bytes:,} bytes of text")
    if copies:
        report(f"{removed:,} near-duplicate(s) of validation left out of training")
    if config.max_tokens and train.tokens < config.max_tokens:
        report(
            f"the source ended before max_tokens={config.max_tokens:,}: {train.tokens:,} are all there are"
        )


def _near_duplicates(
    corpus: Corpus, survey: splits.Survey, report: Callable[[str], None]
) -> NearDuplicates | None:
    threshold = corpus.config.near_duplicates
    if threshold is None or survey.documents + survey.val_documents < 2:
        return None
    report("indexing validation documents, to find their near-duplicates")
    return NearDuplicates(corpus.side("val", survey), threshold)


def _write(
    corpus: Corpus,
    written: dict[str, SplitWriter],
    survey: splits.Survey,
    tokenizer: Tokenizer,
    copies: NearDuplicates | None,
    report: Callable[[str], None],
) -> int:
    """Writes the tokens of both sides; returns how many documents were left out."""
    config = corpus.config
    end = np.asarray([tokenizer.eot] if survey.several else [], np.int32)
    train, removed, read = written["train"], 0, {"train": 0, "val": 0}
    losses, is_told = Losses(tokenizer, config.tokenizer), False
    began = last = time.monotonic()
    for batch in _batches(corpus.sides(survey)):
        for side, text in batch:
            read[side] += len(text.encode())
        left = (config.max_tokens or sys.maxsize) - train.tokens
        wanted = [(side, text) for side, text in batch if side == "val" or left > 0]
        kept = [
            (side, text)
            for side, text in wanted
            if side == "val" or copies is None or not copies.holds(text)
        ]
        removed += len(wanted) - len(kept)
        texts = [text for _, text in kept]
        is_told = is_told or _tell_whole(tokenizer, texts, report)
        encoded = tokenizer.encode_batch(texts)
        losses.see(texts, encoded)
        for (side, text), ids in zip(kept, encoded, strict=True):
            most = max(left, 0) if side == "train" else sys.maxsize
            taken = _append(written[side], np.append(ids, end), text, most)
            left -= taken if side == "train" else 0
        if time.monotonic() - last > SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            rate = sum(read.values()) / 1e6 / (last - began)
            report(f"{train.tokens:,} training tokens, {rate:.1f} MB/s")
    splits.check_share(survey, config.val_fraction, read)
    losses.tell(report)
    return removed


def _tell_whole(
    tokenizer: Tokenizer, texts: list[str], report: Callable[[str], None]
) -> bool:
    """Says, before memory may end, that a long text cannot be encoded in parts; returns
    whether it did.
    """
    for text in texts:
        if len(text) <= LONG_CHARACTERS or not isinstance(tokenizer, LibraryTokenizer):
            continue
        if (most := max(map(len, tokenizer.parts(text)))) > LONG_CHARACTERS:
            report(
                f"{most:,} characters of a text are encoded in one piece, which may take "
                "over a hundred times their size in memory: where this tokenizer could "
                "cut them is not known. Shorter documents take less"
            )
            return True
    return False


def _append(split: SplitWriter, ids: np.ndarray, text: str, most: int) -> int:
    """Appends the tokens of a text, `most` of them; returns how many."""
    head = ids[:most]
    split.append(head, num_bytes=len(text.encode()) * len(head) // max(len(ids), 1))
    return len(head)


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
