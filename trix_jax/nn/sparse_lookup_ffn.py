"""`SparseLookupFFN`: routing picks directions, a ternary spline sets how far to go along
each.
"""

import operator
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn

from trix_jax import ops, routing, splines
from trix_jax.nn import inputs, misuse
from trix_jax.nn.kernel import TernaryKernel, Whole
from trix_jax.nn.router import Route, Router
from trix_jax.nn.settings import TileSettings
from trix_jax.nn.tiles import Output, finish, router_tokens
from trix_jax.routing import RoutingConfig
from trix_jax.ternary import Ternary, TernaryConfig
from trix_jax.typing import AnyArray, Array, AxisName, Dtype, Float, Scalar, Shaped

Reads = Literal["shared", "own"]

SPLINE_THRESHOLD = (
    0.3  # the original's, on N(0, 0.5^2) coefficients: 55 in 100 are not zero
)
DIRECTION_STD = 0.5
SPLINE_NOISE = 0.1  # around 0.5 or 0: one coefficient in 40 starts on the other side


class _Directions(NamedTuple):
    """Where tiles read and where they go.

    Attributes:
        read: None where a compressor reads for all tiles.
        write: one row a tile.
        address: what signatures are made of.
    """

    read: ops.Weights | None
    write: ops.Weights | Array
    address: Float[Array, "N D"]


class SparseLookupFFN(nn.Module):
    """Computes `output_scale * sum_k gate_n * m_n(place_n) * d_n` over each token's K
    best tiles n; `m_n` is a spline that says how far to go along the direction `d_n`.

    `reads="shared"`, the original's: `h = LayerNorm(x)`, `place = tanh(W2 gelu(W1 h))`
    is two numbers for all tiles, and `m_n` has G x G cells over [-1, 1]^2: in the one
    that `place` falls into, `m = s_n * (c0 + c1 * la + c2 * lb)` with ternary
    coefficients and `la, lb` in 0..1 the place inside the cell. `d_n` is real and is
    the tile's address.

    `reads="own"`: a tile is one hidden neuron with a spline in place of an activation,
    `place_n = tanh(u_n . h)`, and `m_n = s_n * (c0 + c1 * la)` has G cells over
    [-1, 1]. `u_n` and `d_n` are ternary, with one scale for all tiles; the address is
    `u_n`. A token computes K neurons of N: `2 * K * D` multiply-accumulates beside
    routing, whatever N is.

    Addresses are taken at unit RMS, or their sign as in the original. Only the rows of
    chosen tiles are read, in training too.

    Attributes:
        d_model: D, the width of input and output.
        grid_size: G, cells of a tile's spline along each of its coordinates. 16 is the
            original's; 1 was better with shared coordinates (`experiments/quality`),
            since the spline jumps between cells. Take 2 to 4 with `reads="own"`: two
            hold a ReLU, with which they start.
        compress_hidden: width of the compressor, between W1 and W2; None takes D / 4.
        ternary_splines: ternary coefficients; False keeps real ones.
        reads: "shared" coordinates of a compressor, or each tile's "own".
        ternary: how `u` and `d` become ternary under `reads="own"`, by a scale for all
            tiles.

    The other arguments are those of `TileSettings`.

    Raises:
        ValueError: sizes that do not divide, K or `top_k_clusters` too large, an input
            whose last axis is not D, an argument that the other kind of reading has.

    References:
        TriX, https://github.com/anjaustin/trix. He, 2024, "Mixture of A Million
        Experts", https://arxiv.org/abs/2407.04153 (single neurons as experts).
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
    top_k_clusters: int = 1
    tiles_per_token: int = 1
    reads: Reads = "shared"
    ternary: TernaryConfig = TileSettings.ternary

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
        check_reads(self.reads, self.compress_hidden, self.ternary)
        check_grid(self.grid_size)
        x = inputs.check_input(x, self.d_model, self.param_dtype)
        lead, tokens = x.shape[:-1], inputs.flatten(x, token_ids, router_input, mask)
        settings, dtype = self._settings(), self.dtype or x.dtype
        norm = nn.LayerNorm(dtype=dtype, param_dtype=self.param_dtype, name="norm")
        h = norm(tokens.x)
        directions = self._directions(progress, train)
        route, info, aux = Router(settings, name="router")(
            router_tokens(h, tokens.router_input),
            routing.signatures(directions.address, self.routing.signature),
            train,
            tokens.token_ids,
            tokens.mask,
            progress,
        )
        done = 1.0 if progress is None else progress
        place = self._place(h, route, directions.read, dtype)
        distance = route.gates * self._magnitude(place, route, done)
        first = nn.initializers.constant(0.1 if self.reads == "shared" else 1.0)
        scale = self.param("output_scale", first, (), self.param_dtype)
        y = self._write(distance * scale, directions.write, route, dtype)
        y = inputs.unflatten(inputs.hide(y.astype(dtype), tokens.mask), lead)
        y = finish(y, x, settings, train)
        return y, inputs.in_shape_of(info, lead, tokens.mask), aux

    def _settings(self) -> TileSettings:
        return TileSettings(
            num_tiles=self.num_tiles,
            tiles_per_cluster=self.tiles_per_cluster,
            top_k_clusters=self.top_k_clusters,
            tiles_per_token=self.tiles_per_token,
            dropout=self.dropout,
            residual=self.residual,
            ternary=self.ternary,
            routing=self.routing,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            axis_name=self.axis_name,
        )

    def _directions(self, progress: Scalar | None, train: bool) -> _Directions:
        shape = (self.num_tiles, self.d_model)
        if self.reads == "shared":
            init = nn.initializers.normal(DIRECTION_STD)
            rows = self.param("directions", init, shape, self.param_dtype)
            return _Directions(None, rows, rows)
        training = not self.is_initializing() and (
            train or self.is_mutable_collection("routing")
        )
        done = misuse.check_progress(progress, self.ternary, training)

        def kernel(name, std):
            init = Whole(nn.initializers.normal(std))
            how = {"param_dtype": self.param_dtype, "by_row": True}
            return TernaryKernel(shape, self.ternary, init, name=name, **how)(done)

        std = self.d_model**-0.5  # larger latent rows would hardly change their signs
        read, write = kernel("tile_read", std), kernel("tile_write", std)
        return _Directions(read, write, ops.unpack(read, self.d_model).q)

    def _place(
        self,
        h: Float[Array, "T D"],
        route: Route,
        read: ops.Weights | None,
        dtype: Dtype,
    ) -> Float[Array, "T #K axes"]:
        """Where on its tiles' grids a token is, in -1..1."""
        if read is not None:
            own = ops.read_rows(h, read, route.tiles, dtype)
            return jnp.tanh(own)[..., None]
        width = compress_width(self.d_model, self.compress_hidden)
        dense = {"dtype": dtype, "param_dtype": self.param_dtype}
        hidden = jax.nn.gelu(nn.Dense(width, name="compress_in", **dense)(h))
        two = nn.Dense(2, name="compress_out", **dense)(hidden).astype(jnp.float32)
        return jnp.tanh(two)[:, None]

    def _write(
        self,
        distance: Float[Array, "T K"],
        write: ops.Weights | Array,
        route: Route,
        dtype: Dtype,
    ) -> Float[Array, "T D"]:
        """Computes `sum_k distance_tk * d_n`."""
        if isinstance(write, ops.Packed | Ternary):
            return ops.write_rows(distance, write, route.tiles, self.d_model, dtype)
        real = jnp.asarray(write)
        return (distance[..., None] * real[route.tiles]).sum(axis=1)

    def _magnitude(
        self, place: Float[Array, "T #K axes"], route: Route, progress: Scalar
    ) -> Float[Array, "T K"]:
        """Computes `s_n * m_n(place)` of each token's tiles."""
        axes, grid = place.shape[-1], self.grid_size
        coefficients = self._splines(progress, axes)
        coefficients = coefficients.reshape(self.num_tiles, grid**axes, 1 + axes)
        scale = self.param(
            "spline_scale", nn.initializers.ones, (self.num_tiles,), self.param_dtype
        )
        m = splines.evaluate(coefficients, route.tiles, place, grid)
        return jnp.asarray(scale)[route.tiles] * m

    def _splines(self, progress: Scalar, axes: int) -> Float[Array, "N numbers"]:
        shape = (self.num_tiles, (1 + axes) * self.grid_size**axes)
        init = nn.initializers.normal(0.5) if axes == 2 else _near_ramp
        if not self.ternary_splines:
            found: Array = self.param("splines", init, shape, self.param_dtype)
            return found
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


def _near_ramp(key, shape, dtype=jnp.float32) -> Array:
    """Latent coefficients of ReLUs, with noise."""
    start = jnp.asarray(0.5 * splines.ramp(shape[-1] // 2).reshape(1, -1), dtype)
    return start + SPLINE_NOISE * jax.random.normal(key, shape, dtype)


def check_grid(grid_size: int) -> None:
    """Refuses a number of cells that is none.

    Raises:
        ValueError: says what it is.
    """
    try:
        is_one = operator.index(grid_size) >= 1
    except TypeError:
        is_one = False
    if not is_one:
        raise ValueError(f"grid_size must be an integer above 0. Got {grid_size!r}.")


def check_reads(
    reads: str, compress_hidden: int | None, ternary: TernaryConfig
) -> None:
    """Refuses an unknown kind of reading, and arguments of the other one.

    Raises:
        ValueError: says which.
    """
    if reads not in get_args(Reads):
        raise ValueError(
            f"reads must be one of {', '.join(get_args(Reads))}. Got {reads!r}."
        )
    if reads == "own" and compress_hidden is not None:
        raise ValueError(
            f"compress_hidden must be None with reads='own', which has no compressor. Got {compress_hidden}."
        )
    if reads == "shared" and ternary != TernaryConfig():
        raise ValueError(
            f"ternary must be TernaryConfig() with reads='shared', whose directions are real. Got {ternary}."
        )
    if reads == "own" and (
        ternary.rule == "fixed"
        or ternary.granularity != "tile"
        or ternary.activations != "float"
    ):
        raise ValueError(
            "ternary must have one scale for all tiles with reads='own': rule 'absmean' or "
            f"'threshold', granularity 'tile', activations 'float'. Got {ternary}."
        )


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
