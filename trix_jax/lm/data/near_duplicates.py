"""Near-duplicates across the split: `J(a, b) = |a & b| / |a | b|` over the sets of five
successive words of two documents, estimated by MinHash.

References:
    Broder, 1997, "On the resemblance and containment of documents",
    https://doi.org/10.1109/SEQUEN.1997.666900; the library is datasketch.
"""

import re
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np

WORDS = 5
PERMUTATIONS = 64  # the estimate's standard deviation is at most 1/16
_WORD = re.compile(rb"[a-z0-9_]+|[^\sa-z0-9_]")
_MIX = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio


class NearDuplicates:
    """Finds documents that resemble one of a set; holds half a kilobyte for each of the
    set, and nothing of the documents that are looked up.
    """

    def __init__(self, documents: Iterable[str], threshold: float):
        from datasketch import MinHash, MinHashLSH

        if not 0 < threshold < 1:
            raise ValueError(
                f"near_duplicates must be between 0 and 1, both excluded. Got {threshold}."
            )
        self._threshold = threshold
        self._index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
        # datasketch takes 32-bit hashes ready-made; to hash each shingle in Python took
        # nine tenths of the time.
        self._empty = MinHash(num_perm=PERMUTATIONS, hashfunc=int)
        self._hashes: list[Any] = []
        for minhash in map(self._minhash, documents):
            if minhash is None:
                continue
            self._index.insert(len(self._hashes), minhash, check_duplication=False)
            self._hashes.append(minhash)

    def holds(self, text: str) -> bool:
        """Whether one of the set is as similar as the threshold says."""
        minhash = self._minhash(text)
        if minhash is None:
            return False
        alike: list[Any] = self._index.query(minhash)
        return any(self._hashes[i].jaccard(minhash) >= self._threshold for i in alike)

    def _minhash(self, text: str):
        """None for a text of fewer than five words."""
        shingles = _shingles(text)
        if not len(shingles):
            return None
        minhash = self._empty.copy()
        minhash.update_batch(shingles.tolist())
        return minhash


def _shingles(text: str) -> np.ndarray:
    """Distinct 32-bit hashes of every five successive words, lower case."""
    words = _WORD.findall(text.lower().encode())
    hashes = np.fromiter(map(zlib.crc32, words), np.uint64, len(words))
    count = len(words) - WORDS + 1
    if count < 1:
        return np.empty(0, np.uint64)
    mixed = np.zeros(count, np.uint64)
    for i in range(WORDS):
        mixed = (mixed ^ hashes[i : i + count]) * _MIX
    return np.unique(mixed >> np.uint64(32))
