"""`RoutedTiles`: N two-layer ternary networks of which every token computes K, and what
the FFNs around them share.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from trix_jax import (
    dispatch,
    expert_parallel,
    grouped_ffn,
    ops,
    routing,
    sets_ffn,
)
from trix_jax.grouped_ffn import Implementation
from trix_jax.nn import inputs, misuse
from trix_jax.nn.activations import activation
from trix_jax.nn.kernel import TernaryKernel
from trix_jax.nn.router import Route, Router
from trix_jax.nn.settings import TileSettings, check_divides
from trix_jax.ops import PACKED
from trix_jax.routing import RoutingInfo
from trix_jax.ternary import Activations, Ternary, whole
from trix_jax.typing import AnyArray, Array, Bool, Float, Integer, Scalar, Shaped

Aux = dict[str, Float[Array, ""]]
Latent = tuple[Float[Array, "N D F"] | None, Float[Array, "N F D"] | None]
Output = tuple[Float[Array, "*B D"], RoutingInfo, Aux]


def tile_ffn(
    h: Float[Array, "T D"],
    route: Route,
    up: ops.Weights,
    down: ops.Weights,
    shape: tuple[int, int],
    act: Callable,
    tile_axis: str | None = None,
    activations: Activations = "float",
    mask: Bool[Array, " T"] | None = None,
    implementation: Implementation | None = None,
    latent: Latent = (None, None),
    of: sets_ffn.Sets | None = None,
) -> Float[Array, "T D"]:
    """Computes `sum_k gate_tk * (act((h_t @ q_up) * s_up) @ q_down) * s_down` over the
    tiles k chosen for token t.

    Args:
        shape: N and F.
        tile_axis: mapped axis that the tiles, and with them `up` and `down`, are spread
            over; None has them all on this device.
        activations: see `TernaryConfig`.
        mask: False for tokens that are not computed; what they get means nothing.
        implementation: see `TileSettings`.
        latent: of `up` and `down`, see `TernaryKernel.latent`.
        of: the sets that tokens choose from, see `RoutingConfig.hash_sets`.

    Raises:
        NotImplementedError: the named implementation does not run on this device or these
            shapes, and why.
    """
    pair: Any = up, down
    how = {"activations": activations, "implementation": implementation}
    if of and (sets := route.sets) is not None and tile_axis is None:
        if takes_sets(h, shape, of, **how):
            wide_up = whole(ops.unpack(up, shape[1]), latent[0])
            wide_down = whole(ops.unpack(down, h.shape[1]), latent[1])
            return sets_ffn.sets_ffn(h, sets, wide_up, wide_down, of, act, "xla", mask)
    is_latent = isinstance(up, Ternary) and isinstance(down, Ternary)
    if is_latent and (by := whole_products(h, route.tiles, up, **how)):
        pair = up, down, whole(up, latent[0]), whole(down, latent[1])
        compute = partial(_summed, act=act, by=by)
    else:
        compute = partial(_outputs, tile_width=shape[1], act=act, **how)
    if tile_axis is None:
        return compute(h, route, pair, mask=mask)
    y_TKD = expert_parallel.route_tiles(
        partial(_alone, compute), h, route.tiles, pair, shape[0], tile_axis, mask
    )
    return (y_TKD * route.gates[..., None]).sum(axis=1).astype(h.dtype)


def whole_products(
    h: Float[Array, "T D"],
    tiles: Integer[Array, "T K"],
    up: Ternary,
    activations: Activations,
    implementation: Implementation | None,
) -> Implementation | None:
    """What computes the products of whole weights in `grouped_ffn`: a GPU's kernels, or
    XLA on a CPU; None where `ops.tile_ffn` computes the tiles.

    Raises:
        NotImplementedError: the kernels were asked for by name and do not run, and why.
    """
    num_tiles, d, width = up.q.shape
    shapes = grouped_ffn.Shapes(h.dtype, d, width, num_tiles, tiles.size, activations)
    if implementation == "mosaic_gpu":
        if reason := grouped_ffn.unsupported_reason(shapes):
            raise NotImplementedError(f"implementation={implementation!r}: {reason}")
        return implementation
    if implementation is None and grouped_ffn.default_reason(shapes) is None:
        return "mosaic_gpu"
    on_cpu = ops.platform() == "cpu"
    return "xla" if on_cpu and grouped_ffn.suits_batches(shapes) else None


def takes_sets(
    h: Float[Array, "T D"],
    shape: tuple[int, int],
    of: sets_ffn.Sets,
    activations: Activations,
    implementation: Implementation | None,
) -> bool:
    """Whether the tiles of a set are met as one wide tile: no kernels are asked for, and
    `sets_ffn.default_reason` knows nothing against it.
    """
    (num_tiles, width), assignments = shape, h.shape[0] * of.tiles_per_token
    sizes = h.shape[1], width, num_tiles, assignments
    shapes = grouped_ffn.Shapes(h.dtype, *sizes, activations)
    reason = sets_ffn.default_reason(shapes, of)
    return implementation != "mosaic_gpu" and reason is None


def _summed(h, route, weights, *, act, by, mask=None):
    """The sum over a token's tiles, gated, with whole weights."""
    up, down, *pair = weights
    rows = grouped_ffn.ROWS if by == "mosaic_gpu" else None
    with jax.named_scope("plan"):
        plan = dispatch.make_plan(route.tiles, up.q.shape[0], rows, mask)
    inputs = grouped_ffn.Inputs(h, route.gates, *pair)
    return grouped_ffn.grouped_ffn(inputs, plan, act, by, mask, (up, down))


def _outputs(
    h, route, weights, *, tile_width, act, activations, implementation, mask=None
):
    """The same by `ops.tile_ffn`, of packed weights too; what masked tokens get means
    nothing.
    """
    up, down = weights
    num_tiles = up[0].shape[0]
    rows = dispatch.block_rows(route.tiles.size, num_tiles)
    rows = max(rows, ops.least_rows(up))
    with jax.named_scope("plan"):
        plan = dispatch.make_plan(route.tiles, num_tiles, rows, mask)
    y = ops.tile_ffn(
        dispatch.to_blocks(h, plan),
        up,
        down,
        plan.block_tile,
        (tile_width, h.shape[-1]),
        act,
        plan.used,
        activations,
        implementation,
    )
    if ops.platform() == "cpu":
        y = dispatch.gated_sum(y, route.gates, plan)
    else:
        y = (dispatch.from_blocks(y, plan) * route.gates[..., None]).sum(axis=1)
    return y.astype(h.dtype)


def _alone(compute, h, tiles, weights, *, mask=None):
    """The output of every token's one tile, `[T, 1, D]`."""
    route = Route(tiles, jnp.ones(tiles.shape, jnp.float32))
    return compute(h, route, weights, mask=mask)[:, None]


class RoutedTiles(nn.Module):
    """Routes every token by the tiles' own signatures and computes `tile_ffn` over the
    tiles it chose.

    Attributes:
        settings: see `TileSettings`.
        tile_width: F, the hidden width of one tile.
    """

    settings: TileSettings
    tile_width: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*B D"],
        train: bool = False,
        progress: Scalar | None = None,
        token_ids: Shaped[AnyArray, "..."] | None = None,
        router_input: Shaped[AnyArray, "..."] | None = None,
        mask: Shaped[AnyArray, "..."] | None = None,
    ) -> Output:
        s, lead = self.settings, x.shape[:-1]
        tokens = inputs.flatten(x, token_ids, router_input, mask)
        n, d, f = s.num_tiles, x.shape[-1], self.tile_width
        axis = None if self.is_initializing() else s.tile_axis
        parts = 1 if axis is None else jax.lax.axis_size(axis)
        held = check_divides("num_tiles", n, f"devices of {axis}", parts)
        common = {"config": s.ternary, "param_dtype": s.param_dtype}
        up = TernaryKernel((held, d, f), kernel_init=s.up_init, name="up", **common)
        down = TernaryKernel(
            (held, f, d), kernel_init=s.down_init, name="down", **common
        )
        training = not self.is_initializing() and (
            train or self.is_mutable_collection("routing")
        )
        done = misuse.check_progress(progress, s.ternary, training)
        kernels = up, down
        up, down = up(done), down(done)
        h = tokens.x.astype(s.dtype or x.dtype)
        signature = self._signature_sums(up, axis)
        if signature is not None:
            signature = routing.signatures(signature, s.routing.signature)
        more: dict[str, Any] = {"progress": progress} if s.routing.holds else {}
        route, info, aux = Router(s, name="router")(
            router_tokens(h, tokens.router_input),
            signature,
            train,
            tokens.token_ids,
            **({} if tokens.mask is None else {"mask": tokens.mask}),
            **more,
        )
        act, mode = activation(s.activation), s.ternary.activations
        how = mode, tokens.mask, s.implementation
        latent = kernels[0].latent(), kernels[1].latent()
        num_sets, of = s.routing.hash_sets, None
        if num_sets is not None:
            numbers = num_sets, s.routing.sets_per_token, s.tiles_per_token
            of = sets_ffn.Sets(*map(int, numbers))
        y = tile_ffn(h, route, up, down, (n, f), act, axis, *how, latent, of)
        y = inputs.unflatten(inputs.hide(y, tokens.mask), lead)
        return y, inputs.in_shape_of(info, lead, tokens.mask), aux

    def pack_ternary(self, params: dict, packed: dict) -> dict[str, Array]:
        """What a frozen model keeps beside the packed kernels: the signature sums,
        integers that fit 16 bits. A hash reads none.
        """
        del params
        if self.settings.routing.source == "hash":
            return {}
        up = ops.unpack(ops.Packed(**packed["up"]), self.tile_width)
        return {"signature_sums": up.q.sum(axis=-1).astype(jnp.int16)}

    def _signature_sums(
        self, up: ops.Weights, axis: str | None
    ) -> Float[Array, "N D"] | None:
        """The sums that signatures are made of, of all tiles, those of other devices
        included.
        """
        if isinstance(up, ops.Packed):
            if not self.has_variable(PACKED, "signature_sums"):
                return None  # routes are a table
            return self.get_variable(PACKED, "signature_sums").astype(jnp.float32)
        sums = up.q.sum(axis=-1)
        return sums if axis is None else jax.lax.all_gather(sums, axis, tiled=True)


def router_tokens(
    tokens: Float[Array, "T D"], router_input: Float[Array, "T D"] | None
) -> Float[Array, "T D"]:
    """What the signatures are matched with: the layer's own tokens, or the input given
    for it.
    """
    return tokens if router_input is None else router_input


def finish(
    y: Float[Array, "*B D"],
    x: Float[Array, "*B D"],
    settings: TileSettings,
    train: bool,
) -> Float[Array, "*B D"]:
    """Computes `dropout(y)` in the layer's dtype, and adds the input `x` if the layer
    is residual.
    """
    y = nn.Dropout(settings.dropout)(y, deterministic=not train)
    return x.astype(y.dtype) + y if settings.residual else y
