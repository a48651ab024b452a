"""Routes by token as a table: a frozen layer looks a token's tiles and gates up instead
of scoring them.

    tiles_t, gates_t = table[token_t]        `[V, K]` each, in place of N scores of D products

Collection `"packed"`, at the router: `tiles` (the smallest unsigned integers that name
all, `dtype_of`) and, unless gates are all 1, `gates` (float32). The signature sums leave
it. Without scores a layer has no auxiliary losses (0), and of its diagnostics no
`tie_rate` and no `signature_cosine` (0); it cannot be steered.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import FrozenDict, unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from trix_jax.nn.steering import layer_states
from trix_jax.nn.transformer import TransformerConfig, TransformerLM
from trix_jax.ops import PACKED
from trix_jax.typing import Array, Float, Variables

TILES, GATES = "tiles", "gates"  # the variables of a router that has a table
Path = tuple[str, ...]


def tabulate_routes(
    model: nn.Module, variables: Variables, rows: Float[Array, "V D"] | None = None
) -> dict[str, Any] | FrozenDict:
    """Frozen variables whose layers that route by token do so by a table.

    Tables are made by the model itself, of all tokens in one call. In another call a
    score may differ in its last bits, so that a tile may, where two scores tie.

    Args:
        model: a `TransformerLM` with `router_input="embedding"`; or an FFN or a block,
            which is then called with `token_ids`, and a `router_input` is not looked
            at.
        variables: what `freeze` gives.
        rows: of an FFN or a block, the `router_input` of each token; None for a
            `TransformerLM`, which has its own.

    Raises:
        ValueError: variables that are not frozen or have tables, layers whose routes
            are not those of single tokens, or are hashes, which store nothing.
    """
    flat: dict[Path, Any] = flatten_dict(unfreeze(dict(variables)))
    if PACKED not in variables:
        raise ValueError(
            "variables must be frozen to get a table of routes: trix_jax.freeze(model, "
            f"variables, ...) first. Got {sorted(variables)}."
        )
    if tables_in(flat):
        raise ValueError("variables must have no table of routes yet. Got some.")
    if isinstance(model, TransformerLM):
        found = _of_model(model, variables)
    else:
        found = _of_layer(model, variables, rows)
    for path, (tiles, gates) in found.items():
        count = flat[("routing", *path, "bias")].shape[-1]
        flat[(PACKED, *path, TILES)] = tiles.astype(dtype_of(count))
        if gates is not None:
            flat[(PACKED, *path, GATES)] = gates
        flat.pop((PACKED, *path[:-1], "signature_sums"), None)
    new = unflatten_dict(flat)
    return FrozenDict(new) if isinstance(variables, FrozenDict) else new


def tables_in(flat: Mapping[Path, Any]) -> list[Path]:
    """The paths of the routers that have a table, in flattened variables."""
    return [
        path[1:-1]
        for path in flat
        if path[0] == PACKED and path[-2:] == ("router", TILES)
    ]


def layers_by_token(config: TransformerConfig) -> int:
    """How many blocks of a model can look their routes up: the first ones.

    Raises:
        ValueError: none; says why.
    """
    if config.ffn == "dense" or config.routing.source == "hash":
        what = "a dense FFN" if config.ffn == "dense" else "routing.source='hash'"
        raise ValueError(f"routes as a table need scores of tiles. Got {what}.")
    if config.router_input != "embedding":
        raise ValueError(
            "routes as a table need router_input='embedding', a token's own routes. "
            f"Got {config.router_input!r}."
        )
    return config.hidden_from or config.n_layers


def dtype_of(num_tiles: int) -> np.dtype:
    """The smallest unsigned integers that name so many tiles."""
    return np.min_scalar_type(num_tiles - 1)


def table_shapes(config: TransformerConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """What a router of a model stores as its table."""
    shape = (config.vocab_size or 0, config.tiles_per_token)
    found = {TILES: jax.ShapeDtypeStruct(shape, dtype_of(config.num_tiles))}
    if config.routing.gate != "none":
        found[GATES] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return found


def _of_model(model, variables):
    """A table for each of the layers by token, by the path of its router."""
    c = model.config
    last, length = layers_by_token(c), c.context
    ids = jnp.arange(-(-c.vocab_size // length) * length) % c.vocab_size
    lines = ids.reshape(-1, length)
    # What routes by token needs no attention: the compiler leaves it out.
    read = jax.jit(lambda v: _routes(model.apply(v, lines)[1][:last]))
    tables = [
        jax.tree.map(lambda x: x.reshape(ids.size, -1)[: c.vocab_size], table)
        for table in read(variables)
    ]
    paths = {path[0]: path for path in layer_states(variables["routing"])}
    has_gates = c.routing.gate != "none"
    return {
        paths[f"block_{i:02d}"]: (tiles, gates if has_gates else None)
        for i, (tiles, gates) in enumerate(tables)
    }


def _of_layer(model, variables, rows):
    """The table of the one layer that an FFN or a block has."""
    paths = list(layer_states(variables.get("routing", {})))
    if rows is None or len(paths) != 1 or model.routing.source == "hash":
        raise ValueError(
            "model must be a TransformerLM, or a layer that routes by scores and gets "
            f"rows, the router input of each token. Got {type(model).__name__} with "
            f"{len(paths)} routers and rows={None if rows is None else rows.shape}."
        )
    line = rows[None]  # a block takes sequences
    read = jax.jit(lambda v: _routes([model.apply(v, line, router_input=line)[1]]))
    ((tiles, gates),) = read(variables)
    return {paths[0]: (tiles[0], gates[0] if model.routing.gate != "none" else None)}


def _routes(infos):
    return [(info.tiles, info.gates) for info in infos]
