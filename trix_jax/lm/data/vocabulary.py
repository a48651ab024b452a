"""The tokenizer of a corpus: one of its own making, or a file's."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Int32

from trix_jax.lm.data import splits
from trix_jax.lm.data.bpe import train_bpe
from trix_jax.lm.data.config import BPE_SIZE, NAMED
from trix_jax.lm.data.corpus import Corpus
from trix_jax.lm.data.library_tokenizer import KNOWN_MARKS
from trix_jax.lm.data.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    own_tokenizer,
)

TOKENIZER_BYTES = 200_000_000  # of training text that a BPE learns from
TRIED = 100  # documents that are decoded again, to see what comes back


def make_tokenizer(corpus: Corpus, survey: splits.Survey) -> Tokenizer:
    """What turns the corpus into ids.

    Raises:
        ValueError: A file is no tokenizer, or has no end mark for several documents.
    """
    config = corpus.config
    match config.tokenizer:
        case "char":
            return CharTokenizer(survey.characters, with_eot=survey.several)
        case "byte":
            return ByteTokenizer()
        case "bpe":
            train = _first(corpus.side("train", survey), TOKENIZER_BYTES)
            return train_bpe(train, config.vocab_size or BPE_SIZE)
        case path:
            return _of_file(path, config.end_of_text, survey.several)


def _of_file(path: str, end_of_text: str | None, needs_mark: bool) -> Tokenizer:
    found = own_tokenizer(path, end_of_text)
    if found.kind == "none":
        raise ValueError(f"{path} knows ids alone: it cannot make any of text.")
    if needs_mark and found.eot is None:
        raise ValueError(
            f"{path} must have a token that ends a document, and has none of a known name "
            f"({', '.join(KNOWN_MARKS)}): say which one does, --data.end-of-text TOKEN."
        )
    return found


def _first(documents: Iterable[str], num_bytes: int) -> Iterator[str]:
    for text in documents:
        yield text
        num_bytes -= len(text.encode())
        if num_bytes < 0:
            return


class Losses:
    """What text loses on its way through a tokenizer, seen while a store is written."""

    def __init__(self, tokenizer: Tokenizer, name: str):
        """A look at what `tokenizer` makes of text.

        Args:
            name: The config's, of the tokenizer; those that need no file lose nothing.
        """
        self._tokenizer = tokenizer
        self._left = 0 if name in NAMED else TRIED
        eot = tokenizer.eot
        self._mark = None if eot is None else tokenizer.decode([eot])
        self._spelled, self._changed = 0, ""

    def see(self, texts: Sequence[str], ids: Sequence[Int32[np.ndarray, " _"]]) -> None:
        """Takes texts and their ids."""
        if self._mark:
            self._spelled += sum(text.count(self._mark) for text in texts)
        for text, own in list(zip(texts, ids, strict=True))[: self._left]:
            self._left -= 1
            back = self._tokenizer.decode(own)
            # A space before the first word is the habit of many.
            text, back = text.removeprefix(" "), back.removeprefix(" ")
            if back != text:
                self._changed = self._changed or _difference(text, back)

    def tell(self, report: Callable[[str], None]) -> None:
        """Says what was seen, if anything."""
        if self._spelled:
            report(
                f"text spells the end mark {self._mark} {self._spelled:,} time(s): it "
                "stays text there, and ends no document"
            )
        if self._changed:
            report(
                f"the tokenizer does not give text back as it was ({self._changed}): "
                "bits per byte count the bytes of the text as it was"
            )


def _difference(text: str, back: str) -> str:
    pairs = zip(text, back, strict=False)
    at = next(
        (i for i, (a, b) in enumerate(pairs) if a != b), min(len(text), len(back))
    )
    return f"{text[at : at + 20]!r} became {back[at : at + 20]!r}"
