"""What text to learn from and how it becomes tokens, and what a store says of that.

A store that is there decides: its manifest has the config that it was made with. A
preset yields to it; a flag that somebody typed and that says otherwise is an error.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from trix_jax.lm.data.sources import Source, infer_source
from trix_jax.lm.data.store import (
    TOKENIZER,
    Store,
    is_store,
    open_store,
    read_manifest,
)
from trix_jax.lm.data.tokenizer import load_tokenizer, own_tokenizer

NAMED = ("char", "byte", "bpe")  # tokenizers that need no file
NONE = "none"  # of token files that came without one
BPE_SIZE = 8192
OF_TEXT = ("max_bytes", "near_duplicates", "languages", "licenses")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What text to learn from, and how it becomes tokens. A `pathlib.Path` given for
    `path`, `val_path` or `tokenizer` is kept as its text.

    Attributes:
        source: Where documents come from (the table in `sources.py`). With the default
            and a `path`, it is read off the path.
        path: A prepared store, a file or a folder. None: the embedded default, or a
            download.
        val_path: A file or a folder that is validation, as it is; all else that is at
            `path` is then training, and `val_fraction` says nothing. It may lie inside
            of `path`, and shares no file with it otherwise. A folder beside source code
            is source code, of the same languages and licences. None: the files that say
            so in their names beside training files are (`sides.py`), else a share.
        tokenizer: Ids are characters of the corpus ("char"), UTF-8 bytes ("byte"), a
            byte-level BPE trained on the training documents ("bpe"), or those of a
            `tokenizer.json`, Hugging Face's or a run's: its path, or its folder's. Token
            files have none but such a file.
        end_of_text: The token of a `tokenizer.json` that ends a document; for token
            files without one, its id. None: one of a known name (`<|endoftext|>`,
            `</s>`, ...).
        vocab_size: Size of the BPE vocabulary, None is 8192; the other tokenizers have
            their own. Of token files without a tokenizer, None is the greatest id and
            one.
        val_fraction: Share of the text that is never trained on.
        max_bytes: Stop reading after this much text, not counting that of `val_path`.
            None: read all.
        max_tokens: Take this many training tokens; validation stays as it is. None:
            take all.
        near_duplicates: Leave out training documents whose sets of five successive
            words are at least this similar (Jaccard) to a validation document's. None:
            exact copies land on one side of a share; those that a validation set of
            its own has too stay in training, and are counted.
        languages: Of source code, separated by commas. None: all that are known.
        licenses: Of source code; "permissive" takes repositories whose licence file
            says so. None: does not look.
    """

    source: Source = "stdlib"
    path: str | None = None
    tokenizer: str = "byte"
    vocab_size: int | None = None
    val_fraction: float = 0.1
    max_bytes: int | None = None
    max_tokens: int | None = None
    near_duplicates: float | None = None
    languages: str | None = None
    licenses: Literal["permissive"] | None = None
    val_path: str | None = None
    end_of_text: str | None = None

    def __post_init__(self):
        for name in ("path", "val_path", "tokenizer"):
            if isinstance(value := getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(value))


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


def check_source(config: DataConfig) -> None:
    """Raises a ValueError for a setting that is of no use with the source, or a tokenizer
    that is none.
    """
    name = config.tokenizer
    is_path = name.endswith(".json") or "/" in name or Path(name).exists()
    if name not in (*NAMED, NONE) and not is_path:
        raise ValueError(
            f"tokenizer must be char, byte, bpe or the path of a tokenizer.json. Got {name!r}."
        )
    is_file = config.tokenizer not in (*NAMED, NONE)
    if config.source == "tokens":
        if config.path is None:
            raise ValueError("source='tokens' needs a path: a file or a folder.")
        for name in OF_TEXT:
            if (value := getattr(config, name)) is not None:
                raise ValueError(
                    f"{name} is of text, and {config.path} holds tokens. Got {value}."
                )
    elif config.tokenizer == NONE:
        raise ValueError(f"tokenizer=none is of token files. Got {config.source} text.")
    elif config.end_of_text is not None and not is_file:
        raise ValueError(
            f"end_of_text={config.end_of_text!r} is a token of a tokenizer.json, and "
            f"tokenizer={config.tokenizer} has its own."
        )


def for_tokens(config: DataConfig) -> DataConfig:
    """The config with what is true of token files: their ids are not characters, bytes
    or a BPE that is still to be trained.
    """
    if config.source != "tokens" or config.tokenizer not in NAMED:
        return config
    return dataclasses.replace(config, tokenizer=NONE)


def recipe(config: DataConfig) -> dict[str, Any]:
    """The config as the manifest has it: without what has no effect."""
    found: dict[str, Any] = dataclasses.asdict(config)
    if config.tokenizer == "bpe":
        found["vocab_size"] = config.vocab_size or BPE_SIZE
    elif config.tokenizer != NONE:
        del found["vocab_size"]
    return found


def is_elsewhere(directory: Path, wanted: dict[str, Any]) -> bool:
    """Whether the text that is asked for lies, or is called, elsewhere than that whose
    files a store noted, so that they can be compared.
    """
    manifest = read_manifest(directory)
    before, path = manifest["config"].get("path"), wanted.get("path")
    if before is None or path is None or before == path:
        return False
    noted = manifest.get("sources", {}).get("files")
    places = [path, *filter(None, [wanted.get("val_path")])]
    return bool(noted) and all(Path(place).exists() for place in places)


def check_same(directory: Path, wanted: dict[str, Any], *, moved: bool = False) -> None:
    """Raises a ValueError that names what the store there was made with instead.

    Args:
        moved: the text is the same one in another place.
    """
    found = read_manifest(directory)["config"]
    if moved:
        found = found | {"path": wanted.get("path")}
    names = sorted(
        name for name in found | wanted if found.get(name) != wanted.get(name)
    )
    if "tokenizer" in names and _gives(
        wanted["tokenizer"], wanted.get("end_of_text"), directory
    ):
        names = [name for name in names if name not in ("tokenizer", "end_of_text")]
    if names:
        differ = ", ".join(
            f"{name}={found.get(name)!r} there and {wanted.get(name)!r} here"
            for name in names
        )
        raise ValueError(
            f"directory={str(directory)!r} holds a store of another config: {differ}."
        )


def changed_tokenizer(directory: Path, config: DataConfig) -> str:
    """Says that the tokenizer's file is another now than that of the store; nothing if
    it is not, or gone.
    """
    name = config.tokenizer
    is_there = name not in (*NAMED, NONE) and Path(name).exists()
    is_same = not is_there or _gives(name, config.end_of_text, directory)
    return "" if is_same else f"{Path(name).name} changed"


def _gives(name: str, end_of_text: str | None, store: Path) -> bool:
    """Whether a tokenizer's file is the store's tokenizer, by content."""
    if name in (*NAMED, NONE) or not Path(name).exists():
        return False
    own = own_tokenizer(name, end_of_text)
    return own.content() == load_tokenizer(store / TOKENIZER).content()


def made_with(store: Store, path: str | None) -> DataConfig:
    """The config that a store was made with, `path` being where it lies: what a run on
    it records. A vocabulary size that had no effect is the tokenizer's own.
    """
    known = {field.name for field in dataclasses.fields(DataConfig)}
    found = {k: v for k, v in store.manifest["config"].items() if k in known}
    size = store.tokenizer.vocab_size
    values: dict[str, Any] = {**found, "path": path}
    values["vocab_size"] = found.get("vocab_size") or size
    return DataConfig(**values)


def check_typed(config: DataConfig, flags: Sequence[str]) -> None:
    """Checks the flags of a command line against what is at `config.path`: a store, or
    token files.

    Raises:
        ValueError: one of them, `--data.NAME`, says what is not so.
    """
    if config.path is None:
        return
    typed = _typed(config, flags)
    if not is_store(config.path):
        _check_of_tokens(config, typed)
        return
    store = open_store(config.path, verify=False)
    found = made_with(store, config.path)
    for name in typed:
        there, value = getattr(found, name), getattr(config, name)
        if there == value or _says_same(name, config, store):
            continue
        raise ValueError(
            f"--data.{name.replace('_', '-')} {value} is not what the store at "
            f"{config.path} was made with, {name}={there}. Leave the flag out, or "
            "prepare another store."
        )


def _typed(config: DataConfig, flags: Sequence[str]) -> list[str]:
    """Settings of the data that a command line has."""
    parts = (flag.partition("=")[0].partition(".") for flag in flags)
    names = [part[2].replace("-", "_") for part in parts if part[0] == "--data"]
    return [name for name in names if hasattr(config, name)]


def _says_same(name: str, config: DataConfig, store: Store) -> bool:
    """Whether a setting of another spelling means what the store has."""
    own = store.tokenizer
    if name == "end_of_text" and own.eot is not None:
        return own.decode([own.eot]) == config.end_of_text
    is_tokenizer = name == "tokenizer"
    return is_tokenizer and _gives(
        config.tokenizer, config.end_of_text, store.directory
    )


def _check_of_tokens(config: DataConfig, typed: Sequence[str]) -> None:
    is_named = "tokenizer" in typed and config.tokenizer in NAMED
    if is_named and is_of_tokens(config):
        raise ValueError(
            f"--data.tokenizer {config.tokenizer} makes tokens of text, and {config.path} "
            "holds tokens. Give the tokenizer.json that they were made with, or none."
        )
    is_file = config.tokenizer not in (*NAMED, NONE)
    if "vocab_size" in typed and is_file and config.vocab_size is not None:
        size = own_tokenizer(config.tokenizer, config.end_of_text).vocab_size
        if config.vocab_size != size:
            raise ValueError(
                f"--data.vocab-size {config.vocab_size} must be the tokenizer's {size}, "
                "or left out."
            )


def is_of_tokens(config: DataConfig) -> bool:
    """Whether a config names token files, or a path that looks so."""
    if config.source != "stdlib":
        return config.source == "tokens"
    try:
        return infer_source(config.path or "") == "tokens"
    except ValueError:
        return False  # what is wrong with the path is said where it is read
