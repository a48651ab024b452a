"""The routing state of a model's layers: what moves it, holds it and rebuilds it.

A layer's state is a dictionary in the collection `"routing"`, known by its `margins`;
these functions go through the collection, nested as the model is, and change every
layer's. What a model keeps there beside them, the rows that its routers see
(`trix_jax.nn.token_input`), passes through.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from trix_jax import balance
from trix_jax.clusters import balanced_kmeans
from trix_jax.compiled import together
from trix_jax.typing import AxisName, Variables

MARGINS = {"margins", "cluster_margins"}  # what adds up over batches and devices
ROWS = {"rows", "held"}  # the state of what a model's routers see by token


def update(
    routing: Variables, *, rate: float = 0.5, axis_name: AxisName | None = None
) -> Variables:
    """Moves every layer's routing state by one optimizer step: selection biases go
    towards even loads.

    See `trix_jax.balance`. A tile's load is compared with the mean of all tiles, or of
    its cluster if that is less; a cluster's with the mean of all clusters. Where tokens
    open one cluster each, biases are centred inside every cluster: what its tiles have
    in common chooses nothing, and would drift. Margins restart at 0. A layer whose
    `frozen` is set keeps its biases.

    Args:
        routing: the `"routing"` collection as returned by `apply(...,
            mutable=["routing"])`, nested as the model is.
        rate: share of the way, 0 to 1.
        axis_name: the mapped axes over which margins are summed first; None where they
            are already global.
    """
    if axis_name is not None:
        routing = reduce(routing, axis_name)
    return _each_layer(routing, lambda state: _update_layer(state, rate))


def reduce(
    routing: Variables, axis_name: AxisName, *, since: Variables | None = None
) -> Variables:
    """Sums the margins of every layer over a mapped axis; the rest of the state is the
    same on all devices.

    Args:
        since: the collection that the call was given, if it holds margins that are sums
            over the axis already, as with accumulated gradients. Those are counted once:
            `since + psum(routing - since)`. None takes them as empty.
    """
    if since is not None:

        def added(path, now, before):
            is_sum = getattr(path[-1], "key", "") in MARGINS
            return before + jax.lax.psum(now - before, axis_name) if is_sum else now

        return jax.tree_util.tree_map_with_path(added, routing, since)
    return _each_layer(
        routing,
        lambda state: {
            **state,
            **jax.lax.psum({m: state[m] for m in MARGINS & state.keys()}, axis_name),
        },
    )


def freeze_routing(routing: Variables, frozen: bool = True) -> Variables:
    """Holds (or releases) the routes: signatures and biases stay as they are while the
    weights go on training.
    """
    return _each_layer(
        routing,
        lambda state: {**state, "frozen": jnp.full_like(state["frozen"], frozen)},
    )


def hold_signatures(routing: Variables, held: bool = True) -> Variables:
    """Holds (or releases) the signatures as last seen in training, and the rows that a
    model's routers see by token if it keeps them; balance goes on, weights train.

    With `hold="routes"` the next training call holds the biases too; to release those,
    `freeze_routing(routing, False)` as well. Past a `hold_after` below 1 a release lasts
    until the next training call.

    Raises:
        ValueError: the layers were built without `RoutingConfig(hold_after=...)`, so
            that their state has no place for it.
    """

    def hold(state):
        if "held" not in state:
            raise ValueError(
                "routing must have 'held' in every layer's state to hold signatures: "
                "build the layers with RoutingConfig(hold_after=1.0), or with the share "
                f"of training after which they hold by themselves. Got {sorted(state)}."
            )
        return {**state, "held": jnp.full_like(state["held"], held)}

    return _each_layer(routing, hold, hold)


def rebuild_clusters(routing: Variables, iterations: int = 10) -> Variables:
    """Groups the tiles of every hierarchical layer anew by balanced k-means on their
    last signatures. Held signatures keep theirs once they are settled; frozen layers
    are left alone.

    Belongs outside the hot path, every few hundred steps. Starts from the present
    clusters, so that a cluster keeps its index and its bias. Deterministic.
    """

    def rebuild(state):
        if "members" not in state:
            return state
        lead = state["members"].shape[:-2]
        cluster = jax.jit(balanced_kmeans, static_argnames="iterations")
        for _ in lead:
            cluster = jax.vmap(cluster, in_axes=(0, 0, None))
        members = cluster(state["signature"], state["members"], iterations)
        hold = state["frozen"][..., None, None]
        return {**state, "members": jnp.where(hold, state["members"], members)}

    return _each_layer(routing, rebuild)


@together()
def _update_layer(state, rate):
    margins, new = state["margins"], {}
    if "members" in state:
        members, of_clusters = state["members"], state["cluster_margins"]
        load = balance.loads(margins)
        target = jnp.minimum(
            _cluster_mean(load, members), load.mean(axis=-1, keepdims=True)
        )
        bias = balance.step_bias(state["bias"], margins, rate, target)
        common = jnp.where(_opens_one(of_clusters), _cluster_mean(bias, members), 0)
        new["bias"] = bias - common
        new["cluster_bias"] = balance.step_bias(
            state["cluster_bias"], of_clusters, rate
        )
    else:
        new["bias"] = balance.step_bias(state["bias"], margins, rate)
    hold = state["frozen"][..., None]
    new = {name: jnp.where(hold, state[name], value) for name, value in new.items()}
    empty = {m: jnp.zeros_like(state[m]) for m in MARGINS & state.keys()}
    return {**state, **new, **empty}


def _cluster_mean(values, members):
    """The mean over each tile's cluster, a number a tile."""
    flat = members.reshape(values.shape)
    by_cluster = jnp.take_along_axis(values, flat, axis=-1).reshape(members.shape)
    mean = jnp.broadcast_to(by_cluster.mean(axis=-1, keepdims=True), members.shape)
    return jnp.take_along_axis(
        mean.reshape(values.shape), jnp.argsort(flat, axis=-1), axis=-1
    )


def _opens_one(cluster_margins):
    """Whether the tokens counted opened one cluster each, as `top_k_clusters` says: every
    cluster has a margin of every token.
    """
    tokens = cluster_margins.sum(axis=-1).mean(axis=-1, keepdims=True)
    opened = balance.loads(cluster_margins).sum(axis=-1, keepdims=True)
    return (opened > 0) & (opened < 1.5 * tokens)


def _each_layer(tree, function, rows_function=dict):
    """The tree with every layer's state changed by `function`, and what a model keeps
    beside them by `rows_function`.
    """
    if isinstance(tree, Mapping):
        if "margins" in tree:
            new = function(dict(tree))
        elif tree.keys() == ROWS:
            new = rows_function(dict(tree))
        else:
            new = {k: _each_layer(v, function, rows_function) for k, v in tree.items()}
        kind: Any = type(tree)  # a FrozenDict stays one
        return kind(new)
    raise ValueError(
        f"routing must be a routing collection, nested dictionaries down to a layer's state. Got {type(tree)}."
    )
