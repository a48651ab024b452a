"""The routes of a language model: on a text, under orders, and between two checkpoints."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from trix_jax import routing
from trix_jax.nn import steering
from trix_jax.nn.steering import layer_states as layer_states
from trix_jax.nn.transformer import TransformerLM
from trix_jax.typing import Variables

WINDOWS = 8  # in one call


def has_signatures(state: dict[str, Any]) -> bool:
    """Whether a layer's state has signatures: one that serves a table has none, nor has
    one by a hash.
    """
    return bool(np.any(state["signature"]))


class Seen(NamedTuple):
    """What a model did with a text, window by window of its context.

    Attributes:
        tiles: of every token but the last, `[layers, tokens, K]`, best first.
        losses: of predicting the token after each, in nats.
        routing: the routing state, its signatures those of today.
    """

    tiles: np.ndarray
    losses: np.ndarray
    routing: Any


class Order(NamedTuple):
    """Sends tokens to a tile of a layer, or keeps them from it.

    Attributes:
        layer: number of the block.
        tile: index of the tile.
        ids: token ids that it is about.
        pin: to the tile, or away from it.
    """

    layer: int
    tile: int
    ids: tuple[int, ...]
    pin: bool


def route(
    model: TransformerLM,
    variables: Variables,
    ids: np.ndarray,
    orders: tuple[Order, ...] = (),
) -> Seen:
    """Reads a text, as many whole windows of the context as it has, with the weights
    that are served, and notes every token's tiles.

    Raises:
        ValueError: a text shorter than one window, or an order for a layer or tile that
            is not there.
    """
    model = TransformerLM(model.config.as_served())
    length = min(model.config.context, len(ids) - 1)
    count = (len(ids) - 1) // length if length else 0
    if not count:
        raise ValueError(f"ids must hold at least two tokens. Got {len(ids)}.")
    lines = np.lib.stride_tricks.sliding_window_view(ids, length + 1)[::length]
    paths = list(layer_states(variables["routing"]))

    def read(line):
        given = variables
        for order in orders:
            if not 0 <= order.layer < len(paths):
                raise ValueError(
                    f"layer must be at least 0 and below {len(paths)}. Got {order.layer}."
                )
            wanted = jnp.isin(line[None, :-1], jnp.asarray(order.ids, jnp.int32))
            give = steering.pin if order.pin else steering.forbid
            given = give(given, paths[order.layer], order.tile, wanted)
        outputs: Any = model.apply(given, line[None, :-1])
        logits, infos, _ = outputs
        loss = optax.softmax_cross_entropy_with_integer_labels(logits[0], line[1:])
        return jnp.stack([info.tiles[0] for info in infos]), loss

    lines = jnp.asarray(lines[:count], jnp.int32)
    tiles, losses = jax.jit(lambda x: jax.lax.map(read, x, batch_size=WINDOWS))(lines)
    outputs: Any = model.apply(
        variables, lines[:1, :-1], progress=1.0, mutable=["routing"]
    )
    tiles = np.asarray(jnp.moveaxis(tiles, 1, 0))
    return Seen(
        tiles.reshape(tiles.shape[0], count * length, -1),
        np.asarray(losses).reshape(-1),
        outputs[1]["routing"],
    )


def diff(one: Seen, other: Seen) -> list[dict[str, Any]]:
    """How two routings of one text differ, a dict a layer.

    Returns:
        `kept`, the share of assignments in `other` that `one` has too;
        `signature_cosine`, of each tile's signatures (None where a table of routes
        stands for them); `load_change`, of each tile's share.
    """
    if one.tiles.shape != other.tiles.shape:
        raise ValueError(
            f"both must have the same layers and tiles a token. Got {one.tiles.shape} and "
            f"{other.tiles.shape}."
        )
    found = []
    states = zip(
        *(layer_states(seen.routing).values() for seen in (one, other)), strict=True
    )
    for tiles, new_tiles, (state, new) in zip(
        one.tiles, other.tiles, states, strict=True
    ):
        a, b = (np.asarray(s["signature"], np.float32) for s in (state, new))
        if a.shape != b.shape:
            raise ValueError(
                f"both must have the same tiles. Got {a.shape} and {b.shape}."
            )
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        loads = [
            np.bincount(t.reshape(-1), minlength=len(a)) for t in (tiles, new_tiles)
        ]
        found.append(
            {
                "kept": float(
                    routing.stability(jnp.asarray(tiles), jnp.asarray(new_tiles))
                ),
                "signature_cosine": ((a * b).sum(1) / np.maximum(norms, 1e-6)).tolist()
                if has_signatures(state) and has_signatures(new)
                else None,
                "load_change": ((loads[1] - loads[0]) / new_tiles.size).tolist(),
            }
        )
    return found
