r"""Long texts in parts that have the same ids as the whole.

A library's tokenizer holds about 140 bytes for each byte of the texts that it is
encoding, so that a long text is given to it in parts. Where a text may be cut is known of
GPT-2's pre-tokenization, `ByteLevel` with its pattern and no normalizer before it:

`'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`

No match holds a white space behind anything else, so that one ends before every white
space that follows something else. What is behind that place reaches no match before it:
the one look ahead is from white space, to the other character. So the words of both parts
are those of the whole, and each word is encoded alone.
"""

import re
from collections.abc import Iterator
from typing import Any

PART = 2**18  # characters
# U+180E was a white space before Unicode 6.3, and may be to a library.
_OTHER = r"[^\s\u180e]"


def parts(text: str, cuts: str, length: int = PART) -> Iterator[str]:
    """Yields a text in parts of about `length` characters.

    Args:
        cuts: characters before which a text is cut where none of white space precedes
            (`cuts_of`); "" cuts nowhere.
    """
    start = 0
    if cuts and len(text) > length:
        place = re.compile(f"{_OTHER}(?=[{re.escape(cuts)}])")
        while found := place.search(text, start + length - 1):
            yield text[start : found.end()]
            start = found.end()
    yield text[start:]


def cuts_of(tree: dict[str, Any]) -> str:
    """The characters before which texts may be cut, for the tokenizer of a
    `tokenizer.json`; "" where nobody knows.
    """
    before = tree["pre_tokenizer"] or {}
    is_known = before.get("type") == "ByteLevel" and before.get("use_regex", True)
    # Added tokens are found before words are.
    is_split = any(
        token["rstrip"] or re.search(r"\s", token["content"])
        for token in tree["added_tokens"]
    )
    if not is_known or is_split or tree["normalizer"] is not None:
        return ""
    # A text that does not begin with a space may be given one.
    return " " if before["add_prefix_space"] else " \n"
