"""`HierarchicalTriXFFN`: two-level routing over many ternary tiles, cluster then tile."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn

from trix_jax.nn.tiles import (
    Output,
    RoutedTiles,
    check_clusters,
    check_divides,
    check_input,
)
from trix_jax.routing import RoutingConfig
from trix_jax.ternary import TernaryConfig
from trix_jax.typing import Array, AxisName, Dtype, Float, Integer, Scalar


class HierarchicalTriXFFN(nn.Module):
    """Computes `output_scale * sum_k gate_k * tile_k(h)` with `h = RMSNorm(x)`, over
    each token's best tiles.

    A token first finds its `top_k_clusters` best clusters, whose address is the mean of
    their tiles' signatures, then its `tiles_per_token` best tiles inside them. Clusters
    start as runs of `tiles_per_cluster` tiles; `routing.rebuild_clusters` groups
    similar tiles anew, on whatever schedule the training loop has.

    Attributes:
        d_model: D, the width of input and output.
        d_hidden: F, the hidden width of one tile; None takes `4 * d_model / num_tiles`.
        num_tiles: N, in all clusters.
        tiles_per_cluster: a divisor of N.
        top_k_clusters: clusters a token may choose tiles from.
        tiles_per_token: K, at most `top_k_clusters * tiles_per_cluster`.
        dropout: rate on the output, in training; needs a "dropout" rng.
        residual: adds the input to the output (the original does).
        activation: "relu2", "relu", "gelu" or "silu".
        ternary: see `TernaryConfig`.
        routing: see `RoutingConfig`.
        dtype: of the computation; None follows the input.
        axis_name: mapped axis over which the balance loss sees the load, as in
            `nn.BatchNorm`.
        tile_axis: mapped axis that the tiles are spread over
            (`trix_jax.expert_parallel`): a device has its own, and parameters of theirs
            only.

    Raises:
        ValueError: sizes that do not divide, K or `top_k_clusters` too large, an input
            whose last axis is not D.

    References:
        TriX, https://github.com/anjaustin/trix. Zhang and Sennrich, 2019, "Root Mean
        Square Layer Normalization", https://arxiv.org/abs/1910.07467.
    """

    d_model: int
    d_hidden: int | None = None
    num_tiles: int = 64
    tiles_per_cluster: int = 8
    top_k_clusters: int = 1
    tiles_per_token: int = 1
    dropout: float = 0.0
    residual: bool = False
    activation: str = "relu2"
    ternary: TernaryConfig = TernaryConfig()
    routing: RoutingConfig = RoutingConfig()
    up_init: Callable | None = None
    down_init: Callable | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    axis_name: AxisName | None = None
    tile_axis: str | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*B D"],
        train: bool = False,
        *,
        progress: Scalar = 1.0,
        token_ids: Integer[Array, "*B"] | None = None,
        router_input: Float[Array, "*B D"] | None = None,
    ) -> Output:
        """Applies the layer. Arguments and results are those of `SparseTriXFFN`."""
        check_input(x, self.d_model)
        width = self.d_hidden or check_divides(
            "4 * d_model", 4 * self.d_model, "num_tiles", self.num_tiles
        )
        clusters = check_clusters(
            self.num_tiles,
            self.tiles_per_cluster,
            self.top_k_clusters,
            self.tiles_per_token,
        )
        tiles = RoutedTiles(
            self.num_tiles,
            width,
            self.tiles_per_token,
            clusters,
            self.top_k_clusters,
            activation=self.activation,
            ternary=self.ternary,
            routing=self.routing,
            up_init=self.up_init,
            down_init=self.down_init,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            axis_name=self.axis_name,
            tile_axis=self.tile_axis,
            name="tiles",
        )
        norm = {"dtype": self.dtype or x.dtype, "param_dtype": self.param_dtype}
        h = nn.RMSNorm(name="norm", **norm)(x)
        y, info, aux = tiles(h, train, progress, token_ids, router_input)
        scale = self.param("output_scale", nn.initializers.ones, (), self.param_dtype)
        y = nn.Dropout(self.dropout)(
            (y * scale).astype(x.dtype), deterministic=not train
        )
        return (x + y if self.residual else y), info, aux
