"""`HierarchicalTriXFFN`: two-level routing over many ternary tiles, cluster then tile."""

from flax import linen as nn

from trix_jax.nn.inputs import check_input, check_mask, hide
from trix_jax.nn.settings import TileArguments, TileSettings, check_divides
from trix_jax.nn.tiles import Output, RoutedTiles, finish
from trix_jax.typing import AnyArray, Scalar, Shaped


class HierarchicalTriXFFN(TileArguments):
    """Computes `output_scale * sum_k gate_k * tile_k(h)` with `h = RMSNorm(x)`, over
    each token's best tiles.

    A token first finds its `top_k_clusters` best clusters, whose address is the mean of
    their tiles' signatures, then its `tiles_per_token` best tiles inside them. Clusters
    start as runs of `tiles_per_cluster` tiles. `routing.rebuild_clusters` groups
    similar tiles anew, when the training loop calls it.

    Attributes:
        d_model: D, the width of input and output.
        d_hidden: F, the hidden width of one tile; None takes `4 * d_model / num_tiles`.

    The other arguments are those of `TileSettings`.

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
        x = check_input(x, self.d_model, self.param_dtype)
        mask = check_mask(mask, x.shape[:-1])
        width = self.d_hidden or check_divides(
            "4 * d_model", 4 * self.d_model, "num_tiles", self.num_tiles
        )
        settings = TileSettings(
            num_tiles=self.num_tiles,
            tiles_per_cluster=self.tiles_per_cluster,
            top_k_clusters=self.top_k_clusters,
            tiles_per_token=self.tiles_per_token,
            dropout=self.dropout,
            residual=self.residual,
            **self.tile_arguments(),
        )
        norm = {"dtype": self.dtype or x.dtype, "param_dtype": self.param_dtype}
        h = nn.RMSNorm(name="norm", **norm)(hide(x, mask))
        tiles = RoutedTiles(settings, width, name="tiles")
        y, info, aux = tiles(h, train, progress, token_ids, router_input, mask)
        scale = self.param("output_scale", nn.initializers.ones, (), self.param_dtype)
        return finish((y * scale).astype(h.dtype), x, settings, train), info, aux
