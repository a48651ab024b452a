"""Which text is validation.

One document: its last `val_fraction` of characters, as in nanoGPT. Several: each goes by
the sha256 of its text, so that copies land on the same side and order does not matter;
validation is the documents of smallest hash that together hold at least `val_fraction`
of the bytes. Where whole documents would give it more than 1.5 times that, the one that
crosses the line is left to training, or, if validation then has less than half of what
was asked, cut in two: its end is validation, from a paragraph, line or word on.
"""

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

LEAST, MOST = 0.5, 1.5  # times val_fraction that validation may hold
FINEST = 4  # bytes of a character: no cut comes closer


class Survey(NamedTuple):
    """What a first reading of the documents tells.

    Attributes:
        characters: of the text; empty unless asked for.
        last_val_key: several documents: those with a key up to this one are validation.
        cut_key: the document of this key, with its copies, is cut in two; None: none is.
        cut_share: how much of it is validation.
        val_documents: of a validation set of its own; `documents` are then training.
        in_both: training documents that such a validation set has too, word for word.
    """

    documents: int
    characters: frozenset[str]
    last_val_key: int = -1
    cut_key: int | None = None
    cut_share: float = 0.0
    val_documents: int = 0
    in_both: int = 0

    @property
    def several(self) -> bool:
        """Whether documents need a mark at their end."""
        return max(self.documents, self.val_documents) > 1


def survey(
    documents: Iterable[str], val_fraction: float, with_characters: bool
) -> Survey:
    """Reads every document once; keeps 16 bytes of each.

    Raises:
        ValueError: all are the same.
    """
    keys, sizes, characters = array("Q"), array("Q"), set()
    for text in documents:
        keys.append(_key(text))
        sizes.append(len(text.encode()))
        if with_characters:
            characters.update(text)
    if not keys:
        return Survey(0, frozenset())
    if len(keys) == 1:
        return Survey(1, frozenset(characters))
    cut = _cut(np.array(keys), np.array(sizes), val_fraction)
    return Survey(len(keys), frozenset(characters), *cut)


def survey_two(
    documents: Iterable[str], val_documents: Iterable[str], with_characters: bool
) -> Survey:
    """Reads training and validation documents that are divided already; keeps 8 bytes
    of each.
    """
    keys, characters = (array("Q"), array("Q")), set()
    for own, texts in zip(keys, (documents, val_documents), strict=True):
        for text in texts:
            own.append(_key(text))
            if with_characters:
                characters.update(text)
    train, val = keys
    in_both = int(np.isin(np.array(train), np.array(val)).sum())
    found = Survey(len(train), frozenset(characters), val_documents=len(val))
    return found._replace(in_both=in_both)


def _cut(
    keys: np.ndarray, sizes: np.ndarray, val_fraction: float
) -> tuple[int, int | None, float]:
    """The last three of a Survey."""
    distinct, of = np.unique(keys, return_inverse=True)
    if len(distinct) == 1:
        raise ValueError(
            f"the {len(keys)} documents must not all be the same text: validation would repeat training."
        )
    held = np.cumsum(np.bincount(of, sizes))
    asked = val_fraction * held[-1]
    crossing = int(np.searchsorted(held, asked))
    before = held[crossing - 1] if crossing else 0.0
    if crossing < len(distinct) - 1 and held[crossing] <= MOST * asked:
        return int(distinct[crossing]), None, 0.0
    last = int(distinct[crossing - 1]) if crossing else -1
    if before >= LEAST * asked:
        return last, None, 0.0
    share = (asked - before) / (held[crossing] - before)
    return last, int(distinct[crossing]), float(share)


def sides(
    documents: Iterable[str], found: Survey, val_fraction: float
) -> Iterator[tuple[str, str]]:
    """Yields `("train" | "val", text)` for every document, or part of one."""
    if found.documents == 1:
        (text,) = documents
        cut = int(len(text) * (1 - val_fraction))
        if not 0 < cut < len(text):
            raise ValueError(
                f"val_fraction={val_fraction} leaves one side of a document of {len(text)} character(s) empty."
            )
        yield "train", text[:cut]
        yield "val", text[cut:]
        return
    for text in documents:
        key = _key(text)
        if key == found.cut_key:
            head, tail = cut_in_two(text, found.cut_share)
            yield from (
                (s, part) for s, part in (("train", head), ("val", tail)) if part
            )
        else:
            yield ("val" if key <= found.last_val_key else "train"), text


def cut_in_two(text: str, share: float) -> tuple[str, str]:
    """Cuts the last `share` of a text's bytes off: at the nearest paragraph that changes
    the smaller part by a quarter at most, else a line, else a word, else a character.
    """
    data = text.encode()
    at = int(len(data) * (1 - share))
    reach = min(at, len(data) - at) // 4
    for mark in (b"\n\n", b"\n", b" "):
        behind = data.rfind(mark, max(at - reach, 0), at) + len(mark)
        ahead = data.find(mark, at, at + reach) + len(mark)
        cuts = [cut for cut in (behind, ahead) if cut >= len(mark)]
        if cuts:
            at = min(cuts, key=lambda cut: abs(cut - at))
            break
    while at < len(data) and data[at] & 0xC0 == 0x80:  # inside a character
        at -= 1
    return data[:at].decode(), data[at:].decode()


def check_share(found: Survey, val_fraction: float, read: dict[str, int]) -> None:
    """Raises a ValueError unless validation has about what was asked of the bytes read.
    A single document is cut by characters, exactly; a validation set of its own has no
    share.
    """
    asked = val_fraction * sum(read.values())
    if (
        found.documents == 1
        or found.val_documents
        or (LEAST * asked - FINEST <= read["val"] <= MOST * asked + FINEST)
    ):
        return
    raise ValueError(
        f"validation would be {read['val']:,} of {sum(read.values()):,} bytes, for "
        f"val_fraction={val_fraction}: the {found.documents} documents do not divide so. "
        "Give more text, shorter documents or another --data.val-fraction."
    )


def tell_cut(found: Survey, report: Callable[[str], None]) -> None:
    """Says that a document is on both sides, if one is."""
    if found.cut_key is not None:
        report(
            f"{found.documents} documents are few to divide: the last "
            f"{found.cut_share:.1%} of one is validation, the rest of it training"
        )


def tell_in_both(found: Survey, report: Callable[[str], None]) -> None:
    """Says that training has documents of a validation set of its own, if it has."""
    if found.in_both:
        report(f"{found.in_both:,} training document(s) are in validation too")


def _key(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
