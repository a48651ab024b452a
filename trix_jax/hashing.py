"""Routes by hashing: token ids alone decide.

    tiles_t = top_k over n of mix(id_t * N + n)

References:
    Thaler and Ravishankar, 1998, "Using Name-Based Mappings to Increase Hit Rates"
    (rendezvous hashing). Appleby, MurmurHash3 (the finalizer). Roller et al., 2021,
    "Hash Layers For Large Sparse Models", https://arxiv.org/abs/2106.04426.
"""

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
    if token_ids is None:
        raise ValueError(
            "token_ids must be given to a layer whose routing source is 'hash'. Got None."
        )
    tiles = jnp.arange(num_tiles, dtype=jnp.uint32)
    first = token_ids[:, None].astype(jnp.uint32) * jnp.uint32(num_tiles)
    return jax.lax.top_k(_mix(first + tiles[None]), k)[1]


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


def _mix(x):
    """MurmurHash3's finalizer: every bit of the result depends on every bit of x, and 0
    stays 0.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
