"""Hashes of token ids and of pairs of them, against Python's integers."""

import jax.numpy as jnp
import numpy as np
import pytest

from trix_jax import RoutingConfig, TransformerConfig
from trix_jax.hashing import (
    hash_sets,
    hash_tiles,
    layer_ids,
    pair_ids,
    places_in_sets,
    tile_sets,
)
from trix_jax.nn.settings import TileSettings


def mixed(x):
    """MurmurHash3's finalizer in Python's integers."""
    x = int(x)
    x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
    x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
    return x ^ (x >> 16)


def hashed(ids, k):
    def hashes(i):
        return [mixed((int(i) * 8 + tile) % 2**32) for tile in range(8)]

    return [np.argsort(-np.asarray(hashes(i)))[:k] for i in ids]


def test_hash_of_ids_and_of_pairs_is_that_of_python():
    ids = np.asarray([0, 1, 77, 2**31 - 1])
    np.testing.assert_array_equal(hash_tiles(jnp.asarray(ids), 8, 3), hashed(ids, 3))
    before = np.asarray([-1, 0, 5, 4095])
    pairs = [(mixed(b + 1) + int(i)) % 2**32 for b, i in zip(before, ids, strict=True)]
    got = pair_ids(jnp.asarray(before), jnp.asarray(ids))
    assert got.tolist() == [int(pair) for pair in pairs]
    assert got[0] == ids[0]
    np.testing.assert_array_equal(hash_tiles(got, 8, 3), hashed(pairs, 3))


def test_sets_of_ids_are_those_of_python():
    ids = np.asarray([0, 1, 77, 2**31 - 1])
    for g in (1, 3):
        got = hash_sets(jnp.asarray(ids), 6, g)
        wanted = [
            [c * 6 + mixed((int(i) * g + c) % 2**32) % 6 for c in range(g)] for i in ids
        ]
        assert got.tolist() == wanted


@pytest.mark.parametrize(
    ("n", "k", "s", "g"),
    [(96, 11, 64, 1), (8, 8, 3, 1), (5, 2, 3, 1), (96, 12, 32, 3), (8, 4, 5, 4)],
)
def test_tiles_are_in_as_many_sets_as_others(n, k, s, g):
    sets = tile_sets(n, k, s, g)
    assert sets.shape == (g * s, k // g)
    assert all(len(set(tiles)) == k // g for tiles in sets.tolist())
    for choice, own in enumerate(sets.reshape(g, -1)):
        assert set(own % g) == {choice}
        times = np.bincount(own // g, minlength=n // g)
        assert times.max() - times.min() <= 1
        assert times.min() >= 1
    lots = [mixed(tile) for tile in range(n // g)]
    assert sets[0].tolist() == (np.argsort(-np.asarray(lots))[: k // g] * g).tolist()
    places = places_in_sets(sets, n)
    for tile, own in enumerate(places):
        found = np.flatnonzero(sets.reshape(-1) == tile)
        assert own.tolist() == [*found, *[sets.size] * (own.size - found.size)]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"hash_sets": 4}, "hash_sets needs source 'hash'"),
        ({"source": "hash", "hash_sets": 0}, "hash_sets must be at least 1"),
        ({"source": "hash", "sets_per_token": 2}, "sets_per_token=2 needs hash_sets"),
    ],
)
def test_sets_that_mean_nothing_are_refused(how, message):
    with pytest.raises(ValueError, match=message):
        RoutingConfig(**how)


def test_sets_without_room_for_all_tiles_are_refused():
    routing = RoutingConfig(source="hash", hash_sets=3)
    TileSettings(num_tiles=6, tiles_per_token=2, routing=routing)
    with pytest.raises(ValueError, match="must have room for num_tiles=7"):
        TileSettings(num_tiles=7, tiles_per_token=2, routing=routing)


@pytest.mark.parametrize(("n", "k", "g"), [(6, 3, 2), (9, 4, 2), (6, 4, 0), (6, 4, -1)])
def test_choices_that_do_not_divide_are_refused(n, k, g):
    routing = RoutingConfig(source="hash", hash_sets=8, sets_per_token=g)
    with pytest.raises(ValueError, match=f"sets_per_token={g} must divide"):
        TileSettings(num_tiles=n, tiles_per_token=k, routing=routing)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32"])
def test_pairs_are_the_same_in_any_integers(dtype):
    before, ids = np.asarray([0, 127, 255]), np.asarray([3, 4, 5])
    if dtype != "uint8":
        before[0] = -1
    got = pair_ids(jnp.asarray(before, dtype), jnp.asarray(ids, dtype))
    wanted = [(mixed(b + 1) + int(i)) % 2**32 for b, i in zip(before, ids, strict=True)]
    assert got.tolist() == wanted


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "int64"])
def test_ids_in_a_layer_are_the_same_in_any_integers(dtype):
    ids = np.asarray([0, 3, 255], dtype)
    for given in (ids, jnp.asarray(ids)):
        for layer in (300, np.uint8(200), jnp.int32(300)):
            got = layer_ids(given, layer, 50257)
            assert got.dtype == jnp.uint32
            assert got.tolist() == [int(i) + int(layer) * 50257 for i in ids]
    last = 2**20  # layers; modulo 2**32
    assert layer_ids(ids, last, 50257).tolist() == [
        (int(i) + last * 50257) % 2**32 for i in ids
    ]


def test_pairs_are_spread_evenly():
    before, token = jnp.meshgrid(jnp.arange(64), jnp.arange(64))
    ids = pair_ids(before.reshape(-1), token.reshape(-1))
    assert len(np.unique(ids)) == 64 * 64
    tiles = hash_tiles(ids, 8, 2)
    sets, counts = np.unique(np.sort(tiles, axis=1), axis=0, return_counts=True)
    assert len(sets) == 28
    expected = 64 * 64 / 28  # binomial: five standard deviations
    assert abs(counts - expected).max() < 5 * expected**0.5


@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.int64])
def test_a_number_of_tiles_from_numpy_gives_the_same_tiles(kind, no_type_hook):
    ids = jnp.arange(20)
    expected = hash_tiles(ids, 8, 3)
    np.testing.assert_array_equal(hash_tiles(ids, kind(8), 3), expected)
    expected = hash_sets(ids, 200, 2)
    np.testing.assert_array_equal(hash_sets(ids, kind(200), kind(2)), expected)
    expected = tile_sets.__wrapped__(96, 12, 200, 2)
    numbers = map(kind, (96, 12, 200, 2))
    np.testing.assert_array_equal(tile_sets.__wrapped__(*numbers), expected)


def test_layers_that_would_hash_alike_are_refused():
    """Four layers are 2**30 keys each: the fifth would have those of the first."""
    sizes = {"vocab_size": 2**18, "num_tiles": 2**12, "expansion": 2**12}
    how = {
        "routing": RoutingConfig(source="hash"),
        "hash_per_layer": True,
        "ffn": "sparse",
    }
    ids = jnp.arange(5)
    one, other = (hash_tiles(layer_ids(ids, i, 2**18), 2**12, 2) for i in (0, 4))
    assert (one == other).all()
    TransformerConfig(n_layers=4, **sizes, **how)
    with pytest.raises(ValueError, match="layers 4 apart share one"):
        TransformerConfig(n_layers=5, **sizes, **how)
    TransformerConfig(n_layers=5, **sizes | {"vocab_size": 2**18 + 1}, **how)


def test_layers_that_would_hash_to_sets_alike_are_refused():
    """Keys are those of ids and choices, not of tiles: 2**31 for two of 2**30 ids."""
    routing = RoutingConfig(source="hash", hash_sets=8, sets_per_token=2)
    how = {"routing": routing, "hash_per_layer": True, "ffn": "sparse"}
    sizes = {"num_tiles": 2**12, "expansion": 2**12, "tiles_per_token": 2**10}
    TransformerConfig(n_layers=5, vocab_size=2**18, **sizes, **how)
    ids = jnp.arange(5)
    one, other = (hash_sets(layer_ids(ids, i, 2**30), 8, 2) for i in (0, 2))
    assert (one == other).all()
    with pytest.raises(ValueError, match=r"2 \* vocab_size \* sets_per_token"):
        TransformerConfig(n_layers=3, vocab_size=2**30, **sizes, **how)
