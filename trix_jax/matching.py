"""Scores of tokens at signatures, of all tiles or of some clusters' alone, and the best
of them.

    score_tn = rms_unit(h_t) . signature_n / sqrt(D)
    tiles_t  = the k best, of equal scores the lowest tile
"""

import jax
import jax.numpy as jnp

from trix_jax import dispatch
from trix_jax.clusters import EPSILON
from trix_jax.compiled import together
from trix_jax.typing import Array, Bool, Float, Integer, Scalar

FEW = 8  # tiles that are looked for one after the other; more by a sort


def match(
    h: Float[Array, "T D"], signature: Float[Array, "N D"], scale: Scalar = 1.0
) -> Float[Array, "T N"]:
    """Computes `scale * rms_unit(h) @ signature.T / sqrt(D)` in float32."""
    return _match(h, signature, scale / h.shape[-1] ** 0.5)


@together()
def _match(h, signature, factor):
    h32 = h.astype(jnp.float32)
    # Of one token: on CPUs XLA is slow at a vector from the left.
    products = (signature @ h32.T).T if h.shape[0] == 1 else h32 @ signature.T
    return products * _unit_scale(h, factor)


def match_inside(
    h: Float[Array, "T D"],
    signature: Float[Array, "N D"],
    clusters: Integer[Array, "T k"],
    members: Integer[Array, "C m"],
    scale: Scalar = 1.0,
    mask: Bool[Array, " T"] | None = None,
) -> tuple[Float[Array, "T S"], Integer[Array, "T S"]]:
    """The scores of `match` for the tiles of each token's clusters alone, and those
    tiles, `S = k * m`.

    Tokens are grouped by cluster as they are by tile for the FFN (`dispatch`), so that
    each block meets the signatures of one cluster: k * m products of D a token, not N.
    A score equals that of `match` up to the order of its D additions. Those of masked
    tokens (False) mean nothing.
    """
    factor = scale / h.shape[-1] ** 0.5
    return _match_inside(h, signature, clusters, members, factor, mask)


@together()
def _match_inside(h, signature, clusters, members, factor, mask):
    if mask is not None:  # they have no row, and read that of another
        h = jnp.where(mask[:, None], h, 0)
    signature = jnp.asarray(signature)
    plan = dispatch.make_plan(clusters, members.shape[0], mask=mask)
    near = signature[members[plan.block_tile]]
    blocks = dispatch.to_blocks(h.astype(jnp.float32), plan)
    scores = dispatch.from_blocks(blocks @ jnp.swapaxes(near, -1, -2), plan)
    tiles = members[clusters]
    count = (h.shape[0], tiles.shape[1] * tiles.shape[2])
    return scores.reshape(count) * _unit_scale(h, factor), tiles.reshape(count)


def _unit_scale(h, factor):
    """What turns `h @ signature` into a score, a number a token."""
    mean = jnp.mean(jnp.square(h.astype(jnp.float32)), axis=-1, keepdims=True)
    return jax.lax.rsqrt(mean + EPSILON) * factor


def select_tiles(scores: Float[Array, "T N"], k: int = 1) -> Integer[Array, "T K"]:
    """The `k` best tiles of each token, best first; of equal scores the lowest index
    wins.

    Raises:
        ValueError: `k` is not in 1..N.
    """
    if not 1 <= k <= scores.shape[-1]:
        raise ValueError(
            f"tiles_per_token={k} must be at least 1 and at most num_tiles={scores.shape[-1]}."
        )
    if k == 1:
        return jnp.argmax(scores, axis=-1, keepdims=True)
    # top_k puts 0.0 before -0.0, argmax takes them for equal.
    return jax.lax.top_k(jnp.where(scores == 0, 0, scores), k)[1]


def select_among(
    scores: Float[Array, "T S"], tiles: Integer[Array, "T S"], k: int = 1
) -> Integer[Array, "T K"]:
    """The columns of the `k` best of a token's candidates, best first, as
    `select_tiles` would choose them among all tiles: of equal scores the lowest tile
    wins.
    """
    scores = jnp.where(jnp.isnan(scores), jnp.inf, scores)
    column = jnp.arange(scores.shape[-1])[None]
    if k > FEW:
        keys = jnp.where(scores == 0, 0, -scores), tiles
        columns = jnp.broadcast_to(column, scores.shape)
        return jax.lax.sort((*keys, columns), num_keys=2)[2][:, :k]
    is_left = jnp.ones(scores.shape, bool)
    chosen = []
    for _ in range(k):
        best = jnp.where(is_left, scores, -jnp.inf).max(axis=-1, keepdims=True)
        ties = is_left & (scores == best)
        lowest = jnp.where(ties, tiles, jnp.iinfo(tiles.dtype).max)
        chosen.append(jnp.argmin(lowest, axis=-1, keepdims=True))
        is_left &= column != chosen[-1]
    return jnp.concatenate(chosen, axis=-1)
