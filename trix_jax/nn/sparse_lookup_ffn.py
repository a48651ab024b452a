"""`SparseLookupFFN`: routing picks a direction, a ternary spline of two numbers sets
how far to go.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from trix_jax import ops, routing
from trix_jax.nn import inputs
from trix_jax.nn.kernel import TernaryKernel
from trix_jax.nn.router import Router
from trix_jax.nn.settings import TileSettings
from trix_jax.nn.tiles import Output, finish, router_tokens
from trix_jax.routing import RoutingConfig
from trix_jax.ternary import TernaryConfig
from trix_jax.typing import (
    AnyArray,
    Array,
    AxisName,
    Dtype,
    Float,
    Integer,
    Scalar,
    Shaped,
)

SPLINE_THRESHOLD = (
    0.3  # the original's, on N(0, 0.5^2) coefficients: 55 in 100 are not zero
)
DIRECTION_STD = 0.5


class SparseLookupFFN(nn.Module):
    """Computes `gate_n * m_n(a, b) * d_n * output_scale` for each token's best tile n;
    no matmul but the compressor.

    `h = LayerNorm(x)`, `(a, b) = tanh(W2 gelu(W1 h))`, and `m_n` is a spline on a G x G
    grid over [-1, 1]^2: in the cell that (a, b) falls into, `m = s_n * (c0 + c1 * la +
    c2 * lb)` with ternary coefficients and `la, lb` in 0..1 the place inside the cell.
    The tile's address is its direction `d_n`: at unit RMS, or its sign as in the
    original.

    Attributes:
        d_model: D, the width of input and output.
        grid_size: G, cells of a tile's spline along each of its two coordinates. 16 is
            the original's; 1 was better (`experiments/quality`), since the spline jumps
            between cells.
        compress_hidden: width of the compressor, between W1 and W2; None takes D / 4.
        ternary_splines: ternary coefficients; False keeps real ones.

    The other arguments are those of `TileSettings`. A token uses one tile.

    Raises:
        ValueError: sizes that do not divide, an input whose last axis is not D.

    References:
        TriX, https://github.com/anjaustin/trix.
    """

    d_model: int
    num_tiles: int = 64
    tiles_per_cluster: int = 8
    grid_size: int = 16
    compress_hidden: int | None = None
    ternary_splines: bool = True
    dropout: float = 0.0
    residual: bool = False
    # The keywords of `TileArguments` that mean something to tiles without matrices.
    routing: RoutingConfig = TileSettings.routing
    dtype: Dtype | None = TileSettings.dtype
    param_dtype: Dtype = TileSettings.param_dtype
    axis_name: AxisName | None = TileSettings.axis_name

    @nn.compact
    def __call__(
        self,
        x: Shaped[AnyArray, "..."],
        train: bool = False,
        *,
        progress: Scalar | None = None,
        token_ids: Shaped[AnyArray, "..."] | None = None,
        router_input: Shaped[AnyArray, "..."] | None = None,
        mask: Shaped[AnyArray, "..."] | None = None,
    ) -> Output:
        """Applies the layer. Arguments and results are those of `SparseTriXFFN`."""
        x = inputs.check_input(x, self.d_model, self.param_dtype)
        lead, tokens = x.shape[:-1], inputs.flatten(x, token_ids, router_input, mask)
        settings, dtype = self._settings(), self.dtype or x.dtype
        norm = nn.LayerNorm(dtype=dtype, param_dtype=self.param_dtype, name="norm")
        h = norm(tokens.x)
        shape = (self.num_tiles, self.d_model)
        init = nn.initializers.normal(DIRECTION_STD)
        directions = self.param("directions", init, shape, self.param_dtype)
        route, info, aux = Router(settings, name="router")(
            router_tokens(h, tokens.router_input),
            routing.signatures(directions, self.routing.signature),
            train,
            tokens.token_ids,
            tokens.mask,
            progress,
        )
        tile, gate = route.tiles[:, 0], route.gates[:, 0]
        done = 1.0 if progress is None else progress
        magnitude = self._magnitude(self._compress(h, dtype), tile, done)
        small = nn.initializers.constant(0.1)
        scale = self.param("output_scale", small, (), self.param_dtype)
        y = (gate * magnitude * scale)[:, None] * directions[tile]
        y = inputs.unflatten(inputs.hide(y.astype(dtype), tokens.mask), lead)
        y = finish(y, x, settings, train)
        return y, inputs.in_shape_of(info, lead, tokens.mask), aux

    def _settings(self) -> TileSettings:
        return TileSettings(
            num_tiles=self.num_tiles,
            tiles_per_cluster=self.tiles_per_cluster,
            dropout=self.dropout,
            residual=self.residual,
            routing=self.routing,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            axis_name=self.axis_name,
        )

    def _compress(self, h: Float[Array, "T D"], dtype: Dtype) -> Float[Array, "T two"]:
        """Two numbers in -1..1 that say where on its tile's grid a token is."""
        width = compress_width(self.d_model, self.compress_hidden)
        dense = {"dtype": dtype, "param_dtype": self.param_dtype}
        hidden = jax.nn.gelu(nn.Dense(width, name="compress_in", **dense)(h))
        return jnp.tanh(
            nn.Dense(2, name="compress_out", **dense)(hidden).astype(jnp.float32)
        )

    def _magnitude(
        self, ab: Float[Array, "T two"], tile: Integer[Array, " T"], progress: Scalar
    ) -> Float[Array, " T"]:
        """Computes `s_n * (c0 + c1 * la + c2 * lb)` with the coefficients of the
        token's tile and cell.
        """
        grid = self.grid_size
        position = (ab + 1) / 2 * grid
        cell = jax.lax.stop_gradient(jnp.clip(jnp.floor(position), 0, grid - 1))
        local = position - cell
        coefficients = self._splines(progress).reshape(self.num_tiles, grid, grid, 3)
        i, j = cell.astype(jnp.int32).T
        c_T3 = coefficients[tile, i, j]
        scale = self.param(
            "spline_scale", nn.initializers.ones, (self.num_tiles,), self.param_dtype
        )
        return scale[tile] * (
            c_T3[:, 0] + c_T3[:, 1] * local[:, 0] + c_T3[:, 2] * local[:, 1]
        )

    def _splines(self, progress: Scalar) -> Float[Array, "N cells"]:
        shape = (self.num_tiles, 3 * self.grid_size**2)
        init = nn.initializers.normal(0.5)
        if not self.ternary_splines:
            return self.param("splines", init, shape, self.param_dtype)
        rule = TernaryConfig(rule="fixed", threshold=SPLINE_THRESHOLD)
        kernel = TernaryKernel(
            shape,
            rule,
            init,
            learn_scale=False,
            param_dtype=self.param_dtype,
            name="splines",
        )
        return ops.unpack(kernel(progress), shape[-1]).q


def compress_width(d_model: int, compress_hidden: int | None) -> int:
    """Returns the compressor's hidden width: `compress_hidden`, or `d_model / 4` if
    that is None.

    Raises:
        ValueError: a width below 1, or None where 4 does not divide `d_model`.
    """
    if compress_hidden is None:
        if d_model % 4:
            raise ValueError(
                f"compress_hidden=None takes d_model / 4, so 4 must divide d_model={d_model}; give a width."
            )
        return d_model // 4
    if compress_hidden < 1:
        raise ValueError(f"compress_hidden must be at least 1. Got {compress_hidden}.")
    return compress_hidden
