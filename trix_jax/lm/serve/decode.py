"""Decoding on the device: prompts are read in one call, then tokens follow in one
compiled loop, its cache reused in place, until the cache is full or every sequence has
ended.

Rows are lined up at their last tokens. On the left stands what shorter ones lack, on the
right what fills up a power of two, so that prompts of all lengths compile at most
`log2(context)` times; a mask keeps both out of everything, and the loop writes over the
right:

    row 0    . . a b c d | . .          length 6 of width 8
    row 1    f g h i j k | . .
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trix_jax.lm.serve.sampling import SamplingConfig, sample
from trix_jax.nn.attention import rewind
from trix_jax.nn.transformer import TransformerConfig, TransformerLM
from trix_jax.typing import Array, Bool, Int, Integer, Variables

LEAST_WIDTH = 16  # of a read: shorter prompts share a compilation
NOTHING = -1  # where an ended sequence has no token; the end mark of who has none


class Draws(NamedTuple):
    """What the next tokens are drawn with.

    Attributes:
        keys: one a sequence, into which a token's number is folded.
        number: of the next token, from 0.
        ended: sequences whose end mark came.
        end: id of the end mark.
    """

    keys: Array
    number: Integer[Array, ""]
    ended: Bool[Array, " B"]
    end: Integer[Array, ""]


class Decoding(NamedTuple):
    """Where a batch is.

    Attributes:
        last: the newest tokens, which the cache has not seen yet.
    """

    cache: Any
    last: Integer[Array, " B"]
    draws: Draws


class Steps(NamedTuple):
    """The two compiled functions.

    Attributes:
        read: `(variables, tokens [B, W], mask [B, W], length, draws)` to a `Decoding` of
            a fresh cache and the tokens `[B, 1]` that follow the first `length` columns.
        write: `(variables, decoding, count)` to the decoding after `count` more tokens,
            fewer where all sequences end, and these, `[B, context]`. The given decoding
            is used up.
    """

    read: Callable
    write: Callable


def lined_up(
    texts: Sequence[Sequence[int]], most: int, context: int
) -> tuple[Int[np.ndarray, "B W"], Bool[np.ndarray, "B W"], int]:
    """The last `most` tokens of each text as rows that end in one column, the mask of
    what is text, and how many columns there are before the padding on the right.
    """
    rows = [text[-most:] for text in texts]
    length = max(map(len, rows))
    width = min(context, max(LEAST_WIDTH, 1 << (length - 1).bit_length()))
    tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width))
    for i, row in enumerate(rows):
        at = slice(length - len(row), length)
        tokens[i, at], mask[i, at] = row, 1
    return tokens, mask.astype(bool), length


def begin(seed: int, rows: int, end_token: int | None) -> Draws:
    """The draws of sequences that start: row r has the key of `seed + r`."""
    keys = jax.vmap(jax.random.key)(seed + np.arange(rows))
    end = NOTHING if end_token is None else end_token
    return Draws(keys, jnp.int32(0), jnp.zeros(rows, bool), jnp.int32(end))


@lru_cache(maxsize=8)
def compiled(config: TransformerConfig, sampling: SamplingConfig) -> Steps:
    """Compiles the two for a model and a way to choose tokens; the seed has no part."""
    model = TransformerLM(config)

    def forward(variables: Variables, cache: Any, tokens, mask=None):
        variables = {**variables, **({"cache": cache} if cache else {})}
        how: dict[str, Any] = {"decode": True, "mask": mask, "mutable": ["cache"]}
        (logits, _, _), mutated = model.apply(variables, tokens, **how)
        return logits, mutated["cache"]

    def read(variables, tokens, mask, length, draws: Draws):
        logits, cache = forward(variables, {}, tokens, mask)
        logits = jax.lax.dynamic_index_in_dim(logits, length - 1, 1, keepdims=False)
        new, draws = _drawn(logits, draws, sampling)
        decoding = Decoding(rewind(cache, length), jnp.maximum(new, 0), draws)
        return decoding, new[:, None]

    def write(variables, decoding: Decoding, count):
        start = decoding.draws.number

        def goes_on(carry):
            (_, _, draws), _ = carry
            return (draws.number - start < count) & ~draws.ended.all()

        def step(carry):
            (cache, last, draws), written = carry
            logits, cache = forward(variables, cache, last[:, None])
            at = draws.number - start
            new, draws = _drawn(logits[:, 0], draws, sampling)
            last = jnp.where(new == NOTHING, last, new)
            return Decoding(cache, last, draws), written.at[:, at].set(new)

        nothing = jnp.full((decoding.last.size, config.context), NOTHING, jnp.int32)
        return jax.lax.while_loop(goes_on, step, (decoding, nothing))

    return Steps(jax.jit(read), jax.jit(write, donate_argnums=1))


def _drawn(logits, draws: Draws, sampling: SamplingConfig) -> tuple[Array, Draws]:
    """A token a sequence, nothing for those that have ended, and the draws after it."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(draws.keys, draws.number)
    own = jax.vmap(lambda row, key: sample(row[None], key, sampling)[0])
    new = jnp.where(draws.ended, NOTHING, own(logits, keys).astype(jnp.int32))
    ended = draws.ended | (new == draws.end)
    return new, draws._replace(number=draws.number + 1, ended=ended)
