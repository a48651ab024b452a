"""`TokenInput`: what a language model's signatures meet when it routes by token.

    "embedding"    row(t)
    "pair"         rms_unit(row(t)) + w * rms_unit(row(t - 1))        0 for the second
                   where there is no token before

Rows are those of the embedding table or, once the scores are held, of the copy that was
made of it at that moment. Collection `"routing"`, only with `hold="scores"` or
`"routes"`: `rows` [V, D] (the table as last seen in training) and `held`. Collection
`"cache"`, in decoding by pairs: `before` [B], the last real token so far.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from trix_jax import routing
from trix_jax.hashing import NONE_BEFORE
from trix_jax.nn import misuse
from trix_jax.routing import RoutingConfig
from trix_jax.typing import (
    AnyArray,
    Array,
    Bool,
    Float,
    Integer,
    Scalar,
    Shaped,
)


class ByToken(NamedTuple):
    """What routers see of a token.

    Attributes:
        router_input: what signatures meet.
        token_ids: what the control "hash" hashes: tokens, or pairs of them.
    """

    router_input: Float[Array, "B L D"]
    token_ids: Integer[Array, "B L"]


class TokenInput(nn.Module):
    """Looks tokens up, and keeps a copy of the table where scores are held.

    Attributes:
        config: whether and when rows are held.
        pair_weight: w; None is by the token alone.
    """

    config: RoutingConfig
    pair_weight: float | None = None

    @nn.compact
    def __call__(
        self,
        tokens: Integer[Array, "B L"],
        rows: Float[Array, "B L D"],
        embed: nn.Embed,
        train: bool = False,
        decode: bool = False,
        progress: Scalar | None = None,
        mask: Bool[Array, "B L"] | None = None,
        segment_ids: Shaped[AnyArray, "..."] | None = None,
    ) -> ByToken:
        held = self._held(embed, train, progress)
        rows = held(rows, tokens)
        if self.pair_weight is None:
            return ByToken(rows, tokens)
        before = self._before(tokens, decode, mask, segment_ids)
        there = (before != NONE_BEFORE)[..., None]
        ids = jnp.maximum(before, 0)
        second = jnp.where(there, routing.rms_unit(held(embed(ids), ids)), 0)
        pair = routing.rms_unit(rows) + self.pair_weight * second
        return ByToken(pair, routing.pair_ids(before, tokens))

    def _held(self, embed, train, progress) -> Callable:
        """`(rows, ids) -> rows`, those of the table or, once held, of its copy."""
        if self.config.hold == "signatures":
            return lambda rows, _: rows
        table = embed.embedding
        rows = self.variable("routing", "rows", lambda: table)
        held = self.variable("routing", "held", jnp.zeros, (), bool)
        kept, was_held = rows.value, held.value
        is_held = was_held
        if (
            train
            and not self.is_initializing()
            and self.is_mutable_collection("routing")
        ):
            progress = misuse.check_hold(progress, self.config)
            is_held = was_held | routing.is_due(self.config, progress)
            held.value = is_held
            now = jax.lax.stop_gradient(table)
            rows.value = jnp.where(was_held, kept, now)

        def rows_of(rows, ids):
            copied = kept[ids].astype(rows.dtype)
            return routing.hold(rows, copied, was_held, is_held)

        return rows_of

    def _before(self, tokens, decode, mask, segment_ids):
        """The token before each, -1 where there is none; in decoding across calls."""
        if segment_ids is not None and segment_ids.shape != tokens.shape:
            raise ValueError(
                f"segment_ids must be {list(tokens.shape)}, a number a token. "
                f"Got {list(segment_ids.shape)}."
            )
        first = jnp.full(tokens.shape[:1], NONE_BEFORE, tokens.dtype)
        if not decode:
            return tokens_before(tokens, first, mask, segment_ids)[0]
        last = self.variable("cache", "before", lambda: first)
        before, last.value = tokens_before(tokens, last.value, mask, segment_ids)
        return before


def tokens_before(
    tokens: Integer[Array, "B L"],
    first: Integer[Array, " B"],
    mask: Bool[Array, "B L"] | None = None,
    segment_ids: Shaped[AnyArray, "B L"] | None = None,
) -> tuple[Integer[Array, "B L"], Integer[Array, " B"]]:
    """The last real token before each, and the last one of all.

    Args:
        first: what stands before the sequences, `NONE_BEFORE` for nothing.
        mask: True for real tokens; the others are passed over.
        segment_ids: the token before one of another segment is none.
    """
    real = jnp.ones(tokens.shape, bool) if mask is None else mask
    at = jnp.where(real, jnp.arange(tokens.shape[1])[None], -1)
    latest = jax.lax.cummax(at, axis=1)
    earlier = jnp.pad(latest[:, :-1], ((0, 0), (1, 0)), constant_values=-1)

    def take(values, place):
        return jnp.take_along_axis(values, jnp.maximum(place, 0), axis=1)

    before = jnp.where(earlier < 0, first[:, None], take(tokens, earlier))
    if segment_ids is not None:
        ids = jnp.asarray(segment_ids)
        starts = (earlier >= 0) & (take(ids, earlier) != ids)
        before = jnp.where(starts, NONE_BEFORE, before)
    last = latest[:, -1:]
    return before, jnp.where(last < 0, first[:, None], take(tokens, last))[:, 0]
