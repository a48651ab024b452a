"""A decoder-only language model whose FFN is any of the four."""

import dataclasses
from typing import Any, Literal, get_args

import jax.numpy as jnp
from flax import linen as nn

from trix_jax.nn.block import (
    Block,
    DenseBlock,
    HierarchicalTriXBlock,
    SparseLookupBlock,
    SparseTriXBlock,
)
from trix_jax.nn.sparse_lookup_ffn import compress_width
from trix_jax.nn.tiles import (
    ACTIVATIONS,
    Aux,
    check_clusters,
    check_divides,
    check_tiles_per_token,
)
from trix_jax.routing import RoutingConfig, RoutingInfo
from trix_jax.ternary import TernaryConfig
from trix_jax.typing import Array, AxisName, Float, Integer, Scalar

FFNKind = Literal["hierarchical", "sparse", "lookup", "dense"]
RouterInput = Literal["hidden", "embedding"]
MatchedWidth = Literal["match-params", "match-active", "match-bits"]
ComputeDtype = Literal["float32", "bfloat16"]


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
            multiply-accumulates or served FFN bits as its TriX arm.
        expansion: total hidden width of all tiles over D.
        num_tiles, tiles_per_cluster, top_k_clusters, tiles_per_token: see the FFNs.
        router_input: what the signatures are matched with: "embedding" is the token's
            row of the embedding table, so that its tiles depend on the token alone,
            "hidden" the FFN's input, as the original has it. The first is ahead on
            TinyShakespeare and English, level on bytes of Python (experiments/quality).
            The dense FFN has no use for it.
        grid_size, compress_hidden, ternary_splines: of `SparseLookupFFN`.
        activation: None takes "gelu" for the dense FFN, "relu2" for the ternary ones.
        dropout: rate behind embeddings, attention and FFN.
        tied: the head is the embedding transposed.
        dtype: of the computation; parameters are float32.
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
    router_input: RouterInput = "embedding"
    grid_size: int = 16
    compress_hidden: int | None = None
    ternary_splines: bool = True
    activation: str | None = None
    dropout: float = 0.0
    tied: bool = True
    dtype: ComputeDtype = "float32"
    ternary: TernaryConfig = dataclasses.field(default_factory=TernaryConfig)
    routing: RoutingConfig = dataclasses.field(default_factory=RoutingConfig)

    def __post_init__(self):
        for name in (
            "context",
            "d_model",
            "n_layers",
            "n_heads",
            "expansion",
            "num_tiles",
            "grid_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1. Got {getattr(self, name)}."
                )
        for name, kind in (
            ("ffn", FFNKind),
            ("router_input", RouterInput),
            ("dtype", ComputeDtype),
        ):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"{name} must be one of {', '.join(get_args(kind))}. Got {getattr(self, name)!r}."
                )
        if self.activation is not None and self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(ACTIVATIONS)}. Got {self.activation!r}."
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(
                f"dropout must be at least 0 and below 1. Got {self.dropout}."
            )
        for name in ("vocab_size", "ffn_width"):
            if isinstance(value := getattr(self, name), int) and value < 1:
                raise ValueError(f"{name} must be at least 1. Got {value}.")
        check_divides("d_model", self.d_model, "n_heads", self.n_heads)
        if self.ffn in ("sparse", "hierarchical"):
            check_divides(
                "expansion * d_model",
                self.expansion * self.d_model,
                "num_tiles",
                self.num_tiles,
            )
        if self.ffn == "sparse":
            check_tiles_per_token(self.tiles_per_token, self.num_tiles)
        if self.ffn == "hierarchical":
            check_clusters(
                self.num_tiles,
                self.tiles_per_cluster,
                self.top_k_clusters,
                self.tiles_per_token,
            )
        if self.ffn == "lookup":
            check_clusters(self.num_tiles, self.tiles_per_cluster, 1, 1)
            compress_width(self.d_model, self.compress_hidden)
            if self.tiles_per_token != 1:
                raise ValueError(
                    f"tiles_per_token must be 1 with ffn='lookup'. Got {self.tiles_per_token}."
                )

    @property
    def tile_width(self) -> int:
        """F."""
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


class TransformerLM(nn.Module):
    """Computes next-token logits: embeddings, pre-norm blocks, norm, head. The shape
    and initialization are nanoGPT's.

    Attributes:
        config: see `TransformerConfig`.
        axis_name: mapped axis over which balance losses see the load, as in
            `nn.BatchNorm`.
        tile_axis: mapped axis that the tiles of sparse and hierarchical FFNs are spread
            over.

    References:
        nanoGPT, https://github.com/karpathy/nanoGPT. Radford et al., 2019, "Language
        Models are Unsupervised Multitask Learners" (GPT-2).
    """

    config: TransformerConfig
    axis_name: AxisName | None = None
    tile_axis: str | None = None

    @nn.compact
    def __call__(
        self,
        tokens: Integer[Array, "B L"],
        train: bool = False,
        decode: bool = False,
        progress: Scalar = 1.0,
    ) -> tuple[Float[Array, "B L V"], tuple[RoutingInfo | None, ...], Aux]:
        """Applies the model.

        Args:
            tokens: ids, `[batch, length]`, at most `context` long.
            train: dropout on ("dropout" rng), batch statistics over `axis_name`.
            decode: append to the `"cache"` collection (see `CausalSelfAttention`).
            progress: share of training done, for `TernaryConfig` schedules.

        Returns:
            logits in float32, a `RoutingInfo` a layer (None for a dense FFN), and the
            auxiliary losses, layers averaged.

        Raises:
            ValueError: a sequence longer than the context.
        """
        c = self.config
        if c.vocab_size is None:
            raise ValueError("vocab_size must be set to build a model. Got None.")
        length = tokens.shape[1]
        if length > c.context:
            raise ValueError(
                f"tokens must be at most context={c.context} long. Got {length}."
            )
        init = nn.initializers.normal(0.02)
        dtype = jnp.dtype(c.dtype)
        embed = nn.Embed(
            c.vocab_size, c.d_model, embedding_init=init, dtype=dtype, name="embed"
        )
        positions = jnp.arange(length)
        if decode:
            start = self.variable("cache", "position", lambda: jnp.zeros((), jnp.int32))
            positions = positions + start.value
            start.value = start.value + length
        rows = embed(tokens)
        router_input = rows if c.router_input == "embedding" else None
        x = rows + nn.Embed(
            c.context, c.d_model, embedding_init=init, dtype=dtype, name="positions"
        )(positions[None])
        x = nn.Dropout(c.dropout)(x, deterministic=not train)
        infos, losses = [], []
        for i in range(c.n_layers):
            block = make_block(c, self.axis_name, f"block_{i:02d}", self.tile_axis)
            x, info, aux = block(
                x,
                train,
                decode,
                progress=progress,
                token_ids=tokens,
                router_input=router_input,
            )
            infos.append(info)
            losses.append(aux)
        x = nn.LayerNorm(use_bias=False, dtype=dtype, name="norm")(x)
        if c.tied:
            logits = embed.attend(x)
        else:
            logits = nn.Dense(
                c.vocab_size, use_bias=False, kernel_init=init, dtype=dtype, name="head"
            )(x)
        aux = {
            name: jnp.mean(jnp.stack([loss[name] for loss in losses]))
            for name in losses[0]
        }
        return logits.astype(jnp.float32), tuple(infos), aux


def make_block(
    config: TransformerConfig,
    axis_name: AxisName | None,
    name: str,
    tile_axis: str | None = None,
) -> Block:
    """The block that a config asks for; residual projections start smaller by `sqrt(2 *
    n_layers)`, as in GPT-2.
    """
    c = config
    shared: dict[str, Any] = {
        "dropout": c.dropout,
        "cache_length": c.context,
        "attention_init": nn.initializers.normal(0.02),
        "attention_out_init": nn.initializers.normal(0.02 / (2 * c.n_layers) ** 0.5),
        "up_init": nn.initializers.normal(0.02),
        "down_init": nn.initializers.normal(0.02 / (2 * c.n_layers) ** 0.5),
        "dtype": jnp.dtype(c.dtype),
        "axis_name": axis_name,
        "tile_axis": tile_axis,
        "name": name,
    }
    if c.ffn == "dense":
        act = c.activation or "gelu"
        return DenseBlock(c.d_model, c.n_heads, c.dense_width, activation=act, **shared)
    shared |= {"num_tiles": c.num_tiles, "routing": c.routing}
    if c.ffn != "sparse":
        shared["tiles_per_cluster"] = c.tiles_per_cluster
    if c.ffn == "lookup":
        for option in ("grid_size", "compress_hidden", "ternary_splines"):
            shared[option] = getattr(c, option)
        return SparseLookupBlock(c.d_model, c.n_heads, **shared)
    shared |= {"ternary": c.ternary, "tiles_per_token": c.tiles_per_token}
    shared["activation"] = c.activation or "relu2"
    if c.ffn == "sparse":
        return SparseTriXBlock(c.d_model, c.n_heads, expansion=c.expansion, **shared)
    shared |= {"d_hidden": c.tile_width, "top_k_clusters": c.top_k_clusters}
    return HierarchicalTriXBlock(c.d_model, c.n_heads, **shared)
