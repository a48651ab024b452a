"""`SparseTriXFFN`: flat routing over a few ternary tiles."""

from flax import linen as nn

from trix_jax.nn.inputs import check_input
from trix_jax.nn.settings import TileArguments, TileSettings, check_divides
from trix_jax.nn.tiles import Output, RoutedTiles, finish
from trix_jax.typing import AnyArray, Scalar, Shaped


class SparseTriXFFN(TileArguments):
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
        expansion: hidden width of all tiles together, over D.

    The other arguments are those of `TileSettings`.

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
        """Applies the layer.

        Args:
            x: `[..., d_model]`; integers are promoted with the parameters.
            train: dropout on; batch statistics over `axis_name`.
            progress: share of training done, for `TernaryConfig` schedules and
                `RoutingConfig.hold_after`; None is the end.
            token_ids: integers, for the routing source "hash" and for a table of
                routes; of pairs of tokens, `routing.pair_ids`.
            router_input: what the signatures are matched with; None takes `x`. With a
                token's row of the embedding table its tiles depend on nothing else.
            mask: True for real tokens. Others, whatever they hold, get 0 (with
                `residual` their `x`) and count in no load, loss or diagnostic.

        Returns:
            the output, what the routing did, and the auxiliary losses, of which
            `total_aux` is to be added to the task's.
        """
        x = check_input(x, self.d_model, self.param_dtype)
        hidden = self.expansion * self.d_model
        width = check_divides(
            "expansion * d_model", hidden, "num_tiles", self.num_tiles
        )
        settings = TileSettings(
            num_tiles=self.num_tiles,
            tiles_per_token=self.tiles_per_token,
            dropout=self.dropout,
            residual=self.residual,
            **self.tile_arguments(),
        )
        tiles = RoutedTiles(settings, width, name="tiles")
        y, info, aux = tiles(x, train, progress, token_ids, router_input, mask)
        return finish(y, x, settings, train), info, aux
