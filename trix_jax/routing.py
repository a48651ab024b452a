"""Routing without a router: a token goes to the tile whose signature, read off the
tile's weights, matches it best.

    signature_n = rms_unit(sum_f q_up[n, :, f])          ("sum")    or    sign(sum_f q_up[n, :, f])    ("sign")
    score_tn    = rms_unit(h_t) . signature_n / sqrt(D)
    tiles_t     = top_k over n of (score_tn + bias_n)

Routing learns nothing: it has no parameters. The bias balances loads, is
only used to select, and lives with the tile assignment of clusters in the Flax
collection `"routing"`, which the optimizer never sees. A layer reports there by how
much its tiles were chosen or missed (`trix_jax.balance`); `update`, called once per
optimizer step, moves the state.

References:
    Fedus et al., 2021, "Switch Transformers", https://arxiv.org/abs/2101.03961 (balance
    loss). Clark et al., 2022, "Unified Scaling Laws for Routed Language Models",
    https://arxiv.org/abs/2202.01169 (hash and base layers as controls).
"""

import dataclasses
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from trix_jax import dispatch
from trix_jax.clusters import EPSILON
from trix_jax.clusters import rms_unit as rms_unit
from trix_jax.hashing import layer_ids as layer_ids
from trix_jax.hashing import pair_ids as pair_ids
from trix_jax.matching import match as match
from trix_jax.matching import match_inside as match_inside
from trix_jax.matching import select_among as select_among
from trix_jax.matching import select_tiles as select_tiles
from trix_jax.progress import reached
from trix_jax.routing_state import MARGINS as MARGINS
from trix_jax.routing_state import freeze_routing as freeze_routing
from trix_jax.routing_state import hold_signatures as hold_signatures
from trix_jax.routing_state import rebuild_clusters as rebuild_clusters
from trix_jax.routing_state import reduce as reduce
from trix_jax.routing_state import update as update
from trix_jax.typing import Array, Bool, Float, Integer, Scalar

Signature = Literal["sum", "sign"]
Gate = Literal["none", "sigmoid", "softmax", "renormalized"]
Source = Literal["weights", "random", "learned", "hash"]
Hold = Literal["signatures", "scores", "routes"]
BalanceOver = Literal["all", "open"]

COSINES = 256  # tiles whose cosines to all others are in memory at a time
DEAD_SHARE = 0.1  # a tile below this share of the uniform load 1/N is dead


@dataclasses.dataclass(frozen=True)
class RoutingConfig:
    """How tokens find tiles.

    Attributes:
        source: "weights" reads signatures off the tiles. "hash" looks at token ids: it
            has no scores, so that auxiliary losses are 0, biases stay, and nothing can
            be held or steered. Two controls for experiments: "random" keeps frozen
            random signatures, "learned" has a trained linear router.
        signature: "sum" keeps the summed ternary weights at unit RMS, "sign" (the
            original's) only their sign.
        gate: what multiplies a chosen tile's output and lets the task's gradient reach
            the routing: "none" (1), "sigmoid" of the score, "softmax" (the tile's share
            of the softmax over the tiles that a token may choose from, all N or those of
            the open clusters, times their number), "renormalized" (K times its share of
            the softmax over the chosen). With source "hash" it is 1.
        score_scale: multiplies the scores.
        balance_weight: of the probability balance loss in `total_aux`.
        diversity_weight: of the signature diversity loss in `total_aux`.
        balance_over: the tiles whose probabilities the balance loss is made of: "all", or
            "open", those that a token may choose from. With clusters, training under
            "open" scores no other tiles, as serving does.
        hold_after: share of training after which what `hold` names is held: it stays
            what it was at that moment and takes no gradient, while the weights go on
            training. None never holds, 1 leaves it to `hold_signatures`.
        hold: "signatures"; "scores", the router's input as well (in a `TransformerLM`,
            a copy of the embedding's rows; a layer of one's own sees what it is given);
            "routes", the biases as well, so that routes by token are fixed. Balance
            goes on under the first two.
        hash_sets: with source "hash", S sets of K / G tiles that tokens are hashed to, G
            times (`sets_per_token`), each time among N / G other tiles; None hashes each
            token to tiles of its own. Tokens of a set meet its tiles together
            (`trix_jax.sets_ffn`), so that they are copied G times and not K times. S * K
            must be at least N, or tiles would be in no set.
        sets_per_token: G, a divisor of K and N.
    """

    source: Source = "weights"
    signature: Signature = "sum"
    gate: Gate = "sigmoid"
    score_scale: float = 1.0
    balance_weight: float = 0.01
    diversity_weight: float = 0.001
    balance_over: BalanceOver = "all"
    hold_after: float | None = None
    hold: Hold = "signatures"
    hash_sets: int | None = None
    sets_per_token: int = 1

    def __post_init__(self):
        for name, kind in (
            ("source", Source),
            ("signature", Signature),
            ("gate", Gate),
            ("balance_over", BalanceOver),
            ("hold", Hold),
        ):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"{name} must be one of {', '.join(get_args(kind))}. Got {getattr(self, name)!r}."
                )
        for name in ("balance_weight", "diversity_weight"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"{name} must not be negative. Got {getattr(self, name)}."
                )
        if self.score_scale <= 0:
            raise ValueError(f"score_scale must be positive. Got {self.score_scale}.")
        if self.source == "hash" and self.hold_after is not None:
            raise ValueError(
                "hold_after must be None with source 'hash', which has no signatures to "
                f"hold. Got {self.hold_after}."
            )
        if self.hash_sets is not None:
            if self.source != "hash":
                raise ValueError(
                    f"hash_sets needs source 'hash'. Got {self.source!r} and "
                    f"{self.hash_sets}."
                )
            if self.hash_sets < 1:
                raise ValueError(f"hash_sets must be at least 1. Got {self.hash_sets}.")
        elif self.sets_per_token != 1:
            raise ValueError(
                f"sets_per_token={self.sets_per_token} needs hash_sets. Got None."
            )
        if self.hold_after is None:
            if self.hold != "signatures":
                raise ValueError(
                    f"hold={self.hold!r} needs hold_after, a share of training. Got None."
                )
        elif not 0 <= self.hold_after <= 1:
            raise ValueError(f"hold_after must be in 0..1. Got {self.hold_after}.")

    @property
    def holds(self) -> bool:
        """Whether the routing state has a place for what is held."""
        return self.hold_after is not None

    @property
    def holds_by_itself(self) -> bool:
        """Whether training must tell its progress for something to be held."""
        return self.hold_after is not None and self.hold_after < 1


class RoutingInfo(NamedTuple):
    """What one call of a layer did.

    Attributes:
        tiles: the chosen tiles of each token, best first.
        gates: what multiplied their outputs.
        counts: assignments a tile received; they add up to T * K.
        entropy: of the tile usage, in nats; `log(N)` is even use.
        max_load: largest load over the mean load.
        dead_tiles: tiles with less than a tenth of the mean load.
        tie_rate: share of tokens with more than one best score.
        signature_cosine: mean absolute cosine between the signatures of different
            tiles.
    """

    tiles: Integer[Array, "*B K"]
    gates: Float[Array, "*B K"]
    counts: Float[Array, " N"]
    entropy: Float[Array, ""]
    max_load: Float[Array, ""]
    dead_tiles: Integer[Array, ""]
    tie_rate: Float[Array, ""]
    signature_cosine: Float[Array, ""]


def signatures(
    sums: Float[Array, "*B D"], kind: Signature = "sum"
) -> Float[Array, "*B D"]:
    """A tile's address, from the sum of its up-projection's columns: unit RMS ("sum")
    or `sign`, ties 0 ("sign").
    """
    sums = sums.astype(jnp.float32)
    return rms_unit(sums) if kind == "sum" else _sign_through(sums)


def hold(
    value: Float[Array, "*B"],
    kept: Float[Array, "*B"],
    was_held: Bool[Array, ""],
    is_held: Bool[Array, ""],
) -> Float[Array, "*B"]:
    """`value` until it is held; from then on, without gradient, what it was at the
    moment of holding: itself, or `kept` if it was held before.
    """
    still = jnp.where(was_held, kept, jax.lax.stop_gradient(value))
    return jnp.where(is_held, still, value)


def is_due(config: RoutingConfig, progress: Scalar) -> Bool[Array, ""]:
    """Whether training has come to where `config` holds."""
    after = config.hold_after
    return jnp.asarray(after is not None and after < 1) & reached(progress, after or 0)


def cluster_signatures(
    signature: Float[Array, "N D"],
    members: Integer[Array, "C m"],
    kind: Signature = "sum",
) -> Float[Array, "C D"]:
    """A cluster's address: the mean of its tiles' signatures, at unit RMS or as `sign`."""
    return signatures(signature[members].mean(axis=1), kind)


def open_tiles(
    clusters: Integer[Array, "T k"], members: Integer[Array, "C m"]
) -> Bool[Array, "T N"]:
    """Which tiles a token may choose from: those of the clusters it chose."""
    count = members.shape[0]
    is_open_TC = (clusters[:, :, None] == jnp.arange(count)[None, None]).any(axis=1)
    return is_open_TC[:, cluster_of(members)]


def cluster_of(members: Integer[Array, "C m"]) -> Integer[Array, " N"]:
    """The cluster of each tile."""
    flat = members.reshape(-1)
    return (
        jnp.zeros_like(flat)
        .at[flat]
        .set(jnp.arange(flat.size, dtype=flat.dtype) // members.shape[1])
    )


def gates(
    scores: Float[Array, "T N"],
    tiles: Integer[Array, "T K"],
    kind: Gate,
    allowed: Bool[Array, "T N"] | None = None,
) -> Float[Array, "T K"]:
    """The multipliers of the chosen tiles' outputs; see `RoutingConfig.gate`."""
    chosen = jnp.take_along_axis(scores, tiles, axis=-1)
    if kind == "none":
        return jnp.ones_like(chosen)
    if kind == "sigmoid":
        return jax.nn.sigmoid(chosen)
    if kind == "renormalized":
        return tiles.shape[-1] * jax.nn.softmax(chosen, axis=-1)
    open_scores = scores if allowed is None else jnp.where(allowed, scores, -jnp.inf)
    width = scores.shape[-1] if allowed is None else allowed.sum(axis=-1, keepdims=True)
    return width * jnp.take_along_axis(
        jax.nn.softmax(open_scores, axis=-1), tiles, axis=-1
    )


def count_tiles(
    tiles: Integer[Array, "T K"],
    num_tiles: int,
    mask: Bool[Array, " T"] | None = None,
) -> Float[Array, " N"]:
    """Assignments each tile received, those of masked tokens (False) left out."""
    return dispatch.count_tiles(tiles, num_tiles, mask).astype(jnp.float32)


def balance_loss(
    scores: Float[Array, "T S"],
    share: Float[Array, " N"],
    mask: Bool[Array, " T"] | None = None,
    count: Float[Array, ""] | None = None,
    tiles: Integer[Array, "T S"] | None = None,
) -> Float[Array, ""]:
    """Computes `N * sum_n share_n * mean_t softmax(scores)_tn - 1`: 0 at even use, at
    most N - 1.

    The shares carry no gradient, the probabilities do (Switch Transformers, equation
    4).

    Args:
        scores: of every tile, or of those that a token may choose from.
        share: of the assignments, a number a tile.
        mask: False for tokens that the mean leaves out; without any the loss is 0.
        count: what the mean divides by; None takes the number of tokens. The losses of
            devices that hold different numbers of real tokens average to that of the
            whole batch if all of them divide by the mean of those numbers.
        tiles: which tiles the scores are of; None is every one, in order. The
            probability of all others is 0.
    """
    probability = jax.nn.softmax(scores, axis=-1)
    share, n = jax.lax.stop_gradient(share), share.shape[0]
    if tiles is not None:  # the sum over a token's own tiles comes first
        probability = (share[tiles] * probability).sum(axis=-1, keepdims=True)
        share = jnp.ones((1,))
    if mask is None:
        return n * jnp.sum(share * probability.mean(axis=0)) - 1
    own = mask.sum().astype(jnp.float32)
    total = jnp.where(mask[:, None], probability, 0).sum(axis=0)
    excess = n * jnp.sum(share * total) - own  # `sum_t (N sum_n share_n p_tn - 1)`
    return excess / jnp.maximum(own if count is None else count, EPSILON)


def diversity_loss(signature: Float[Array, "N D"]) -> Float[Array, ""]:
    """Computes the mean of `cos(signature_i, signature_j)^2` over i != j: 0 when all
    are orthogonal.

    Of more tiles than channels it is taken from the smaller product, `sum_ij cos_ij^2 =
    |U^T U|^2` of unit rows U.
    """
    n, d = signature.shape
    unit = _unit(signature)
    if n <= d:
        return _off_diagonal_mean(jnp.square(unit @ unit.T))
    own = jnp.square(jnp.square(unit).sum(axis=-1)).sum()
    return (jnp.square(unit.T @ unit).sum() - own) / (n * (n - 1))


def signature_cosine(signature: Float[Array, "N D"]) -> Float[Array, ""]:
    """Mean absolute cosine between the signatures of different tiles."""
    n, unit = signature.shape[0], _unit(signature)
    if n <= COSINES:
        return _off_diagonal_mean(jnp.abs(unit @ unit.T))

    def of_row(row):
        cosines = jnp.abs(unit @ unit[row])
        return jnp.where(jnp.arange(n) == row, 0, cosines).sum()

    sums = jax.lax.map(of_row, jnp.arange(n), batch_size=COSINES)
    return sums.sum() / (n * (n - 1))


def usage_entropy(counts: Float[Array, "*B N"]) -> Float[Array, "*B"]:
    """Computes `-sum_n p_n log p_n` in nats, `p` the share of assignments."""
    p = counts / jnp.maximum(counts.sum(axis=-1, keepdims=True), 1)
    return -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0), axis=-1)


def max_load(counts: Float[Array, "*B N"]) -> Float[Array, "*B"]:
    """Largest load over the mean load: 1 is even, N is one tile taking everything."""
    return counts.max(axis=-1) / jnp.maximum(counts.mean(axis=-1), EPSILON)


def dead_tiles(counts: Float[Array, "*B N"]) -> Integer[Array, "*B"]:
    """Number of tiles with less than `0.1 / N` of the assignments."""
    return jnp.sum(counts < DEAD_SHARE * counts.mean(axis=-1, keepdims=True), axis=-1)


def tie_rate(
    scores: Float[Array, "T N"], mask: Bool[Array, " T"] | None = None
) -> Float[Array, ""]:
    """Share of tokens whose best score is shared by two or more tiles; masked tokens
    (False) are left out.
    """
    tied = (scores == scores.max(axis=-1, keepdims=True)).sum(axis=-1) > 1
    if mask is None:
        return jnp.mean(tied)
    return (tied & mask).sum() / jnp.maximum(mask.sum(), 1)


def stability(
    before: Integer[Array, "*B K"], after: Integer[Array, "*B K"]
) -> Float[Array, ""]:
    """Share of assignments in `after` that the same token had in `before`; with K = 1,
    tokens that kept their tile. Masked tokens, which have the tile -1, are left out.
    """
    kept = (after[..., :, None] == before[..., None, :]).any(axis=-1)
    real = after >= 0
    return (kept & real).sum() / jnp.maximum(real.sum(), 1)


def _unit(signature):
    return signature / jnp.sqrt(
        jnp.sum(jnp.square(signature), axis=-1, keepdims=True) + EPSILON
    )


def _off_diagonal_mean(matrix):
    n = matrix.shape[0]
    return jnp.sum(jnp.where(jnp.eye(n, dtype=bool), 0, matrix)) / max(n * (n - 1), 1)


@jax.custom_jvp
def _sign_through(x):
    """`sign(x)` with the gradient of `rms_unit(x)`, which points the same way and has
    the same size.
    """
    return jnp.sign(x)


@_sign_through.defjvp
def _sign_through_jvp(primals, tangents):
    return _sign_through(*primals), jax.jvp(rms_unit, primals, tangents)[1]
