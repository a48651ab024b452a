"""Tokenizers of Hugging Face's library: those trained here, and a `tokenizer.json` of
one's own.

Ids are the file's. What the file would do beside that is left out: nothing is cut or
padded to a length, and no mark is put before or behind a text. Special tokens that a
text spells become their ids, as the library has it; only the end mark does not: text
that spells it stays text, as in nanoGPT, so that the end mark is where a document ends.
"""

import copy
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int32, Int64, Integer
from tokenizers import pre_tokenizers

from trix_jax.lm.data.interruptible import interruptible
from trix_jax.lm.data.long_texts import PART, cuts_of, parts

EOT = "<|endoftext|>"
KNOWN_MARKS = (
    EOT,
    "<|end_of_text|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
)
CALL = 16 * PART  # characters that a call of the library encodes, about
HIDDEN = "\ufdd0end of text\ufdd1"  # noncharacters, which no text holds


class NoMark(ValueError):
    """An end mark that is none, or one of several."""


class Saved:
    """What all tokenizers share."""

    def content(self) -> str:
        """The content of its `tokenizer.json`: two of equal content are the same."""
        raise NotImplementedError

    def save(self, path: str | Path) -> None:
        """Writes the file that `load_tokenizer` reads."""
        Path(path).write_text(self.content(), encoding="utf-8")


class LibraryTokenizer(Saved):
    """A tokenizer of Hugging Face's `tokenizers`.

    Attributes:
        kind: Its model: bpe, unigram, wordpiece or wordlevel.
        mark: The token that ends a document; None if there is none.
    """

    def __init__(self, tree: dict[str, Any], mark: str | None):
        """A tokenizer from its file.

        Args:
            tree: The content of a `tokenizer.json`.
            mark: The token that ends a document.

        Raises:
            NoMark: `mark` is no token, or one that text is made of.
        """
        tree = tree | {"truncation": None, "padding": None}
        self._inner = tokenizers.Tokenizer.from_str(json.dumps(tree))
        self._encoder = self._inner
        vocabulary = self._inner.get_vocab(with_added_tokens=True)
        self._size = max(vocabulary.values(), default=-1) + 1
        self._cuts = cuts_of(json.loads(self._inner.to_str()))
        self.kind = type(self._inner.model).__name__.lower()
        self.mark, self.eot = mark, None
        if mark is not None:
            check_mark(tree, mark)
            self.eot = vocabulary[mark]
            hidden = json.dumps(_without(tree, mark))
            self._encoder = tokenizers.Tokenizer.from_str(hidden)

    @property
    def vocab_size(self) -> int:
        return self._size

    def encode(self, text: str) -> Int32[np.ndarray, " T"]:
        (ids,) = self.encode_batch([text])
        return ids

    def encode_batch(self, texts: list[str]) -> list[Int32[np.ndarray, " T"]]:
        found: list[list[Int32[np.ndarray, " T"]]] = [[] for _ in texts]
        for call in _calls(self.parts(text) for text in texts):
            ids = self._encode_parts([part for _, part in call])
            for (of, _), own in zip(call, ids, strict=True):
                found[of].append(own)
        return [own[0] if len(own) == 1 else np.concatenate(own) for own in found]

    def parts(self, text: str) -> Iterator[str]:
        """A text in parts that are encoded apart to the same ids; whole where nobody
        knows where it may be cut.
        """
        return parts(text, self._cuts)

    def _encode_parts(self, texts: list[str]) -> list[Int32[np.ndarray, " T"]]:
        # This call keeps no offsets and is a third faster, for one text too.
        encode = self._encoder.encode_batch_fast

        def action() -> list[tokenizers.Encoding]:
            try:
                return encode(texts, add_special_tokens=False)
            except Exception as error:  # the library raises bare Exception
                raise ValueError(f"the tokenizer cannot encode it: {error}.") from error

        found = [np.asarray(one.ids, np.int32) for one in interruptible(action)]
        for text, ids in zip(texts, found, strict=True):
            if self.eot is not None and self.eot in ids:
                raise ValueError(
                    f"the tokenizer must not give its end mark {self.mark!r} for text, "
                    f"as for what it does not know. It does in {text[:40]!r}."
                )
        return found

    def decode(self, ids: Iterable[int] | Integer[np.ndarray, " T"]) -> str:
        return self._inner.decode(checked(ids, self._size), skip_special_tokens=False)

    def token_bytes(self) -> Int64[np.ndarray, " V"] | None:
        """UTF-8 bytes of each token's text, 0 for special ones; None where they depend
        on the tokens around.
        """
        tree = json.loads(self._inner.to_str())
        if (tree["decoder"] or {}).get("type") != "ByteLevel":
            return None
        alphabet = {*pre_tokenizers.ByteLevel.alphabet()}
        found = np.zeros(self._size, np.int64)
        for piece, i in self._inner.get_vocab(with_added_tokens=True).items():
            is_bytes = alphabet.issuperset(piece)
            found[i] = len(piece) if is_bytes else len(piece.encode())
        for i, token in self._inner.get_added_tokens_decoder().items():
            found[i] = 0 if token.special else len(token.content.encode())
        if self.eot is not None:
            found[self.eot] = 0
        return found

    def text_of(self, ids: Integer[np.ndarray, " T"]) -> str:
        """Text of some ids, without special tokens."""
        return self._inner.decode(checked(ids, self._size), skip_special_tokens=True)

    def content(self) -> str:
        """As the library writes it; with the end mark around it where that is not the
        one a reader would find.
        """
        text = self._inner.to_str(pretty=True)
        tree = json.loads(text)
        if self.mark != (_marks(tree) or [None])[0] or len(_marks(tree)) > 1:
            own = {"trix_tokenizer": "library", "version": 1, "eot": self.mark}
            text = json.dumps({**own, "tokenizer": tree}, ensure_ascii=False, indent=1)
        return text


def _calls(texts: Iterable[Iterable[str]]) -> Iterator[list[tuple[int, str]]]:
    """Parts with the number of their text, some for each call of the library."""
    call, characters = [], 0
    for of, own in enumerate(texts):
        for part in own:
            call.append((of, part))
            characters += len(part)
            if characters >= CALL:
                yield call
                call, characters = [], 0
    if call:
        yield call


def known_mark(tree: dict[str, Any]) -> str | None:
    """The one end mark with a known name in a `tokenizer.json`; None if it has none.

    Raises:
        NoMark: It has several.
    """
    found = _marks(tree)
    if len(found) > 1:
        raise NoMark(
            f"the tokenizer has several end marks ({', '.join(found)}): say which one ends "
            "a document, --data.end-of-text TOKEN."
        )
    return found[0] if found else None


def check_mark(tree: dict[str, Any], mark: str) -> None:
    """Raises NoMark unless `mark` is a token that no text is made of."""
    if _is_mark(tree, mark):
        return
    added = [token["content"] for token in tree["added_tokens"]]
    raise NoMark(
        f"end_of_text={mark!r} must be a token of its own. Those that the tokenizer adds "
        f"to its pieces of text: {', '.join(added[:20]) or 'none'}."
    )


def _marks(tree: dict[str, Any]) -> list[str]:
    return [mark for mark in KNOWN_MARKS if _is_mark(tree, mark)]


def _is_mark(tree: dict[str, Any], mark: str) -> bool:
    """Whether it is added, or in the vocabulary without being merged from pieces."""
    if any(token["content"] == mark for token in tree["added_tokens"]):
        return True
    model = tree["model"]
    merges = model.get("merges") or ()
    merged = ("".join(m.split(" ") if isinstance(m, str) else m) for m in merges)
    return mark in _pieces(model) and mark not in merged


def _pieces(model: dict[str, Any]) -> list[str]:
    """Of a vocabulary, an object or a list of pairs."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        return list(vocabulary)
    return [piece for piece, _ in vocabulary]


def _without(tree: dict[str, Any], mark: str) -> dict[str, Any]:
    """The same tokenizer, with the mark's id under a name that no text holds."""
    tree = copy.deepcopy(tree) | {"post_processor": None}
    for token in tree["added_tokens"]:
        if token["content"] == mark:
            token["content"] = HIDDEN
    model = tree["model"]
    if isinstance(model["vocab"], dict):
        found = model["vocab"].items()
        model["vocab"] = {HIDDEN if k == mark else k: v for k, v in found}
    else:
        pairs = model["vocab"]
        model["vocab"] = [[HIDDEN if k == mark else k, v] for k, v in pairs]
    if model.get("unk_token") == mark:
        model["unk_token"] = HIDDEN
    return tree


def checked(ids: Iterable[int] | np.ndarray, vocab_size: int) -> list[int]:
    """The ids as a list.

    Raises:
        ValueError: One is outside the vocabulary.
    """
    ids = np.asarray(list(ids), np.int64)
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(
            f"ids must be in 0 to {vocab_size - 1}. Got {ids.min()} to {ids.max()}."
        )
    return ids.tolist()
