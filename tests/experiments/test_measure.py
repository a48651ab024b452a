"""What routing does, on tiles whose answer is known."""

import numpy as np
import pytest

from experiments.quality import measure

RNG = np.random.default_rng(0)
T = 20_000
EVERYONE = np.zeros(T, int)
TOKENS = RNG.integers(0, 10, T)
BEFORE = RNG.integers(0, 4, T)


def information(tiles, contexts, tokens):
    """Against tiles shuffled among equal tokens."""
    return measure.against_chance(
        lambda t: measure.information(t, contexts, tokens), tiles, tokens
    )


def purity(tiles, classes):
    return measure.against_chance(lambda t: measure.purity(t, classes), tiles, EVERYONE)


def use_distance(tiles, part, num_tiles):
    return measure.against_chance(
        lambda t: measure.use_distance(t, part, num_tiles), tiles, EVERYONE
    )


def test_tile_that_follows_from_the_token_tells_nothing_about_context():
    tiles = TOKENS % 8
    assert measure.information(tiles, BEFORE, TOKENS) == pytest.approx(0, abs=1e-12)
    assert measure.conditional_entropy(tiles, TOKENS) == pytest.approx(0, abs=1e-12)


def test_tile_that_is_the_context_tells_all_of_its_entropy():
    found = information(BEFORE, BEFORE, TOKENS)
    assert found.value == pytest.approx(np.log(4), abs=0.01)
    left = measure.conditional_entropy(BEFORE, TOKENS)
    assert found.value == pytest.approx(left, abs=1e-12)
    assert found.above_chance == pytest.approx(np.log(4), abs=0.01)


def test_tile_of_a_mixture_tells_the_known_amount():
    # With probability 1/2 the context, else uniform over 4: H(tile) - H(tile | context).
    mixed = np.where(RNG.random(T) < 0.5, BEFORE, RNG.integers(0, 4, T))
    conditional = -(0.625 * np.log(0.625) + 3 * 0.125 * np.log(0.125))
    found = information(mixed, BEFORE, TOKENS)
    assert found.above_chance == pytest.approx(np.log(4) - conditional, abs=0.015)


def test_chance_explains_the_bias_of_random_tiles():
    tiles, fine = RNG.integers(0, 16, T), RNG.integers(0, 50, T)
    found = information(tiles, fine, TOKENS)
    assert found.value > 0.05  # many cells, few tokens: far from the truth, which is 0
    assert abs(found.above_chance) < 4 * found.spread + 1e-3


def test_shuffling_keeps_what_the_token_says():
    tiles = np.where(RNG.random(T) < 0.9, TOKENS % 4, RNG.integers(0, 4, T))
    moved = measure.shuffled_within(tiles, TOKENS, np.random.default_rng(1))
    for token in range(10):
        here = TOKENS == token
        assert (np.sort(moved[here]) == np.sort(tiles[here])).all()
    assert (moved != tiles).any()


def test_purity_of_tiles_that_are_classes_is_one_and_of_random_ones_is_chance():
    classes = RNG.choice(3, T, p=[0.5, 0.3, 0.2])
    assert purity(classes, classes).value == 1
    found = purity(RNG.integers(0, 8, T), classes)
    assert found.value == pytest.approx(0.5, abs=0.01)
    assert found.chance == pytest.approx(0.5, abs=0.01)


def test_difficulty_bins_are_equally_large_and_ordered():
    difficulty = np.array([5.0, 1.0, 3.0, 3.0, 2.0, 9.0, 0.0, 4.0])
    part = measure.bins_of(difficulty, 4)
    np.testing.assert_array_equal(np.bincount(part), [2, 2, 2, 2])
    np.testing.assert_array_equal(part, [3, 0, 1, 2, 1, 3, 0, 2])
    assert measure.mean_by_bin(difficulty, part) == [0.5, 2.5, 3.5, 7.0]


def test_use_distance_is_one_for_separate_tiles_and_chance_for_random_ones():
    part = measure.bins_of(RNG.random(T), 4)
    apart = np.where(part == 0, 0, np.where(part == 3, 1, 2))
    assert measure.use_distance(apart, part, 3) == 1
    found = use_distance(RNG.integers(0, 16, T), part, 16)
    assert abs(found.above_chance) < 4 * found.spread + 1e-3


def test_entropy_by_difficulty_is_one_where_use_is_even_and_zero_for_a_single_tile():
    part = np.repeat([0, 1], 800)
    tiles = np.concatenate([np.arange(800) % 8, np.zeros(800, int)])
    assert measure.entropy_by_bin(tiles, part, 8) == pytest.approx([1, 0])


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a", "lower-case vowel"),
        ("t", "lower-case consonant"),
        ("E", "capital"),
        ("3", "digit"),
        ("\n", "newline"),
        (" ", "space"),
        (",", "other"),
        ("", "other"),
    ],
)
def test_class_of_a_token(text, name):
    assert measure.CLASSES[measure.class_of(text)] == name
