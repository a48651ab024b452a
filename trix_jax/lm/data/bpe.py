"""A byte-level BPE trained on the corpus, by Hugging Face's `tokenizers`; GPT-2's
pre-tokenization.
"""

import json
import re
from collections.abc import Iterable, Iterator

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from trix_jax.lm.data.interruptible import interruptible
from trix_jax.lm.data.library_tokenizer import EOT, LibraryTokenizer
from trix_jax.lm.data.long_texts import cuts_of, parts

LONG_WORD = 2000
_SPACES = re.compile(rf"\s{{{LONG_WORD}}}")
_RUNS = re.compile(
    "|".join(
        f"(?<!{kind}){kind}{{{LONG_WORD},}}"
        for kind in (r"[^\W\d_]", r"\d", r"[^\w\s]", "_", r"\s")
    )
)


def train_bpe(documents: Iterable[str], vocab_size: int) -> LibraryTokenizer:
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
    cuts = cuts_of(json.loads(inner.to_str()))
    pieces = (
        part
        for text in documents
        for piece in _pieces(text)
        for part in parts(piece, cuts)
    )
    interruptible(lambda: inner.train_from_iterator(pieces, trainer))
    return LibraryTokenizer(json.loads(inner.to_str()), EOT)


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
