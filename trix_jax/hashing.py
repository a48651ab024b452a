"""Routes by hashing: token ids alone decide.

    tiles_t = top_k over n of mix(id_t * N + n)

or, with S sets of K / G tiles for each of G choices c,

    tiles_t = those of the sets mix(id_t * G + c) mod S

References:
    Thaler and Ravishankar, 1998, "Using Name-Based Mappings to Increase Hit Rates"
    (rendezvous hashing). Appleby, MurmurHash3 (the finalizer). Roller et al., 2021,
    "Hash Layers For Large Sparse Models", https://arxiv.org/abs/2106.04426.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from trix_jax.compiled import together
from trix_jax.typing import AnyArray, Array, Integer

NONE_BEFORE = -1  # the id before a sequence's first token


@together("num_tiles", "k")
def hash_tiles(
    token_ids: Integer[Array, " T"] | None, num_tiles: int, k: int
) -> Integer[Array, "T K"]:
    """The k tiles whose hash together with the token id is largest, so that any k tiles
    are as likely as any others.

    Raises:
        ValueError: there are no ids.
    """
    tiles = jnp.arange(num_tiles, dtype=jnp.uint32)
    first = _given(token_ids)[:, None].astype(jnp.uint32) * jnp.uint32(num_tiles)
    return jax.lax.top_k(_mix(first + tiles[None]), k)[1]


def hash_sets(
    token_ids: Integer[Array, " T"] | None, num_sets: int, g: int
) -> Integer[Array, "T G"]:
    """One of `num_sets` sets for each of g choices, int32, numbered over all choices:
    `c * S + mix(id * G + c) mod S`.

    Raises:
        ValueError: there are no ids.
    """
    choices = jnp.arange(g, dtype=jnp.uint32)
    first = _given(token_ids)[:, None].astype(jnp.uint32) * jnp.uint32(g)
    chosen = _mix(first + choices[None]) % jnp.uint32(num_sets)
    return ((choices * jnp.uint32(num_sets))[None] + chosen).astype(jnp.int32)


@functools.lru_cache
def tile_sets(
    num_tiles: int, k: int, num_sets: int, g: int
) -> Integer[np.ndarray, "S each"]:
    """The tiles of all g * S sets, the S of the first choice first. Choice c is among the
    tiles `n` with `n mod G = c`, so that no token meets a tile twice.

    A set takes the tiles that fewest sets before it have taken, of these the ones whose
    hash together with the set's number is largest: a tile is in as many sets as any
    other of its choice, or in one more.
    """
    num_tiles, k, num_sets, g = map(int, (num_tiles, k, num_sets, g))  # numpy's wrap
    own, each = num_tiles // g, k // g
    sets = np.empty((g, num_sets, each), np.int32)
    numbers = np.arange(g * num_sets * own, dtype=np.uint32)
    chance = -np.asarray(_mix(numbers)).astype(np.int64)
    for c, lots in enumerate(chance.reshape(g, num_sets, own)):
        taken = np.zeros(own, np.int32)
        for tiles, lot in zip(sets[c], lots, strict=True):
            best = np.lexsort((lot, taken))[:each]
            taken[best] += 1
            tiles[:] = best * g + c
    sets = sets.reshape(-1, each)
    sets.flags.writeable = False
    return sets


def places_in_sets(
    sets: Integer[np.ndarray, "S K"], num_tiles: int
) -> Integer[np.ndarray, "N P"]:
    """`s * K + k` of each set s that a tile is the k-th of, ascending; S * K marks none."""
    order = np.argsort(sets, axis=None, kind="stable")
    counts = np.bincount(sets.reshape(-1), minlength=num_tiles)
    places = np.full((num_tiles, counts.max()), sets.size, np.int32)
    for row, own in zip(places, np.split(order, np.cumsum(counts)[:-1]), strict=True):
        row[: own.size] = own
    return places


def pair_ids(
    before: Integer[Array, "*B"], token_ids: Integer[Array, "*B"]
) -> Integer[Array, "*B"]:
    """Ids of pairs of tokens, uint32, for `hash_tiles`: `mix(before + 1) + id`, the
    token's own id where there is none before it (`NONE_BEFORE`).
    """
    first = before.astype(jnp.uint32) + 1
    return _mix(first) + token_ids.astype(jnp.uint32)


def layer_ids(
    token_ids: Integer[AnyArray, "*B"],
    layer: Integer[AnyArray, ""] | np.integer | int,
    vocab_size: int,
) -> Integer[Array, "*B"]:
    """Ids of tokens in one of several layers, so that each hashes tokens to tiles of its
    own: `token_ids + layer * vocab_size` in uint32, whatever integers the ids are. Layers
    whose distance times `vocab_size` and the number of tiles is a multiple of 2**32 hash
    alike; `TransformerConfig` refuses them.

    Args:
        token_ids: any shape.
        layer: counts from 0.
        vocab_size: ids are below it.
    """
    first = jnp.asarray(layer).astype(jnp.uint32) * jnp.uint32(vocab_size)
    return jnp.asarray(token_ids).astype(jnp.uint32) + first


def _given(token_ids):
    if token_ids is None:
        raise ValueError(
            "token_ids must be given to a layer whose routing source is 'hash'. Got None."
        )
    return token_ids


def _mix(x):
    """MurmurHash3's finalizer: every bit of the result depends on every bit of x, and 0
    stays 0.
    """
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
