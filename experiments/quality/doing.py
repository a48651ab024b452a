"""What routing does, as numbers on arrays with one entry a token.

    information = I(tile; context | token), in nats
    purity = share of tokens whose class is the commonest of their tile
    use distance = total variation between the tiles of hard and of easy tokens

All three are above zero by chance alone, so each comes with what it is when the tiles
are shuffled: `above_chance` subtracts that.

References:
    Cover and Thomas, 2006, "Elements of Information Theory", 2.5. Good, 2005,
    "Permutation, Parametric and Bootstrap Tests of Hypotheses", 3.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Integer

Ids = Integer[np.ndarray, " T"]
CLASSES = ("lower-case vowel", "lower-case consonant", "capital", "digit", "newline", "space", "other")  # fmt: skip


class Measured(NamedTuple):
    """A number and what chance gives.

    Attributes:
        chance: mean over shuffles.
        spread: standard deviation over shuffles.
    """

    value: float
    chance: float
    spread: float

    @property
    def above_chance(self) -> float:
        return self.value - self.chance


def information(tiles: Ids, contexts: Ids, tokens: Ids) -> float:
    """Computes `I(tile; context | token)` in nats, of the counts as they are (which is
    biased upwards).
    """
    joint, n = _counts(tokens, contexts, tiles), len(tokens)
    with_context = _counts(tokens, contexts)
    with_tile, alone = _counts(tokens, tiles), _counts(tokens)
    ratio = joint * alone / (with_context * with_tile)
    return float(np.log(ratio).sum() / n)


def conditional_entropy(tiles: Ids, tokens: Ids) -> float:
    """Computes `H(tile | token)` in nats: the most that `information` can be."""
    return float(-np.log(_counts(tokens, tiles) / _counts(tokens)).mean())


def information_measured(
    tiles: Ids, contexts: Ids, tokens: Ids, draws: int = 5, seed: int = 0
) -> Measured:
    """`information`, and the same with the tiles shuffled among equal tokens: what
    follows from the token alone stays.
    """
    return _against_shuffles(
        lambda t: information(t, contexts, tokens), tiles, tokens, draws, seed
    )


def purity(tiles: Ids, classes: Ids) -> float:
    """Computes `sum_tile max_class count(tile, class) / T`."""
    table = np.zeros((tiles.max() + 1, classes.max() + 1))
    np.add.at(table, (tiles, classes), 1)
    return float(table.max(axis=1).sum() / len(tiles))


def purity_measured(
    tiles: Ids, classes: Ids, draws: int = 5, seed: int = 0
) -> Measured:
    """`purity`, and the same with the tiles shuffled among all tokens."""
    everyone = np.zeros_like(tiles)
    return _against_shuffles(lambda t: purity(t, classes), tiles, everyone, draws, seed)


def bins_of(difficulty: Float[np.ndarray, " T"], bins: int) -> Ids:
    """Which of `bins` equally large parts of the tokens, easiest first, each is in."""
    order = np.argsort(difficulty, kind="stable")
    part = np.empty(len(difficulty), np.int64)
    part[order] = np.arange(len(difficulty)) * bins // len(difficulty)
    return part


def mean_by_bin(values: Float[np.ndarray, " T"], part: Ids) -> list[float]:
    """Mean of the values in each bin."""
    return (np.bincount(part, values) / np.bincount(part)).tolist()


def entropy_by_bin(tiles: Ids, part: Ids, num_tiles: int) -> list[float]:
    """Entropy of tile use in each bin, as a share of `ln N`."""
    shares = _use(tiles, part, num_tiles)
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    return (-(shares * logs).sum(axis=1) / np.log(num_tiles)).tolist()


def use_distance(tiles: Ids, part: Ids, num_tiles: int) -> float:
    """Computes `sum_tile |share in the hardest bin - share in the easiest| / 2`."""
    shares = _use(tiles, part, num_tiles)
    return float(np.abs(shares[-1] - shares[0]).sum() / 2)


def use_distance_measured(
    tiles: Ids, part: Ids, num_tiles: int, draws: int = 5, seed: int = 0
) -> Measured:
    """`use_distance`, and the same with the tiles shuffled among all tokens."""
    everyone = np.zeros_like(tiles)
    return _against_shuffles(
        lambda t: use_distance(t, part, num_tiles), tiles, everyone, draws, seed
    )


def class_of(text: str) -> int:
    """The index in `CLASSES` of a token's text: of its first character."""
    first = text[:1]
    if first == "\n":
        return 4
    if first.isspace():
        return 5
    if first.isdigit():
        return 3
    if first.isalpha():
        return 2 if first.isupper() else (0 if first in "aeiou" else 1)
    return 6


def shuffled_within(values: Ids, groups: Ids, rng: np.random.Generator) -> Ids:
    """The values permuted at random among the places of equal group."""
    out = np.empty_like(values)
    places = np.argsort(groups, kind="stable")
    out[places] = values[np.lexsort((rng.random(len(values)), groups))]
    return out


def _against_shuffles(
    function: Callable[[Ids], float], tiles: Ids, groups: Ids, draws: int, seed: int
) -> Measured:
    rng = np.random.default_rng(seed)
    by_chance = [function(shuffled_within(tiles, groups, rng)) for _ in range(draws)]
    return Measured(
        function(tiles), float(np.mean(by_chance)), float(np.std(by_chance))
    )


def _counts(*labels: Ids) -> np.ndarray:
    """How often each token's combination of labels occurs, a number a token."""
    key = np.zeros(len(labels[0]), np.int64)
    for label in labels:
        key = key * (int(label.max()) + 1) + label
    _, inverse, counts = np.unique(key, return_inverse=True, return_counts=True)
    return counts[inverse].astype(np.float64)


def _use(tiles: Ids, part: Ids, num_tiles: int) -> np.ndarray:
    table = np.zeros((part.max() + 1, num_tiles))
    np.add.at(table, (part, tiles), 1)
    return table / table.sum(axis=1, keepdims=True)
