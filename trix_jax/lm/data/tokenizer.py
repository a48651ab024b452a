"""Text to token ids and back: characters, bytes, a tokenizer of Hugging Face's library
(`library_tokenizer.py`; `bpe.py` trains one), or ids alone.

A tokenizer knows `kind`, `vocab_size`, the id `eot` that ends a document (None if the
vocabulary has none), `encode`, `decode` and `save`. `encode` never produces `eot`, not
even from text that spells it; `decode` spells it, for characters and bytes as
`<|endoftext|>`.

`tokenizer.json` is, for the library's, the library's file format; for the others, the
object `{"trix_tokenizer": "char" | "byte" | "none", "version": 1, "characters": "all, by
code point", "vocab_size": of "none", "eot": id or null}`. A library's file whose end mark
has no known name, or which has several, stands in `{"trix_tokenizer": "library",
"version": 1, "eot": token or null, "tokenizer": the file}`.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, Int64, Integer

from trix_jax.lm.data.library_tokenizer import (
    EOT,
    LibraryTokenizer,
    NoMark,
    Saved,
    checked,
    known_mark,
)
from trix_jax.lm.data.long_texts import PART

TOKENIZER = "tokenizer.json"
FORMAT_VERSION = 1


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of the package asks of a tokenizer."""

    kind: str
    eot: int | None

    @property
    def vocab_size(self) -> int:
        """Number of ids; they are 0 to vocab_size - 1."""
        ...

    def encode(self, text: str) -> Int32[np.ndarray, " T"]:
        """Ids of a text, without `eot`."""
        ...

    def encode_batch(self, texts: list[str]) -> list[Int32[np.ndarray, " T"]]:
        """Ids of several texts; on all cores where the library can."""
        ...

    def decode(self, ids: Iterable[int] | Integer[np.ndarray, " T"]) -> str:
        """Text of some ids; bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: An id is outside the vocabulary.
        """
        ...

    def token_bytes(self) -> Int64[np.ndarray, " V"] | None:
        """UTF-8 bytes of the text of each token, 0 for `eot`; None where there is no
        such number.
        """
        ...

    def content(self) -> str:
        """The content of its `tokenizer.json`: two of equal content are the same."""
        ...

    def save(self, path: str | Path) -> None:
        """Writes the JSON file that `load_tokenizer` reads."""
        ...


class CharTokenizer(Saved):
    """One id a character, ordered by code point; with `with_eot`, one more for the end
    of a document.
    """

    kind: str = "char"

    def __init__(self, characters: Iterable[str], with_eot: bool = False):
        self.characters = "".join(sorted(set(characters)))
        self._codes = _code_points(self.characters)
        self.eot = len(self.characters) if with_eot else None
        self._pieces = [*self.characters, EOT] if with_eot else list(self.characters)

    @property
    def vocab_size(self) -> int:
        return len(self._pieces)

    def encode(self, text: str) -> Int32[np.ndarray, " T"]:
        starts = range(0, max(len(text), 1), PART)
        found = [self._encode_part(text[at : at + PART], at) for at in starts]
        return np.concatenate(found)

    def _encode_part(self, text: str, start: int) -> Int32[np.ndarray, " T"]:
        codes = _code_points(text)
        ids = np.minimum(
            np.searchsorted(self._codes, codes), len(self._codes) - 1
        ).astype(np.int32)
        known = self._codes[ids] == codes
        if not known.all():
            at = int(np.argmin(known))
            raise ValueError(
                f"text must use the {len(self._codes)} characters of the corpus. Got {text[at]!r} at {start + at}."
            )
        return ids

    def encode_batch(self, texts: list[str]) -> list[Int32[np.ndarray, " T"]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int] | Integer[np.ndarray, " T"]) -> str:
        return "".join(map(self._pieces.__getitem__, checked(ids, self.vocab_size)))

    def token_bytes(self) -> Int64[np.ndarray, " V"]:
        sizes = [len(c.encode()) for c in self.characters]
        return np.asarray(sizes + [0] * (self.eot is not None), np.int64)

    def content(self) -> str:
        return _json(
            trix_tokenizer="char",
            version=FORMAT_VERSION,
            characters=self.characters,
            eot=self.eot,
        )


class ByteTokenizer(Saved):
    """One id a UTF-8 byte, 0 to 255, and 256 for the end of a document."""

    kind: str = "byte"

    def __init__(self):
        self.eot: int | None = 256

    @property
    def vocab_size(self) -> int:
        return 257

    def encode(self, text: str) -> Int32[np.ndarray, " T"]:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def encode_batch(self, texts: list[str]) -> list[Int32[np.ndarray, " T"]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int] | Integer[np.ndarray, " T"]) -> str:
        pieces = (
            bytes([i]) if i < 256 else EOT.encode()
            for i in checked(ids, self.vocab_size)
        )
        return b"".join(pieces).decode(errors="replace")

    def token_bytes(self) -> Int64[np.ndarray, " V"]:
        return np.asarray([1] * 256 + [0], np.int64)

    def content(self) -> str:
        return _json(trix_tokenizer="byte", version=FORMAT_VERSION, eot=self.eot)


class IdTokenizer(Saved):
    """Ids that nobody knows the text of; `decode` writes them as numbers."""

    kind: str = "none"

    def __init__(self, vocab_size: int, eot: int | None = None):
        self._size, self.eot = vocab_size, eot

    @property
    def vocab_size(self) -> int:
        return self._size

    def encode(self, text: str) -> Int32[np.ndarray, " T"]:
        raise ValueError(
            "the tokens were given without a tokenizer, so that text has no ids here. "
            "Give ids (generate --prompt-ids), or prepare the tokens with --data.tokenizer."
        )

    def encode_batch(self, texts: list[str]) -> list[Int32[np.ndarray, " T"]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int] | Integer[np.ndarray, " T"]) -> str:
        return " ".join(map(str, checked(ids, self._size)))

    def token_bytes(self) -> None:
        return None

    def content(self) -> str:
        own = {"vocab_size": self._size, "eot": self.eot}
        return _json(trix_tokenizer="none", version=FORMAT_VERSION, **own)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a `tokenizer.json` of any of the formats.

    Raises:
        ValueError: The file is missing, or is none of them.
    """
    return own_tokenizer(path, None)


def own_tokenizer(path: str | Path, end_of_text: str | None) -> Tokenizer:
    """Reads a `tokenizer.json`, or that of a folder.

    Args:
        end_of_text: The token that ends a document; None takes the one of a known name.

    Raises:
        ValueError: The file is missing or is no tokenizer, or the end mark is no token,
            or one of several.
    """
    path = Path(path)
    path = path / TOKENIZER if path.is_dir() else path
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if "trix_tokenizer" not in saved:
            mark = known_mark(saved) if end_of_text is None else end_of_text
            return LibraryTokenizer(saved, mark)
        return _load_own(saved, end_of_text)
    except NoMark:
        raise
    except Exception as error:  # `tokenizers` raises bare Exception
        raise ValueError(
            f"{path} is not a readable tokenizer file ({type(error).__name__}: {error})."
        ) from error


def _load_own(saved: dict, end_of_text: str | None) -> Tokenizer:
    if saved["version"] != FORMAT_VERSION:
        raise ValueError(f"version must be {FORMAT_VERSION}. Got {saved['version']!r}.")
    match saved["trix_tokenizer"]:
        case "char":
            tokenizer = CharTokenizer(
                saved["characters"], with_eot=saved["eot"] is not None
            )
            if tokenizer.characters != saved["characters"]:
                raise ValueError(
                    "characters must be distinct and ordered by code point."
                )
        case "byte":
            tokenizer = ByteTokenizer()
        case "none":
            tokenizer = IdTokenizer(saved["vocab_size"], saved["eot"])
        case "library":
            return LibraryTokenizer(saved["tokenizer"], end_of_text or saved["eot"])
        case kind:
            raise ValueError(
                f"trix_tokenizer must be char, byte, none or library. Got {kind!r}."
            )
    if end_of_text is not None:
        raise NoMark(
            f"end_of_text={end_of_text!r} must be left out: the tokenizer has its own."
        )
    if tokenizer.eot != saved["eot"]:
        raise ValueError(f"eot must be {tokenizer.eot}. Got {saved['eot']!r}.")
    return tokenizer


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _json(**fields: object) -> str:
    return json.dumps(fields, ensure_ascii=False, indent=1) + "\n"
