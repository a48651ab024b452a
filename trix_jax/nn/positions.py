"""Where tokens stand: their numbers in a document, the documents of a line of tokens,
and rotary embeddings of positions.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from trix_jax.nn.cache import keep
from trix_jax.typing import Array, Bool, Float, Integer

ROTARY_BASE = 10_000.0  # RoFormer's


def positions_of(
    module: nn.Module,
    shape: tuple[int, int],
    mask: Bool[Array, "B L"] | None,
    segment_ids: Integer[Array, "B L"] | None,
    decode: bool = False,
) -> Integer[Array, "B L"]:
    """Numbers the real tokens of each segment from 0 on; a masked token has the number
    of the real one before it.

    In decoding they go on behind what the module's `"cache"` has seen: `position` [B],
    the next number, and `segment` [B], that of the last real token.

    Args:
        module: whose cache it is.
        shape: B and L.
        mask: True for real tokens; None takes all.
        segment_ids: a number a token; None goes on with the last one.
    """
    if not decode:
        if mask is None and segment_ids is None:
            return jnp.broadcast_to(jnp.arange(shape[1]), shape)
        zeros = jnp.zeros(shape[0], jnp.int32)
        return _number(shape, mask, segment_ids, zeros, zeros)[0]
    batch = shape[:1]
    start = module.variable("cache", "position", jnp.zeros, batch, jnp.int32)
    last = module.variable("cache", "segment", jnp.zeros, batch, jnp.int32)
    numbers, position, segment = _number(
        shape, mask, segment_ids, start.value, last.value
    )
    keep(module, position=position, segment=segment)
    return numbers


def _number(shape, mask, segment_ids, start, last):
    """Positions, and what to start the next call with."""
    real = jnp.ones(shape, bool) if mask is None else mask
    ids = last[:, None] if segment_ids is None else segment_ids
    ids = jnp.broadcast_to(ids, shape).astype(jnp.int32)
    place = jax.lax.cummax(jnp.where(real, jnp.arange(shape[1]), -1), axis=1)
    newest = jnp.where(place < 0, last[:, None], _pick(ids, place))
    before = jnp.concatenate([last[:, None], newest[:, :-1]], axis=1)
    count = jnp.cumsum(real, axis=1, dtype=jnp.int32)
    opens = jnp.where(real & (ids != before), count - 1, -start[:, None])
    numbers = count - 1 - jax.lax.cummax(opens, axis=1)
    if shape[1] == 0:
        return numbers, start, last
    return jnp.maximum(numbers, 0), numbers[:, -1] + 1, newest[:, -1]


def _pick(ids, place):
    return jnp.take_along_axis(ids, jnp.maximum(place, 0), axis=1)


def documents(
    module: nn.Module,
    tokens: Integer[Array, "B L"],
    end_token: int,
    mask: Bool[Array, "B L"] | None = None,
    decode: bool = False,
) -> Integer[Array, "B L"]:
    """The number of each token's document: an end mark opens the next one, so that a
    document's first word is told from the mark alone.

    In decoding it goes on from `document` [B] of the module's `"cache"`.
    """
    marks = tokens == end_token
    marks = marks if mask is None else marks & mask
    numbers = jnp.cumsum(marks, axis=1, dtype=jnp.int32)
    if not decode:
        return numbers
    seen = module.variable("cache", "document", jnp.zeros, tokens.shape[:1], jnp.int32)
    numbers = numbers + seen.value[:, None]
    keep(module, document=seen.value + marks.sum(axis=1, dtype=jnp.int32))
    return numbers


def rotate(
    x: Float[Array, "B L H E"],
    positions: Integer[Array, "B L"],
    base: float = ROTARY_BASE,
) -> Float[Array, "B L H E"]:
    """Turns each pair `(x_i, x_{i + E/2})` of a head by `position * base^(-2i / E)`, so
    that a product of two depends on how far apart they stand; in float32 or wider.

    References:
        Su et al., 2021, "RoFormer", https://arxiv.org/abs/2104.09864.
    """
    half, wide = x.shape[-1] // 2, jnp.promote_types(x.dtype, jnp.float32)
    speed = base ** (-jnp.arange(half, dtype=wide) / half)
    angle = positions[..., None, None].astype(wide) * speed[None, None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(wide), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
