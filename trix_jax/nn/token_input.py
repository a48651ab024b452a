"""`TokenInput`: what a language model's signatures meet when it routes by token.

    "embedding"    row(t)
    "pair"         rms_unit(row(t)) + w * rms_unit(row(t - 1))        0 for the second
                   where there is no token before

Rows are those of the embedding table or, once the scores are held, of the copy that was
made of it at that moment. Collection `"routing"`, only with `hold="scores"` or
`"routes"`: `rows` [V, D] (the table as last seen in training) and `held`. Collection
`"cache"`, in decoding by pairs: `before` and `segment` [B], the last real token so far
and its segment.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from trix_jax import routing
from trix_jax.hashing import NONE_BEFORE
from trix_jax.nn import misuse
from trix_jax.nn.cache import keep
from trix_jax.routing import RoutingConfig
from trix_jax.typing import Array, Bool, Float, Integer, Scalar


def check_router_input(config: Any) -> None:
    """Refuses a `TransformerConfig` whose settings of the routers' input make no sense.

    Raises:
        ValueError: a weight of pairs that is not positive, layers by hidden state that
            are not there or are all of them, hidden states to be held, a hash for every
            layer where nothing is hashed.
    """
    c, by_hidden = config, config.router_input == "hidden"
    if not 0 < c.pair_weight < float("inf"):
        raise ValueError(
            f"pair_weight must be positive and finite. Got {c.pair_weight}."
        )
    first = c.hidden_from
    if first is not None and (by_hidden or not 0 < first < c.n_layers):
        raise ValueError(
            f"hidden_from={first} must be at least 1 and below n_layers={c.n_layers}, "
            f"with a router_input by token. Got router_input={c.router_input!r}."
        )
    if first is not None and c.routing.source == "hash":
        raise ValueError(
            "hidden_from must be None with routing.source 'hash', which looks at no "
            f"hidden state. Got {first}."
        )
    if c.hash_per_layer and c.routing.source != "hash":
        raise ValueError(
            "hash_per_layer must be False (--model.no-hash-per-layer) where "
            f"routing.source is not 'hash'. Got routing.source={c.routing.source!r}."
        )
    name = "num_tiles" if c.routing.hash_sets is None else "sets_per_token"
    each = c.num_tiles if name == "num_tiles" else c.routing.sets_per_token
    keys = (c.vocab_size or 1) * each  # of a layer, in the order of 2**32
    if c.hash_per_layer and (apart := 2**32 // math.gcd(keys, 2**32)) < c.n_layers:
        raise ValueError(
            f"hash_per_layer must give {c.n_layers} layers other hashes, but layers "
            f"{apart} apart share one: {apart} * vocab_size * {name} is a multiple of "
            f"2**32. Got vocab_size={c.vocab_size} and {name}={each}; one more "
            "of either ends it."
        )
    if by_hidden and c.routing.hold != "signatures":
        raise ValueError(
            f"routing.hold={c.routing.hold!r} needs a router_input by token, "
            "'embedding' or 'pair': hidden states cannot be held. Got 'hidden'."
        )


class ByToken(NamedTuple):
    """What routers see of a token.

    Attributes:
        router_input: what signatures meet.
        token_ids: what the source "hash" hashes: tokens, or pairs of them.
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
        segment_ids: Integer[Array, "B L"] | None = None,
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
        rows = self.variable("routing", "rows", lambda: jnp.array(table))
        held = self.variable("routing", "held", jnp.zeros, (), bool)
        kept, was_held = jnp.asarray(rows.value), held.value
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
        start = nothing_before(tokens)
        if not decode:
            return tokens_before(tokens, start, mask, segment_ids)[0]
        token = self.variable("cache", "before", lambda: start.token)
        segment = self.variable("cache", "segment", lambda: start.segment)
        last = Last(token.value, segment.value)
        before, last = tokens_before(tokens, last, mask, segment_ids)
        keep(self, before=last.token, segment=last.segment)
        return before


class Last(NamedTuple):
    """The last real token of each sequence so far, `NONE_BEFORE` for none, and the
    number of its segment.
    """

    token: Integer[Array, " B"]
    segment: Integer[Array, " B"]


def nothing_before(tokens: Integer[Array, "B L"]) -> Last:
    """What stands before sequences that begin."""
    batch = tokens.shape[:1]
    return Last(jnp.full(batch, NONE_BEFORE, jnp.int32), jnp.zeros(batch, jnp.int32))


def tokens_before(
    tokens: Integer[Array, "B L"],
    start: Last,
    mask: Bool[Array, "B L"] | None = None,
    segment_ids: Integer[Array, "B L"] | None = None,
) -> tuple[Integer[Array, "B L"], Last]:
    """The last real token before each, `NONE_BEFORE` where there is none in its
    segment; and the last one of all, to start the next call with.

    Args:
        start: what stands before the sequences.
        mask: True for real tokens; the others are passed over.
        segment_ids: a number a token; None goes on with the last one.
    """
    if tokens.shape[1] == 0:
        return tokens, start
    real = jnp.ones(tokens.shape, bool) if mask is None else mask
    latest = jax.lax.cummax(
        jnp.where(real, jnp.arange(tokens.shape[1])[None], -1), axis=1
    )

    def up_to_here(values, first):
        values = jnp.take_along_axis(values, jnp.maximum(latest, 0), axis=1)
        values = jnp.where(latest < 0, first[:, None], values.astype(jnp.int32))
        return jnp.concatenate([first[:, None], values], axis=1)

    seen, segment = up_to_here(tokens, start.token), start.segment
    before = seen[:, :-1]
    if segment_ids is not None:
        segments = up_to_here(segment_ids, start.segment)
        before = jnp.where(segments[:, :-1] == segment_ids, before, NONE_BEFORE)
        segment = segments[:, -1]
    return before, Last(seen[:, -1], segment)
