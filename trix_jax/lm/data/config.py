"""What text to learn from and how it becomes tokens, and what a store says of that.

A store that is there decides: its manifest has the config that it was made with. A
preset yields to it; a flag that somebody typed and that says otherwise is an error.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from trix_jax.lm.data.sources import Source
from trix_jax.lm.data.store import Store, is_store, open_store, read_manifest


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What text to learn from, and how it becomes tokens.

    Attributes:
        source: Where documents come from (the table in `sources.py`). With the default
            and a `path`, it is read off the path.
        path: A prepared store, a file or a folder. None: the embedded default, or a
            download.
        val_path: A file or a folder of text that is validation, as it is; all text at
            `path` is then training, and `val_fraction` says nothing. None: a share of
            the text is.
        tokenizer: Ids are characters of the corpus, UTF-8 bytes, or a byte-level BPE
            trained on the training documents.
        vocab_size: Size of the BPE vocabulary; the other tokenizers have their own.
        val_fraction: Share of the text that is never trained on.
        max_bytes: Stop reading after this much text, not counting that of `val_path`.
            None: read all.
        max_tokens: Take this many training tokens; validation stays as it is. None:
            take all.
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
    val_path: str | None = None


def check(config: DataConfig) -> None:
    """Raises a ValueError for a number or name that cannot be."""
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
    if config.val_path is not None and is_store(config.val_path):
        raise ValueError(
            f"val_path must be text, not a token store. Got {config.val_path!r}."
        )
    if config.tokenizer not in ("char", "byte", "bpe"):
        raise ValueError(
            f"tokenizer must be char, byte or bpe. Got {config.tokenizer!r}."
        )


def recipe(config: DataConfig) -> dict[str, Any]:
    """The config as the manifest has it: without what has no effect."""
    moot = () if config.tokenizer == "bpe" else ("vocab_size",)
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in moot}


def check_same(directory: Path, wanted: dict[str, Any]) -> None:
    """Raises a ValueError that names what the store there was made with instead."""
    found = read_manifest(directory)["config"]
    names = sorted(
        name for name in found | wanted if found.get(name) != wanted.get(name)
    )
    if names:
        differ = ", ".join(
            f"{name}={found.get(name)!r} there and {wanted.get(name)!r} here"
            for name in names
        )
        raise ValueError(
            f"directory={str(directory)!r} holds a store of another config: {differ}."
        )


def made_with(store: Store, path: str | None) -> DataConfig:
    """The config that a store was made with, `path` being where it lies: what a run on
    it records. A vocabulary size that had no effect is the tokenizer's own.
    """
    known = {field.name for field in dataclasses.fields(DataConfig)}
    found = {k: v for k, v in store.manifest["config"].items() if k in known}
    size = store.tokenizer.vocab_size
    values: dict[str, Any] = {"vocab_size": size, **found, "path": path}
    return DataConfig(**values)


def check_typed(config: DataConfig, flags: Sequence[str]) -> None:
    """Checks the flags of a command line against the store at `config.path`, if there is
    one.

    Raises:
        ValueError: one of them, `--data.NAME`, says what is not so of the store.
    """
    if config.path is None or not is_store(config.path):
        return
    found = made_with(open_store(config.path, verify=False), config.path)
    for flag in flags:
        section, _, name = flag.partition("=")[0].partition(".")
        name = name.replace("-", "_")
        if section != "--data" or not hasattr(config, name):
            continue
        there, typed = getattr(found, name), getattr(config, name)
        if there != typed:
            raise ValueError(
                f"--data.{name.replace('_', '-')} {typed} is not what the store at "
                f"{config.path} was made with, {name}={there}. Leave the flag out, or "
                "prepare another store."
            )
