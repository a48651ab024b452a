"""`TileSettings`: what all tiled FFNs can be told, declared, documented and checked once.

A user passes these settings by name to an FFN or a block. The FFN makes a
`TileSettings` of them, which its `RoutedTiles` and `Router` hold. A new setting is a
field and a line of documentation in `TileSettings`, an argument and a line of
`tile_arguments` in `TileArguments`, and the place that reads it.
"""

import dataclasses
from collections.abc import Callable
from numbers import Integral
from typing import Any, get_args

import jax.numpy as jnp
from flax import linen as nn

from trix_jax.grouped_ffn import Implementation
from trix_jax.nn.activations import activation
from trix_jax.routing import RoutingConfig
from trix_jax.ternary import TernaryConfig
from trix_jax.typing import AxisName, Dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class TileSettings:
    """The settings that the tiled FFNs share.

    `docs/layers.md` has them as a table, with the defaults of each layer.

    Attributes:
        num_tiles: N, the tiles of the layer.
        tiles_per_cluster: tiles in a cluster, a divisor of N; None, as in
            `SparseTriXFFN`, is flat routing.
        top_k_clusters: clusters that a token may choose its tiles from.
        tiles_per_token: K, the tiles that a token computes, at most those it may choose
            from.
        dropout: rate on the output, in training; needs a "dropout" rng.
        residual: adds the input to the output; the original's hierarchical and lookup
            layers do.
        activation: between a tile's two matrices: "relu2" (`max(h, 0)^2`), "relu",
            "gelu" or "silu".
        ternary: how weights become ternary, a `TernaryConfig`.
        routing: how tokens find tiles, a `RoutingConfig`.
        up_init: initializer of the latent up-projections `[N, D, F]`, called once a
            tile with `[D, F]`; None takes a normal distribution of variance 1 / D, or
            U(-0.8, 0.8) under the rule "fixed".
        down_init: initializer of the latent down-projections `[N, F, D]`, called once a
            tile with `[F, D]`; None takes a normal distribution of variance 1 / F, or
            U(-0.8, 0.8) under the rule "fixed".
        dtype: of the computation and the output; None takes the input's.
        param_dtype: of the parameters.
        axis_name: mapped axis, or axes, over which the balance loss sees the load, as
            in `nn.BatchNorm`; None sees one device's tokens.
        tile_axis: mapped axis that the tiles are spread over
            (`trix_jax.expert_parallel`): a device holds its own tiles and the
            parameters of no others; None holds all.
        implementation: of the tiles' products: "xla", "mosaic_gpu" (kernels for GPUs),
            which runs or raises with the reason, or None: the kernels where they run
            and a committed measurement says that they are faster.

    Raises:
        ValueError: a routing or ternary that is no config, clusters that do not divide the tiles, `top_k_clusters` or
            `tiles_per_token` below 1 or above what there is, an unknown activation or
            implementation.
    """

    num_tiles: int
    tiles_per_cluster: int | None = None
    top_k_clusters: int = 1
    tiles_per_token: int = 1
    dropout: float = 0.0
    residual: bool = False
    activation: str = "relu2"
    ternary: TernaryConfig = dataclasses.field(default=TernaryConfig())
    routing: RoutingConfig = dataclasses.field(default=RoutingConfig())
    up_init: Callable | None = None
    down_init: Callable | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    axis_name: AxisName | None = None
    tile_axis: str | None = None
    implementation: Implementation | None = None

    def __post_init__(self):
        for name, kind in (("routing", RoutingConfig), ("ternary", TernaryConfig)):
            if not isinstance(value := getattr(self, name), kind):
                raise ValueError(
                    f"{name} must be a {kind.__name__}, as in "
                    f"{name}={kind.__name__}(...). Got {value!r}."
                )
        choice, what = self.num_tiles, "num_tiles"
        if self.tiles_per_cluster is not None:
            clusters, top_k = self.num_clusters, self.top_k_clusters
            if not 1 <= top_k <= clusters:
                raise ValueError(
                    f"top_k_clusters={top_k} must be at least 1 and at most the {clusters} clusters."
                )
            if self.routing.source != "hash":  # which looks at no cluster
                choice = top_k * self.tiles_per_cluster
                what = "top_k_clusters * tiles_per_cluster"
        if not 1 <= self.tiles_per_token <= choice:
            raise ValueError(
                f"tiles_per_token={self.tiles_per_token} must be at least 1 and at most {what}={choice}."
            )
        if self.routing.hash_sets is not None:
            self._check_sets(self.routing.hash_sets, self.routing.sets_per_token)
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"dropout must be in 0..1. Got {self.dropout}.")
        activation(self.activation)
        if self.implementation not in (None, *get_args(Implementation)):
            kinds, name = ", ".join(get_args(Implementation)), self.implementation
            raise ValueError(
                f"implementation must be None or one of {kinds}. Got {name!r}."
            )

    def _check_sets(self, num_sets, g):
        check_divides("num_tiles", self.num_tiles, "sets_per_token", g)
        each = check_divides(
            "tiles_per_token", self.tiles_per_token, "sets_per_token", g
        )
        if int(num_sets) * int(self.tiles_per_token) < self.num_tiles:
            raise ValueError(
                f"hash_sets={num_sets} sets of {each} tiles must have room for "
                f"num_tiles={self.num_tiles} / sets_per_token={g}."
            )

    @property
    def num_clusters(self) -> int:
        """Number of clusters (C); 0 is flat routing."""
        if self.tiles_per_cluster is None:
            return 0
        return check_divides(
            "num_tiles", self.num_tiles, "tiles_per_cluster", self.tiles_per_cluster
        )


class LayerArguments(nn.Module, kw_only=True):
    """The settings that every block takes, the dense one included, as keywords."""

    up_init: Callable | None = TileSettings.up_init
    down_init: Callable | None = TileSettings.down_init
    dtype: Dtype | None = TileSettings.dtype
    param_dtype: Dtype = TileSettings.param_dtype
    axis_name: AxisName | None = TileSettings.axis_name
    tile_axis: str | None = TileSettings.tile_axis


class TileArguments(LayerArguments, kw_only=True):
    """The settings that FFNs of ternary tiles, and the blocks around them, take as
    keywords. Settings that may be given by position are fields of each class, since
    their place among its arguments is its own.
    """

    activation: str = TileSettings.activation
    ternary: TernaryConfig = TileSettings.ternary
    routing: RoutingConfig = TileSettings.routing
    implementation: Implementation | None = TileSettings.implementation

    def tile_arguments(self) -> dict[str, Any]:
        """These keywords by name: what a block hands to its FFN, and an FFN to its
        `TileSettings`.
        """
        return {
            "activation": self.activation,
            "ternary": self.ternary,
            "routing": self.routing,
            "up_init": self.up_init,
            "down_init": self.down_init,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "axis_name": self.axis_name,
            "tile_axis": self.tile_axis,
            "implementation": self.implementation,
        }


def check_divides(what: str, total: int, name: str, parts: int) -> int:
    """Returns `total / parts`, or raises a ValueError that names both."""
    if not (isinstance(total, Integral) and isinstance(parts, Integral)):
        raise ValueError(f"{what}={total} and {name}={parts} must be integers.")
    if parts < 1 or total % parts or total < parts:
        raise ValueError(f"{name}={parts} must divide {what}={total}.")
    return total // parts
