"""Routes to look at and to change: read a layer's signatures, pin or
forbid a tile.

An order is given to tokens of one call, in the collection `"steering"`, which a layer
obeys when it is there and never writes; variables go in, variables come out:

    orders_tn = +1    token t takes tile n, whatever its scores, clusters and biases
    orders_tn = -1    token t does not take tile n while there is another one to take
    orders_tn =  0    as usual

Gates are those of the tiles taken. To hold all routes while the weights go on training
there is `trix_jax.routing.freeze_routing`.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from trix_jax.typing import Array, Bool, Float, Integer, Variables

STEERING = "steering"
CLOSED = (
    -1e30
)  # below every score, above what is forbidden: tiles of clusters not chosen
Path = tuple[str, ...]


def layer_states(routing: Variables, path: Path = ()) -> dict[Path, dict]:
    """The routing state of every layer, by the path of its router, in the order of the
    names.

    A state's `signature` is that of the last call with `mutable=["routing"]`.
    """
    if "margins" in routing:
        return {path: dict(routing)}
    found: dict[Path, dict] = {}
    for name in sorted(routing):
        if isinstance(routing[name], Mapping):
            found |= layer_states(routing[name], (*path, name))
    return found


def pin(
    variables: Variables, layer: Path, tile: int, tokens: Bool[Array, "*B"]
) -> dict:
    """Sends the marked tokens of the next call to a tile.

    Args:
        variables: with `"routing"`.
        layer: the path of a router, from `layer_states`.
        tile: its index.
        tokens: of the shape of the call's tokens.

    Raises:
        ValueError: no such layer or tile; layers under `nn.scan`, which share a state.
    """
    return _order(variables, layer, tile, tokens, 1)


def forbid(
    variables: Variables, layer: Path, tile: int, tokens: Bool[Array, "*B"]
) -> dict:
    """Keeps the marked tokens of the next call from a tile; arguments as in `pin`."""
    return _order(variables, layer, tile, tokens, -1)


def obey(
    biased: Float[Array, "T N"], orders: Integer[Array, "T N"]
) -> Float[Array, "T N"]:
    """What tiles are selected by, under orders; closed tiles come in at `-inf`.

    Raises:
        ValueError: orders for another number of tokens.
    """
    if orders.shape != biased.shape:
        raise ValueError(
            f"steering must be for the call's tokens and tiles, {list(biased.shape)}. "
            f"Got {list(orders.shape)}."
        )
    biased = jnp.where(jnp.isneginf(biased), CLOSED, biased)
    return jnp.where(orders > 0, jnp.inf, jnp.where(orders < 0, -jnp.inf, biased))


def _order(variables, layer, tile, tokens, sign):
    states = layer_states(variables.get("routing", {}))
    if layer not in states:
        raise ValueError(f"layer must be one of {sorted(states)}. Got {layer}.")
    *stacked, count, _ = states[layer]["margins"].shape
    if stacked:
        raise ValueError(
            f"layer must have a state of its own to take orders. Got {layer}, whose state "
            f"is that of {stacked[0]} layers under nn.scan."
        )
    if not 0 <= tile < count:
        raise ValueError(f"tile must be at least 0 and below {count}. Got {tile}.")
    flat: dict = flatten_dict(variables.get(STEERING, {}))
    tokens = jnp.asarray(tokens) != 0
    new = sign * tokens.reshape(-1, 1) * (jnp.arange(count) == tile)[None]
    key = (*layer, "tiles")
    orders = jnp.where(new != 0, new, flat.get(key, jnp.zeros_like(new)))
    return {**variables, STEERING: unflatten_dict({**flat, key: orders})}
