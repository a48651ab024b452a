"""Text to token ids and back: characters, bytes, or a byte-level BPE trained on the
corpus.

A tokenizer knows `kind`, `vocab_size`, the id `eot` that ends a document (None if the
vocabulary has none), `encode`, `decode` and `save`. `encode` never produces `eot`, not
even from text that spells it; `decode` writes it as `<|endoftext|>`.

`tokenizer.json` is, for BPE, the file format of Hugging Face's `tokenizers`; for the
others, the object `{"trix_tokenizer": "char" | "byte", "version": 1, "characters":
"all, by code point", "eot": id or null}`.
"""

import concurrent.futures
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
import tokenizers
from jaxtyping import Int32, Integer
from tokenizers import decoders, models, pre_tokenizers, trainers

EOT = "<|endoftext|>"
FORMAT_VERSION = 1
LONG_WORD = 2000
_SPACES = re.compile(rf"\s{{{LONG_WORD}}}")
_RUNS = re.compile(
    "|".join(
        f"(?<!{kind}){kind}{{{LONG_WORD},}}"
        for kind in (r"[^\W\d_]", r"\d", r"[^\w\s]", "_", r"\s")
    )
)


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of the package asks of a tokenizer."""

    kind: ClassVar[str]
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

    def save(self, path: str | Path) -> None:
        """Writes the JSON file that `load_tokenizer` reads."""
        ...


class CharTokenizer:
    """One id a character, ordered by code point; with `with_eot`, one more for the end
    of a document.
    """

    kind: ClassVar[str] = "char"

    def __init__(self, characters: Iterable[str], with_eot: bool = False):
        self.characters = "".join(sorted(set(characters)))
        self._codes = _code_points(self.characters)
        self.eot = len(self.characters) if with_eot else None
        self._pieces = [*self.characters, EOT] if with_eot else list(self.characters)

    @property
    def vocab_size(self) -> int:
        return len(self._pieces)

    def encode(self, text: str) -> Int32[np.ndarray, " T"]:
        codes = _code_points(text)
        ids = np.minimum(
            np.searchsorted(self._codes, codes), len(self._codes) - 1
        ).astype(np.int32)
        known = self._codes[ids] == codes
        if not known.all():
            at = int(np.argmin(known))
            raise ValueError(
                f"text must use the {len(self._codes)} characters of the corpus. Got {text[at]!r} at {at}."
            )
        return ids

    def encode_batch(self, texts: list[str]) -> list[Int32[np.ndarray, " T"]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int] | Integer[np.ndarray, " T"]) -> str:
        return "".join(map(self._pieces.__getitem__, _checked(ids, self.vocab_size)))

    def save(self, path: str | Path) -> None:
        _save(
            path,
            trix_tokenizer="char",
            version=FORMAT_VERSION,
            characters=self.characters,
            eot=self.eot,
        )


class ByteTokenizer:
    """One id a UTF-8 byte, 0 to 255, and 256 for the end of a document."""

    kind: ClassVar[str] = "byte"

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
            for i in _checked(ids, self.vocab_size)
        )
        return b"".join(pieces).decode(errors="replace")

    def save(self, path: str | Path) -> None:
        _save(path, trix_tokenizer="byte", version=FORMAT_VERSION, eot=self.eot)


class BPETokenizer:
    """Byte-level BPE (GPT-2's pre-tokenization) of Hugging Face's `tokenizers`; any
    text encodes, and comes back exactly.
    """

    kind: ClassVar[str] = "bpe"

    def __init__(self, inner: tokenizers.Tokenizer):
        inner.encode_special_tokens = True  # text that spells <|endoftext|> is text
        self._inner = inner
        self.eot: int | None = inner.token_to_id(EOT)

    @property
    def vocab_size(self) -> int:
        return self._inner.get_vocab_size()

    def encode(self, text: str) -> Int32[np.ndarray, " T"]:
        (ids,) = self.encode_batch([text])
        return ids

    def encode_batch(self, texts: list[str]) -> list[Int32[np.ndarray, " T"]]:
        # This call keeps no offsets and is a third faster, for one text too.
        encode = self._inner.encode_batch_fast
        encoded = interruptible(lambda: encode(texts, add_special_tokens=False))
        return [np.asarray(one.ids, np.int32) for one in encoded]

    def decode(self, ids: Iterable[int] | Integer[np.ndarray, " T"]) -> str:
        return self._inner.decode(
            _checked(ids, self.vocab_size), skip_special_tokens=False
        )

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self._inner.to_str(pretty=True), encoding="utf-8")


def train_bpe(documents: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Trains a byte-level BPE; a corpus with too few distinct pairs gives a smaller
    vocabulary than asked for.

    A word over LONG_WORD characters is learned from in pieces of that many: the time
    that a merge takes is that of moving what stands behind it in the word.

    Raises:
        ValueError: `vocab_size` has no room for 256 bytes, the end of a document and
            one merge.
    """
    if vocab_size < 258:
        raise ValueError(
            f"vocab_size must be at least 258 for bpe (256 bytes, {EOT}, one merge). Got {vocab_size}."
        )
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOT],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    pieces = (piece for text in documents for piece in _pieces(text))
    interruptible(lambda: inner.train_from_iterator(pieces, trainer))
    return BPETokenizer(inner)


def _pieces(text: str) -> Iterator[str]:
    """The text, cut only inside runs of LONG_WORD or more characters of one kind, which
    make a word.
    """
    start = 0
    if max(map(len, text.split()), default=0) >= LONG_WORD or _SPACES.search(text):
        for run in _RUNS.finditer(text):
            for cut in range(run.start() + LONG_WORD, run.end() + 1, LONG_WORD):
                yield text[start:cut]
                start = cut
    if start < len(text):
        yield text[start:]


def interruptible[Result](action: Callable[[], Result]) -> Result:
    """Runs what is deaf to signals, a library's long call, in a thread of its own, so
    that a handler may raise meanwhile; the thread then ends with the process.
    """
    if threading.current_thread() is not threading.main_thread():
        return action()
    future: concurrent.futures.Future[Result] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    while True:
        try:
            return future.result(timeout=0.1)
        except TimeoutError:
            if future.done():
                raise


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a `tokenizer.json` of either format.

    Raises:
        ValueError: The file is missing, or is neither format.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        saved = json.loads(text)
        if "trix_tokenizer" not in saved:
            return BPETokenizer(tokenizers.Tokenizer.from_str(text))
        return _load_own(saved)
    except Exception as error:  # `tokenizers` raises bare Exception
        raise ValueError(
            f"{path} is not a readable tokenizer file ({type(error).__name__}: {error})."
        ) from error


def _load_own(saved: dict) -> Tokenizer:
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
        case kind:
            raise ValueError(f'trix_tokenizer must be "char" or "byte". Got {kind!r}.')
    if tokenizer.eot != saved["eot"]:
        raise ValueError(f"eot must be {tokenizer.eot}. Got {saved['eot']!r}.")
    return tokenizer


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _checked(ids: Iterable[int] | np.ndarray, vocab_size: int) -> list[int]:
    ids = np.asarray(list(ids), np.int64)
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(
            f"ids must be in 0 to {vocab_size - 1}. Got {ids.min()} to {ids.max()}."
        )
    return ids.tolist()


def _save(path: str | Path, **fields: object) -> None:
    Path(path).write_text(
        json.dumps(fields, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
    )
