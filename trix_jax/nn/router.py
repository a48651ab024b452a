"""`Router`: holds the routing state of a layer and calls `trix_jax.routing`. It has no
parameters.

Collection `"routing"`: `bias` [N], `margins` [N, bins] (since the last
`routing.update`, see `trix_jax.balance`), `signature` [N, D] (as last seen in
training), `frozen`; with clusters also `members` [C, N / C], `cluster_bias` [C] and
`cluster_margins` [C, bins].
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from trix_jax import balance, routing
from trix_jax.nn import misuse, steering
from trix_jax.nn.settings import TileSettings
from trix_jax.typing import Array, Bool, Float, Integer


class Route(NamedTuple):
    """Tiles and gates of each token."""

    tiles: Integer[Array, "T K"]
    gates: Float[Array, "T K"]


class Router(nn.Module):
    """Chooses tiles for tokens by signature.

    With clusters, evaluation and serving score the clusters and then the tiles of those
    chosen, `C + top_k_clusters * N / C` products a token. Training (a mutable
    collection `"routing"`) scores all N: the balance loss is made of the probabilities
    of all tiles, and so are the losses and the diagnostic `tie_rate`. Evaluation under
    `jit` computes them only where they are read. Orders (`steering`) may open any tile
    and score all as well.

    Attributes:
        settings: see `TileSettings`.
    """

    settings: TileSettings

    @nn.compact
    def __call__(
        self,
        h: Float[Array, "T D"],
        signature: Float[Array, "N D"],
        train: bool = False,
        token_ids: Integer[Array, " T"] | None = None,
        mask: Bool[Array, " T"] | None = None,
    ) -> tuple[Route, routing.RoutingInfo, dict[str, Float[Array, ""]]]:
        n, config = self.settings.num_tiles, self.settings.routing
        self._check_collection(train)
        state = self._variables(signature) | {"mask": mask}
        if config.source == "random":
            signature = state["signature"].value
        signature = jnp.where(
            state["frozen"].value, state["signature"].value, signature
        )
        scores, used = self._scores(h, signature)
        if config.source == "hash":
            if self.has_variable(steering.STEERING, "tiles"):
                raise ValueError(
                    "steering must not be given to a layer whose routing source is 'hash'."
                )
            tiles = _hash_tiles(token_ids, n, self.settings.tiles_per_token)
            gates = jnp.ones(tiles.shape, jnp.float32)
        else:
            tiles, gates = self._select(scores, used, h, signature, state)
        if self._is_training():
            state["signature"].value = jax.lax.stop_gradient(signature)
        counts = routing.count_tiles(tiles, n, mask)
        info = _info(tiles, gates, counts, scores, used, mask)
        losses = self._losses(scores, used, counts, train, mask)
        return Route(tiles, gates), info, losses

    def _check_collection(self, train):
        """Says where the state is missing, is that of several layers, or is not kept."""
        if self.is_initializing():
            return
        if not self.has_variable("routing", "bias"):
            raise ValueError(misuse.NO_STATE)
        shape = jnp.shape(self.get_variable("routing", "bias"))
        misuse.check_state({"bias": shape}, self.settings.num_tiles)
        if train and not self.is_mutable_collection("routing"):
            misuse.warn_of_training_without_state()

    def _variables(self, signature) -> dict[str, Any]:
        n, config = self.settings.num_tiles, self.settings.routing
        first = (
            (lambda: signature)
            if config.source != "random"
            else lambda: routing.rms_unit(
                jax.random.normal(self.make_rng("params"), signature.shape)
            )
        )

        def zeros(name, *shape):
            return self.variable("routing", name, jnp.zeros, shape)

        state = {
            "bias": zeros("bias", n),
            "margins": zeros("margins", n, balance.BINS),
            "signature": self.variable("routing", "signature", first),
            "frozen": self.variable("routing", "frozen", jnp.zeros, (), bool),
        }
        if c := self.settings.num_clusters:

            def tiles():
                return jnp.arange(n, dtype=jnp.int32).reshape(c, n // c)

            state["members"] = self.variable("routing", "members", tiles)
            state["cluster_bias"] = zeros("cluster_bias", c)
            state["cluster_margins"] = zeros("cluster_margins", c, balance.BINS)
        return state

    def _is_training(self):
        return not self.is_initializing() and self.is_mutable_collection("routing")

    def _scores(self, h, signature):
        """Scores, and the signatures that gave them."""
        config = self.settings.routing
        if config.source == "learned":
            init = nn.initializers.normal(1.0)
            signature = self.param("router", init, signature.shape)
        return routing.match(h, signature, config.score_scale), signature

    def _select(self, scores, used, h, signature, state):
        s, config = self.settings, self.settings.routing
        if not s.num_clusters:
            return self._of_all(scores, None, state)
        members = state["members"].value
        address = routing.cluster_signatures(signature, members, config.signature)
        near = routing.match(*jax.lax.stop_gradient((h, address)), config.score_scale)
        near += state["cluster_bias"].value[None]
        clusters = routing.select_tiles(near, s.top_k_clusters)
        self._add_margins(state, "cluster_margins", near, clusters)
        steered = self.has_variable(steering.STEERING, "tiles")
        if self._is_training() or steered or s.top_k_clusters == s.num_clusters:
            allowed = routing.open_tiles(clusters, members)
            return self._of_all(scores, allowed, state)
        return self._of_clusters(h, used, clusters, state)

    def _of_all(self, scores, allowed, state):
        """Tiles and gates from the scores of all tiles, closed ones masked."""
        biased = jax.lax.stop_gradient(scores) + state["bias"].value[None]
        if allowed is not None:
            biased = jnp.where(allowed, biased, -jnp.inf)
        if self.has_variable(steering.STEERING, "tiles"):
            orders = self.get_variable(steering.STEERING, "tiles")
            biased = steering.obey(biased, orders)
            allowed = None if allowed is None else allowed | (orders > 0)
        tiles = routing.select_tiles(biased, self.settings.tiles_per_token)
        self._add_margins(state, "margins", biased, tiles)
        return tiles, routing.gates(scores, tiles, self.settings.routing.gate, allowed)

    def _of_clusters(self, h, used, clusters, state):
        """Tiles and gates from the scores of the tiles in the chosen clusters alone,
        where no margins are wanted.
        """
        config, members = self.settings.routing, state["members"].value
        scores, tiles = routing.match_inside(
            h, used, clusters, members, config.score_scale, state["mask"]
        )
        biased = jax.lax.stop_gradient(scores) + state["bias"].value[tiles]
        columns = routing.select_among(biased, tiles, self.settings.tiles_per_token)
        gates = routing.gates(scores, columns, config.gate)
        return jnp.take_along_axis(tiles, columns, axis=-1), gates

    def _add_margins(self, state, name, biased, chosen):
        """Adds a training call's margins to the histograms that `routing.update` reads."""
        if self._is_training():
            state[name].value += balance.margin_histogram(biased, chosen, state["mask"])

    def _losses(self, scores, signature, counts, train, mask):
        config, axis = self.settings.routing, self.settings.axis_name
        if not train or self.is_initializing():
            axis = None
        if mask is None:
            share, count = counts / counts.sum(), None
            share = share if axis is None else jax.lax.pmean(share, axis)
        else:
            count = mask.sum().astype(jnp.float32)
            if axis is not None:
                counts, count = jax.lax.pmean((counts, count), axis)
            share = counts / jnp.maximum(counts.sum(), routing.EPSILON)
        balance_loss = routing.balance_loss(scores, share, mask, count)
        diversity = routing.diversity_loss(signature)
        total = config.balance_weight * balance_loss
        total = total + config.diversity_weight * diversity
        return {"balance": balance_loss, "diversity": diversity, "total_aux": total}


def _info(tiles, gates, counts, scores, signature, mask):
    return routing.RoutingInfo(
        tiles=tiles,
        gates=gates,
        counts=counts,
        entropy=routing.usage_entropy(counts),
        max_load=routing.max_load(counts),
        dead_tiles=routing.dead_tiles(counts),
        tie_rate=routing.tie_rate(scores, mask),
        signature_cosine=routing.signature_cosine(signature),
    )


def _hash_tiles(token_ids, num_tiles, k):
    """The k tiles whose hash together with the token id is largest, so that any k tiles
    are as likely as any others.

    References:
        Thaler and Ravishankar, 1998, "Using Name-Based Mappings to Increase Hit Rates"
        (rendezvous hashing). Appleby, MurmurHash3 (the finalizer).
    """
    if token_ids is None:
        raise ValueError(
            "token_ids must be given to a layer whose routing source is 'hash'. Got None."
        )
    tiles = jnp.arange(num_tiles, dtype=jnp.uint32)
    pairs_TN = token_ids[:, None].astype(jnp.uint32) * num_tiles + tiles[None]
    mixed_TN = (pairs_TN ^ (pairs_TN >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed_TN = (mixed_TN ^ (mixed_TN >> 13)) * jnp.uint32(0xC2B2AE35)
    mixed_TN = mixed_TN ^ (mixed_TN >> 16)
    return jax.lax.top_k(mixed_TN, k)[1]
