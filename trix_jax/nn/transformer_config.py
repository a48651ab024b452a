"""What a `TransformerLM` is made from."""

import dataclasses
from typing import Any, Literal, get_args

from trix_jax.grouped_ffn import Implementation
from trix_jax.nn.activations import activation
from trix_jax.nn.block import Norm
from trix_jax.nn.cudnn import AttentionKind
from trix_jax.nn.settings import TileSettings, check_divides
from trix_jax.nn.sparse_lookup_ffn import Reads, check_reads, compress_width
from trix_jax.nn.token_input import check_router_input
from trix_jax.routing import RoutingConfig
from trix_jax.ternary import TernaryConfig, as_served

FFNKind = Literal["hierarchical", "sparse", "lookup", "dense"]
RouterInput = Literal["hidden", "embedding", "pair"]
MatchedWidth = Literal["match-params", "match-active", "match-bits"]
ComputeDtype = Literal["float32", "bfloat16"]
Positions = Literal["learned", "rotary"]
Init = Literal["gpt2", "fan_in"]


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape of a `TransformerLM`.

    Attributes:
        vocab_size: V; None is filled in from the tokenizer by the training lane.
        context: longest sequence, L.
        d_model: D, the width.
        n_layers: number of blocks.
        n_heads: H, of attention.
        ffn: which FFN.
        ffn_width: hidden width of the dense FFN; None takes `expansion * d_model`;
            "match-params", "match-active" and "match-bits" are filled in by the
            training lane with the width at which the model has as many parameters, FFN
            multiply-accumulates or bits as served, of the FFN and its routing, as its
            TriX arm.
        expansion: total hidden width of all tiles over D.
        num_tiles, tiles_per_cluster, top_k_clusters, tiles_per_token: see
            `TileSettings`.
        shared_width: hidden width of a dense FFN of real weights beside the tiles, added
            for every token (`Block.shared_width`), with gelu; 0 is none.
        router_input: what the signatures are matched with: "embedding" is the token's
            row of the embedding table, so that its tiles depend on the token alone,
            "hidden" the FFN's input, as the original has it. The first is ahead on
            TinyShakespeare and English, level on bytes of Python (experiments/quality).
            "pair" is `rms_unit(row) + pair_weight * rms_unit(row of the token before)`,
            and the control "hash" then hashes pairs. The dense FFN has no use for it.
        pair_weight: see `router_input`.
        hash_per_layer: with `routing.source` "hash" every layer has a hash of its own: the
            i-th, counted from 0, hashes `id + i * vocab_size`. Five seeds of English end
            0.013 ± 0.006 nats lower. False is the same tiles in all.
        hidden_from: the first layer, counted from 0, that routes by hidden state
            whatever `router_input` says; None has no such layer.
        grid_size, compress_hidden, ternary_splines, reads: of `SparseLookupFFN`.
        activation: None takes "gelu" for the dense FFN, "relu2" for the ternary ones. A
            lookup has no use for it.
        dropout: rate behind embeddings, attention and FFN.
        tied: the head is the embedding transposed.
        dtype: of the computation; parameters are float32.
        norm: "layer" norms without bias, as GPT-2 has them, or "rms" norms.
        positions: "learned" embeddings of them, added to the tokens', or "rotary" ones
            in the attention.
        qk_norm: RMS norms of queries and keys.
        init: "gpt2" draws every matrix at a standard deviation of 0.02, those into the
            residual over `sqrt(2 * n_layers)`; "fan_in" draws the attention's at `1 /
            sqrt(D)`, its output over `sqrt(2 * n_layers)`, and the FFN as its module
            does by itself. Embeddings have 0.02 either way; a lookup, and tiles with
            `ternary.rule` "fixed", start as their modules do.
        document_mask: no token attends to another document, and positions begin anew in
            each: a document's logits are those that it gets alone.
        attention: "auto" takes cuDNN's where it runs and XLA's elsewhere, "xla" and
            "cudnn" exactly that; see `CausalSelfAttention.implementation`.
        remat: a block's activations are computed again in the backward pass, which
            keeps the blocks' inputs alone: less memory, a third more work.
        implementation: of the products of tiles, see `TileSettings`; FFNs without such
            tiles ("lookup", "dense") have no use for it.
        end_token: the id that opens a document; None is filled in from the tokenizer by
            the training lane, where `document_mask` needs it.
    """

    vocab_size: int | None = None
    context: int = 64
    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 4
    ffn: FFNKind = "hierarchical"
    ffn_width: int | MatchedWidth | None = None
    expansion: int = 4
    num_tiles: int = 16
    tiles_per_cluster: int = 4
    top_k_clusters: int = 1
    tiles_per_token: int = 1
    shared_width: int = 0
    router_input: RouterInput = "embedding"
    pair_weight: float = 0.5
    hash_per_layer: bool = False
    hidden_from: int | None = None
    grid_size: int = 16
    compress_hidden: int | None = None
    ternary_splines: bool = True
    reads: Reads = "shared"
    activation: str | None = None
    dropout: float = 0.0
    tied: bool = True
    dtype: ComputeDtype = "float32"
    norm: Norm = "layer"
    positions: Positions = "learned"
    qk_norm: bool = False
    init: Init = "gpt2"
    document_mask: bool = False
    end_token: int | None = None
    attention: AttentionKind = "auto"
    remat: bool = False
    implementation: Implementation | None = None
    ternary: TernaryConfig = dataclasses.field(default_factory=TernaryConfig)
    routing: RoutingConfig = dataclasses.field(default_factory=RoutingConfig)

    def __post_init__(self):
        self._check_sizes()
        self._check_choices()
        head = check_divides("d_model", self.d_model, "n_heads", self.n_heads)
        if self.positions == "rotary" and head % 2:
            what = "d_model / n_heads must be even with positions='rotary'"
            raise ValueError(f"{what}. Got {head}.")
        self._check_tiles()
        if self.ffn != "dense":
            check_router_input(self)

    def _check_sizes(self) -> None:
        sizes = "context d_model n_layers n_heads expansion num_tiles grid_size"
        for name in (*sizes.split(), "vocab_size", "ffn_width"):
            size = getattr(self, name)
            if size is not None and not isinstance(size, str) and size < 1:
                raise ValueError(f"{name} must be at least 1. Got {size}.")

    def _check_choices(self) -> None:
        for name, value, kind in (
            ("ffn", self.ffn, FFNKind),
            ("router_input", self.router_input, RouterInput),
            ("dtype", self.dtype, ComputeDtype),
            ("norm", self.norm, Norm),
            ("positions", self.positions, Positions),
            ("init", self.init, Init),
            ("attention", self.attention, AttentionKind),
            ("implementation", self.implementation or "xla", Implementation),
        ):
            if value not in get_args(kind):
                raise ValueError(
                    f"{name} must be one of {', '.join(get_args(kind))}. Got {value!r}."
                )
        if self.shared_width < 0:
            raise ValueError(
                f"shared_width must be at least 0. Got {self.shared_width}."
            )
        if self.activation is not None:
            activation(self.activation)
        if not 0 <= self.dropout < 1:
            raise ValueError(
                f"dropout must be at least 0 and below 1. Got {self.dropout}."
            )

    def _check_tiles(self) -> None:
        n, m, k = self.num_tiles, self.tiles_per_cluster, self.tiles_per_token
        how = self.implementation
        if self.ffn in ("sparse", "hierarchical"):
            width = self.expansion * self.d_model
            check_divides("expansion * d_model", width, "num_tiles", n)
        if self.ffn == "sparse":
            TileSettings(num_tiles=n, tiles_per_token=k, implementation=how)
        clusters: dict[str, Any] = {"tiles_per_cluster": m, "routing": self.routing}
        clusters["top_k_clusters"] = self.top_k_clusters
        if self.ffn == "hierarchical":
            TileSettings(num_tiles=n, tiles_per_token=k, implementation=how, **clusters)
        if self.ffn == "lookup":
            TileSettings(num_tiles=n, tiles_per_token=k, **clusters)
            is_own = self.reads == "own"
            check_reads(self.reads, self.compress_hidden, self.ternary)
            if not is_own:
                compress_width(self.d_model, self.compress_hidden)

    @property
    def has_ternary_products(self) -> bool:
        """Whether the FFN multiplies by weights that `ternary` is about."""
        is_own = self.ffn == "lookup" and self.reads == "own"
        return is_own or self.ffn in ("sparse", "hierarchical")

    @property
    def has_ternary_weights(self) -> bool:
        """Whether the FFN has weights that `trix_jax.freeze` packs."""
        is_ternary = self.has_ternary_products and self.ternary.mode != "none"
        return is_ternary or (self.ffn == "lookup" and self.ternary_splines)

    def as_served(self) -> "TransformerConfig":
        """The config that computes with the weights that are served, which training in
        mode "soft" never does.
        """
        return dataclasses.replace(self, ternary=as_served(self.ternary))

    def on_any_device(self) -> "TransformerConfig":
        """The same model, whose kernels are taken where they run: what was trained with
        kernels by name is served, counted and read elsewhere.
        """
        attention = "auto" if self.attention == "cudnn" else self.attention
        asked = None if self.implementation == "mosaic_gpu" else self.implementation
        return dataclasses.replace(self, attention=attention, implementation=asked)

    @property
    def tile_width(self) -> int:
        """Hidden width of one tile (F)."""
        return self.expansion * self.d_model // self.num_tiles

    @property
    def dense_width(self) -> int:
        """Hidden width of the dense FFN.

        Raises:
            ValueError: a width to match has not been resolved.
        """
        if isinstance(self.ffn_width, str):
            raise ValueError(
                f"ffn_width={self.ffn_width!r} must be resolved first, by trix_jax.lm.presets.match_width."
            )
        return self.ffn_width or self.expansion * self.d_model
