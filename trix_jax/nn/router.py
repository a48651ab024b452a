"""`Router`: holds the routing state of a layer and calls `trix_jax.routing`. It has no
parameters, but for the rows of the source "learned".

A hash needs no state: what `init` gives one is never read, nor asked for.

Collection `"routing"`: `bias` [N], `margins` [N, bins] (since the last
`routing.update`, see `trix_jax.balance`), `signature` [N, D] (as last seen in
training), `frozen`; with clusters also `members` [C, N / C], `cluster_bias` [C] and
`cluster_margins` [C, bins]; with `RoutingConfig.hold_after` also `held`: from then on,
in training and everywhere else, tokens meet `signature`, not the weights' of today.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from trix_jax import balance, routing
from trix_jax.compiled import together
from trix_jax.hashing import hash_sets, hash_tiles, tile_sets
from trix_jax.nn import misuse, steering
from trix_jax.nn.settings import TileSettings
from trix_jax.ops import PACKED
from trix_jax.typing import Array, Bool, Float, Integer, Scalar


class Route(NamedTuple):
    """Tiles and gates of each token; its sets of tiles, where tokens choose these, with
    gates of one.
    """

    tiles: Integer[Array, "T K"]
    gates: Float[Array, "T K"]
    sets: Integer[Array, "T G"] | None = None


class Seen(NamedTuple):
    """The scores that losses and diagnostics are made of, and the tiles they are of;
    None is every one, in order.
    """

    scores: Float[Array, "T S"]
    tiles: Integer[Array, "T S"] | None = None


class Router(nn.Module):
    """Chooses tiles for tokens by signature.

    With clusters, evaluation and serving score the clusters and then the tiles of those
    chosen, `C + top_k_clusters * N / C` products a token. So does training (a mutable
    collection `"routing"`) if the balance loss is made of the probabilities of open
    tiles alone (`balance_over`). If it is made of all it scores all N, as do the losses
    and the diagnostic `tie_rate`; evaluation under `jit` computes those only where they
    are read. Orders (`steering`) may open any tile and score all as well.

    Attributes:
        settings: see `TileSettings`.
    """

    settings: TileSettings

    @nn.compact
    def __call__(
        self,
        h: Float[Array, "T D"],
        signature: Float[Array, "N D"] | None,
        train: bool = False,
        token_ids: Integer[Array, " T"] | None = None,
        mask: Bool[Array, " T"] | None = None,
        progress: Scalar | None = None,
    ) -> tuple[Route, routing.RoutingInfo, dict[str, Float[Array, ""]]]:
        n, config = self.settings.num_tiles, self.settings.routing
        if self.has_variable(PACKED, "tiles"):
            return self._look_up(token_ids, mask)
        if config.source == "hash":
            is_new = self.is_initializing() and self.is_mutable_collection("routing")
            if is_new and signature is not None:
                self._variables(jnp.zeros_like(signature))  # which nothing reads
            return self._by_hash(token_ids, mask)
        self._check_collection(train)
        signature, state = self._signatures(signature, train, progress)
        state |= {"mask": mask}
        if self._is_training():
            state["signature"].value = jax.lax.stop_gradient(signature)
        scores = routing.match(h, signature, config.score_scale)
        tiles, gates, seen = self._select(scores, h, signature, state)
        counts = routing.count_tiles(tiles, n, mask)
        info = _info(tiles, gates, counts, seen.scores, signature, mask)
        losses = self._losses(seen, signature, counts, train, mask)
        return Route(tiles, gates), info, losses

    def _check_collection(self, train):
        """Says where the state is missing, is that of several layers, or is not kept."""
        if self.is_initializing():
            return
        if not self.has_variable("routing", "bias"):
            raise ValueError(misuse.NO_STATE)
        shape = jnp.shape(self.get_variable("routing", "bias"))
        n, c = self.settings.num_tiles, self.settings.num_clusters
        misuse.check_state({"bias": shape}, n)
        has_members = self.has_variable("routing", "members")
        members = self.get_variable("routing", "members") if has_members else 0.0
        misuse.check_clusters(jnp.shape(members), (c, n // c) if c else ())
        if train and not self.is_mutable_collection("routing"):
            misuse.warn_of_training_without_state()

    def _by_hash(self, token_ids, mask):
        """Routes from the token ids alone: without scores there is nothing to lose or to
        steer.
        """
        if self.has_variable(steering.STEERING, "tiles"):
            raise ValueError(
                "steering must not be given to a layer whose routing source is 'hash'."
            )
        s = self.settings
        n, k, c = s.num_tiles, s.tiles_per_token, s.routing
        if c.hash_sets is None:
            sets, tiles = None, hash_tiles(token_ids, n, k)
        else:
            sets = hash_sets(token_ids, c.hash_sets, c.sets_per_token)
            of_each = tile_sets(n, k, c.hash_sets, c.sets_per_token)
            tiles = jnp.asarray(of_each)[sets].reshape(-1, k)
        gates = jnp.ones(tiles.shape, jnp.float32)
        route, info, losses = _without_scores(tiles, gates, n, mask)
        return route._replace(sets=sets), info, losses

    def _look_up(self, token_ids, mask):
        """Routes from the table that a frozen layer keeps (`trix_jax.nn.route_table`):
        without scores there is nothing to lose or to steer.
        """
        if token_ids is None:
            raise ValueError(
                "token_ids must be given to a layer whose routes are a table. Got None."
            )
        if self.has_variable(steering.STEERING, "tiles"):
            raise ValueError(
                "steering must not be given to a layer whose routes are a table."
            )
        n = self.settings.num_tiles
        table = jnp.asarray(self.get_variable(PACKED, "tiles"))
        tiles, gates = (
            table[token_ids].astype(jnp.int32),
            jnp.ones(table.shape, jnp.float32),
        )
        if self.has_variable(PACKED, "gates"):
            gates = jnp.asarray(self.get_variable(PACKED, "gates"))
        gates = jnp.take(gates, token_ids, axis=0)  # as in `nn.Embed`, NaN for no token
        return _without_scores(tiles, gates, n, mask)

    def _signatures(self, signature, train, progress):
        """What tokens and clusters are addressed by, and the state; a learned router has
        rows of its own.
        """
        config = self.settings.routing
        if config.source == "learned":
            init, dtype = nn.initializers.normal(1.0), self.settings.param_dtype
            learned = self.param("router", init, signature.shape, dtype)
            signature = learned.astype(jnp.promote_types(dtype, jnp.float32))
        state = self._variables(signature)
        if config.source == "random":
            signature = state["signature"].value
        was_frozen = state["frozen"].value
        if config.holds:
            signature = self._hold(signature, state, train, progress)
        return jnp.where(was_frozen, state["signature"].value, signature), state

    def _hold(self, signature, state, train, progress):
        """The signature, held if it was or if it is time; the state says so from now
        on.
        """
        config, was_held = self.settings.routing, state["held"].value
        is_held = was_held
        if train and self._is_training():
            progress = misuse.check_hold(progress, config)
            is_held = was_held | routing.is_due(config, progress)
            state["held"].value = is_held
            if config.hold == "routes":
                state["frozen"].value |= is_held
        return routing.hold(signature, state["signature"].value, was_held, is_held)

    def _variables(self, signature) -> dict[str, Any]:
        n, config = self.settings.num_tiles, self.settings.routing
        if self.is_initializing() and not self.is_mutable_collection("routing"):
            raise ValueError(misuse.NO_PLACE)
        first = (
            (lambda: jnp.array(signature))  # a buffer of its own: states are donated
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
        if config.holds:
            state["held"] = self.variable("routing", "held", jnp.zeros, (), bool)
        if c := self.settings.num_clusters:

            def tiles():
                return jnp.arange(n, dtype=jnp.int32).reshape(c, n // c)

            state["members"] = self.variable("routing", "members", tiles)
            state["cluster_bias"] = zeros("cluster_bias", c)
            state["cluster_margins"] = zeros("cluster_margins", c, balance.BINS)
        return state

    def _is_training(self):
        return not self.is_initializing() and self.is_mutable_collection("routing")

    def _select(self, scores, h, signature, state):
        s, config = self.settings, self.settings.routing
        if not s.num_clusters:
            return self._of_all(scores, None, state)
        members = jnp.asarray(state["members"].value)
        address = _addresses(signature, members, kind=config.signature)
        near = routing.match(*jax.lax.stop_gradient((h, address)), config.score_scale)
        near += state["cluster_bias"].value[None]
        clusters = _select_tiles(near, s.top_k_clusters)
        self._add_margins(state, "cluster_margins", near, clusters)
        steered = self.has_variable(steering.STEERING, "tiles")
        needs_all = self._is_training() and config.balance_over == "all"
        if needs_all or steered or s.top_k_clusters == s.num_clusters:
            allowed = routing.open_tiles(clusters, members)
            return self._of_all(scores, allowed, state)
        tiles, gates, seen = self._of_clusters(h, signature, clusters, state)
        return tiles, gates, seen if config.balance_over == "open" else Seen(scores)

    def _of_all(self, scores, allowed, state):
        """Tiles and gates from the scores of all tiles, closed ones masked."""
        biased = jax.lax.stop_gradient(scores) + state["bias"].value[None]
        if allowed is not None:
            biased = jnp.where(allowed, biased, -jnp.inf)
        is_steered = self.has_variable(steering.STEERING, "tiles")
        if is_steered:
            orders = self.get_variable(steering.STEERING, "tiles")
            biased = steering.obey(biased, orders)
        tiles = _select_tiles(biased, self.settings.tiles_per_token)
        if is_steered and allowed is not None:  # a tile of a closed cluster is taken
            taken = jax.nn.one_hot(tiles, self.settings.num_tiles, dtype=bool)
            allowed |= taken.any(axis=-2)
        self._add_margins(state, "margins", biased, tiles)
        gates = routing.gates(scores, tiles, self.settings.routing.gate, allowed)
        return tiles, gates, Seen(scores)

    def _of_clusters(self, h, signature, clusters, state):
        """Tiles and gates from the scores of the tiles in the chosen clusters alone."""
        config = self.settings.routing
        members, bias = (jnp.asarray(state[n].value) for n in ("members", "bias"))
        scores, tiles = routing.match_inside(
            h, signature, clusters, members, config.score_scale, state["mask"]
        )
        biased = jax.lax.stop_gradient(scores) + bias[tiles]
        columns = _select_among(biased, tiles, self.settings.tiles_per_token)
        self._add_margins(state, "margins", biased, columns, tiles)
        gates = routing.gates(scores, columns, config.gate)
        chosen = jnp.take_along_axis(tiles, columns, axis=-1)
        return chosen, gates, Seen(scores, tiles)

    def _add_margins(self, state, name, biased, chosen, tiles=None):
        """Adds a training call's margins to the histograms that `routing.update` reads."""
        if self._is_training():
            number = state[name].value.shape[0]
            state[name].value += balance.margin_histogram(
                biased, chosen, state["mask"], tiles, number
            )

    def _losses(self, seen, signature, counts, train, mask):
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
        balance_loss = _balance(seen.scores, share, mask, count, seen.tiles)
        diversity = _diversity(signature)
        total = config.balance_weight * balance_loss
        if config.diversity_weight:  # 0 times it would be computed all the same
            total = total + config.diversity_weight * diversity
        return {"balance": balance_loss, "diversity": diversity, "total_aux": total}


_addresses = together("kind")(routing.cluster_signatures)
_select_tiles = together("k")(routing.select_tiles)
_select_among = together("k")(routing.select_among)
_balance = together()(routing.balance_loss)
_diversity = together()(routing.diversity_loss)


def _without_scores(tiles, gates, num_tiles, mask):
    counts = routing.count_tiles(tiles, num_tiles, mask)
    none = jnp.zeros((1, num_tiles))
    info = _info(tiles, gates, counts, none, none, None)
    info = info._replace(tie_rate=none[0, 0], signature_cosine=none[0, 0])
    losses = dict.fromkeys(("balance", "diversity", "total_aux"), none[0, 0])
    return Route(tiles, gates), info, losses


@together()
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
