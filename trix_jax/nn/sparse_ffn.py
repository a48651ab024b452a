"""`SparseTriXFFN`: flat routing over a few ternary tiles."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn

from trix_jax.nn.tiles import (
    Output,
    RoutedTiles,
    check_divides,
    check_input,
    check_tiles_per_token,
)
from trix_jax.routing import RoutingConfig
from trix_jax.ternary import TernaryConfig
from trix_jax.typing import Array, AxisName, Dtype, Float, Integer, Scalar


class SparseTriXFFN(nn.Module):
    """Computes `sum_k gate_k * (act((x @ q_up_k) * s_up_k) @ q_down_k) * s_down_k` over
    each token's best tiles.

    The hidden width `expansion * d_model` is cut into `num_tiles` tiles; a token
    computes `tiles_per_token` of them, those whose signature, the sum of the tile's
    ternary up-projection, matches it best. There are no routing parameters. No norm
    inside and, unless `residual`, no residual: the layer takes the place of a
    transformer's FFN.

    Attributes:
        d_model: D, the width of input and output.
        num_tiles: N, a divisor of `expansion * d_model`.
        expansion: total hidden width over D.
        tiles_per_token: K, the tiles that a token computes.
        dropout: rate on the output, in training; needs a "dropout" rng.
        residual: adds the input to the output.
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
        ValueError: sizes that do not divide, K outside 1..N, an input whose last axis
            is not D, a router input of another shape than the input's.

    References:
        The signature idea: TriX, https://github.com/anjaustin/trix.
    """

    d_model: int
    num_tiles: int = 4
    expansion: int = 4
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
        """Applies the layer.

        Args:
            x: tokens, rank 2 or 3.
            train: dropout on; batch statistics over `axis_name`.
            progress: share of training done, for `TernaryConfig` schedules.
            token_ids: only for the routing control "hash".
            router_input: what the signatures are matched with; None takes `x`. With a
                token's row of the embedding table its tiles depend on nothing else.

        Returns:
            the output, what the routing did, and the auxiliary losses, of which
            `total_aux` is to be added to the task's.
        """
        check_input(x, self.d_model)
        width = check_divides(
            "expansion * d_model",
            self.expansion * self.d_model,
            "num_tiles",
            self.num_tiles,
        )
        check_tiles_per_token(self.tiles_per_token, self.num_tiles)
        tiles = RoutedTiles(
            self.num_tiles,
            width,
            self.tiles_per_token,
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
        y, info, aux = tiles(x, train, progress, token_ids, router_input)
        y = nn.Dropout(self.dropout)(y, deterministic=not train)
        return (x + y if self.residual else y), info, aux
