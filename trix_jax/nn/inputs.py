"""What the FFNs take, as `nn.Dense` takes it: any leading axes, an empty batch, numpy,
integers; and, beside it, a mask of the real tokens.

    x [*B, D]  ->  tokens [T, D]  ->  y [T, D]  ->  [*B, D]

A masked token is 0 before anything is computed from it, whatever it holds, so that
neither its value nor its gradient goes anywhere. An empty batch is one masked token.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from trix_jax.routing import RoutingInfo
from trix_jax.typing import AnyArray, Array, Bool, Dtype, Float, Integer, Shaped

NO_TILE = -1  # what `RoutingInfo.tiles` has for a masked token


class Tokens(NamedTuple):
    """An input and what comes with it, with the leading axes as one."""

    x: Float[Array, "T D"]
    router_input: Float[Array, "T D"] | None
    token_ids: Integer[Array, " T"] | None
    mask: Bool[Array, " T"] | None


def as_floats(x: Shaped[AnyArray, "..."], param_dtype: Dtype) -> Float[Array, "..."]:
    """The input as an array; integers and bool are promoted with the parameters.

    Raises:
        ValueError: complex numbers, or no numbers at all.
    """
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.floating):
        return x
    if not (x.dtype == bool or jnp.issubdtype(x.dtype, jnp.integer)):
        raise ValueError(f"x must hold real numbers. Got {x.dtype}.")
    return x.astype(jnp.promote_types(x.dtype, param_dtype))


def check_input(
    x: Shaped[AnyArray, "..."], d_model: int, param_dtype: Dtype = jnp.float32
) -> Float[Array, "..."]:
    """The input as floats.

    Raises:
        ValueError: its last axis is not `d_model`; it lies on a mesh of explicit axes.
    """
    x = jnp.asarray(x)
    if x.ndim < 1 or x.shape[-1] != d_model:
        raise ValueError(
            f"x must be [..., {d_model}], with d_model as its last axis. Got {list(x.shape)}."
        )
    _check_axes(x)
    return as_floats(x, param_dtype)


def _check_axes(x: Array) -> None:
    """Refuses a mesh of explicit axes: gathering a token's tiles has no one sharding."""
    sharding = jax.typeof(x).sharding
    kinds = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True))
    explicit = [name for name, kind in kinds.items() if kind == AxisType.Explicit]
    is_outside = jax.sharding.get_abstract_mesh().empty
    if explicit and (any(sharding.spec) or is_outside):
        raise ValueError(
            f"x lies on a mesh whose axes {explicit} are explicit, where a sharding "
            "belongs to every operation. Call the layer inside jax.shard_map or "
            "jax.sharding.auto_axes, or make the mesh with "
            "axis_types=(jax.sharding.AxisType.Auto,)."
        )


def check_mask(
    mask: Shaped[AnyArray, "..."] | None, lead: tuple
) -> Bool[Array, "..."] | None:
    """The mask as an array.

    Raises:
        ValueError: it is not bool, or not of the shape of the tokens.
    """
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    if mask.shape != lead:
        raise ValueError(
            f"mask must be {list(lead)}, a value a token. Got {list(mask.shape)}."
        )
    if mask.dtype != bool:
        raise ValueError(
            f"mask must be bool, True for real tokens; write mask != 0. Got {mask.dtype}."
        )
    return mask


def hide(
    x: Float[Array, "*B D"], mask: Bool[Array, "*B"] | None
) -> Float[Array, "*B D"]:
    """The input with 0 for masked tokens (False)."""
    return x if mask is None else jnp.where(mask[..., None], x, 0)


def flatten(
    x: Float[Array, "*B D"],
    token_ids: Shaped[AnyArray, "..."] | None = None,
    router_input: Shaped[AnyArray, "..."] | None = None,
    mask: Shaped[AnyArray, "..."] | None = None,
) -> Tokens:
    """The tokens of a call, masked ones 0.

    Raises:
        ValueError: something that comes with the input has another shape; token ids that
            are no integers.
    """
    lead, d = x.shape[:-1], x.shape[-1]
    router_input = None if router_input is None else jnp.asarray(router_input)
    if router_input is not None and router_input.shape != x.shape:
        raise ValueError(
            f"router_input must be {list(x.shape)}, the shape of x. Got {list(router_input.shape)}."
        )
    token_ids = None if token_ids is None else jnp.asarray(token_ids)
    if token_ids is not None:
        if token_ids.shape != lead:
            raise ValueError(
                f"token_ids must be {list(lead)}, an id a token. Got {list(token_ids.shape)}."
            )
        if not jnp.issubdtype(token_ids.dtype, jnp.integer):
            raise ValueError(f"token_ids must be integers. Got {token_ids.dtype}.")
    mask = check_mask(mask, lead)
    if 0 in lead:
        x, mask = jnp.zeros((1, d), x.dtype), jnp.zeros(1, bool)
        router_input = None if router_input is None else x
        token_ids = None if token_ids is None else jnp.zeros(1, jnp.int32)
    flat = None if mask is None else mask.reshape(-1)
    if router_input is not None:
        router_input = as_floats(router_input, jnp.float32).reshape(-1, d)
        router_input = hide(router_input, flat)
    ids = None if token_ids is None else token_ids.reshape(-1)
    return Tokens(hide(x.reshape(-1, d), flat), router_input, ids, flat)


def unflatten(y: Shaped[Array, "T ..."], lead: tuple) -> Any:
    """The leading axes of the input again."""
    return (y[:0] if 0 in lead else y).reshape(*lead, *y.shape[1:])


def in_shape_of(
    info: RoutingInfo, lead: tuple, mask: Bool[Array, " T"] | None
) -> RoutingInfo:
    """Gives the per-token fields the leading axes of the input; a masked token has no
    tile and a gate of 0.
    """
    tiles, gates = info.tiles, info.gates
    if mask is not None:
        tiles = jnp.where(mask[:, None], tiles, NO_TILE)
        gates = jnp.where(mask[:, None], gates, 0)
    return info._replace(tiles=unflatten(tiles, lead), gates=unflatten(gates, lead))
