"""`Router`: holds the routing state of a layer and calls `trix_jax.routing`. It has no parameters.

Collection `"routing"`: `bias` [N], `counts` [N] (since the last `routing.update`), `signature` [N, D] (as last seen in
training), `frozen`; with clusters also `cluster_bias` [C] and `members` [C, N / C].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from trix_jax import routing
from trix_jax.typing import Array, Float, Integer


class Route(NamedTuple):
    """Tiles and gates of each token."""

    tiles: Integer[Array, "T K"]
    gates: Float[Array, "T K"]


class Router(nn.Module):
    """Chooses tiles for tokens by signature.

    Attributes:
        num_tiles: N.
        tiles_per_token: K.
        num_clusters: 0 is flat routing; otherwise a divisor of N.
        top_k_clusters: clusters a token may choose tiles from.
        axis_name: mapped axis over which the balance loss takes its shares in training, as in `nn.BatchNorm`.
    """

    num_tiles: int
    tiles_per_token: int = 1
    num_clusters: int = 0
    top_k_clusters: int = 1
    config: routing.RoutingConfig = routing.RoutingConfig()
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self,
        h: Float[Array, "T D"],
        signature: Float[Array, "N D"],
        train: bool = False,
        token_ids: Integer[Array, " T"] | None = None,
    ) -> tuple[Route, routing.RoutingInfo, dict[str, Float[Array, ""]]]:
        state = self._variables(signature)
        if self.config.source == "random":
            signature = state["signature"].value
        signature = jnp.where(
            state["frozen"].value, state["signature"].value, signature
        )
        scores, used = self._scores(h, signature)
        tiles, gates = self._select(scores, h, signature, state, token_ids)
        counts = routing.count_tiles(tiles, self.num_tiles)
        if not self.is_initializing() and self.is_mutable_collection("routing"):
            state["counts"].value += counts
            state["signature"].value = jax.lax.stop_gradient(signature)
        info = _info(tiles, gates, counts, scores, used)
        return Route(tiles, gates), info, self._losses(scores, used, counts, train)

    def _variables(self, signature):
        n, config = self.num_tiles, self.config
        first = (
            (lambda: signature)
            if config.source != "random"
            else lambda: routing.rms_unit(
                jax.random.normal(self.make_rng("params"), signature.shape)
            )
        )
        state = {
            "bias": self.variable("routing", "bias", jnp.zeros, (n,)),
            "counts": self.variable("routing", "counts", jnp.zeros, (n,)),
            "signature": self.variable("routing", "signature", first),
            "frozen": self.variable("routing", "frozen", jnp.zeros, (), bool),
        }
        if c := self.num_clusters:
            tiles = lambda: jnp.arange(n, dtype=jnp.int32).reshape(c, n // c)  # noqa: E731
            state["members"] = self.variable("routing", "members", tiles)
            state["cluster_bias"] = self.variable(
                "routing", "cluster_bias", jnp.zeros, (c,)
            )
        return state

    def _scores(self, h, signature):
        """Scores, and the directions they were taken along."""
        if self.config.source == "learned":
            init = nn.initializers.normal(1.0)
            signature = self.param("router", init, signature.shape)
        return routing.match(h, signature, self.config.score_scale), signature

    def _select(self, scores, h, signature, state, token_ids):
        k, config = self.tiles_per_token, self.config
        if config.source == "hash":
            tiles = _hash_tiles(token_ids, self.num_tiles, k)
            return tiles, jnp.ones(tiles.shape, jnp.float32)
        allowed = None
        if self.num_clusters:
            members = state["members"].value
            address = routing.cluster_signatures(signature, members, config.signature)
            cluster_scores = (
                routing.match(h, address, config.score_scale)
                + state["cluster_bias"].value[None]
            )
            allowed = routing.open_clusters(
                cluster_scores, members, self.top_k_clusters
            )
        biased = jax.lax.stop_gradient(scores) + state["bias"].value[None]
        tiles = routing.select_tiles(
            biased if allowed is None else jnp.where(allowed, biased, -jnp.inf), k
        )
        return tiles, routing.gates(scores, tiles, config.gate, allowed)

    def _losses(self, scores, signature, counts, train):
        share = counts / counts.sum()
        if train and self.axis_name is not None and not self.is_initializing():
            share = jax.lax.pmean(share, self.axis_name)
        balance = routing.balance_loss(scores, share)
        diversity = routing.diversity_loss(signature)
        total = (
            self.config.balance_weight * balance
            + self.config.diversity_weight * diversity
        )
        return {"balance": balance, "diversity": diversity, "total_aux": total}


def _info(tiles, gates, counts, scores, signature):
    return routing.RoutingInfo(
        tiles=tiles,
        gates=gates,
        counts=counts,
        entropy=routing.usage_entropy(counts),
        max_load=routing.max_load(counts),
        dead_tiles=routing.dead_tiles(counts),
        tie_rate=routing.tie_rate(scores),
        signature_cosine=routing.signature_cosine(signature),
    )


def _hash_tiles(token_ids, num_tiles, k):
    """K distinct tiles from a multiplicative hash of the token id (Knuth, TAOCP 6.4), evenly spaced around the ring."""
    if token_ids is None:
        raise ValueError(
            "token_ids must be given to a layer whose routing source is 'hash'. Got None."
        )
    mixed = (token_ids.astype(jnp.uint32) * jnp.uint32(2654435761)) >> jnp.uint32(16)
    first = (mixed % jnp.uint32(num_tiles)).astype(jnp.int32)
    steps = jnp.arange(k, dtype=jnp.int32) * (num_tiles // k)
    return (first[:, None] + steps[None]) % num_tiles
