"""A decoder-only language model with any of the three TriX FFNs or the dense one."""

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn

from trix_jax.nn.activations import activation
from trix_jax.nn.block import (
    Block,
    DenseBlock,
    HierarchicalTriXBlock,
    Norm,
    SparseLookupBlock,
    SparseTriXBlock,
    make_norm,
)
from trix_jax.nn.cudnn import AttentionKind
from trix_jax.nn.inputs import check_mask
from trix_jax.nn.kernel import Whole
from trix_jax.nn.positions import positions_of
from trix_jax.nn.segments import segments_of
from trix_jax.nn.settings import Implementation, TileSettings, check_divides
from trix_jax.nn.sparse_lookup_ffn import compress_width
from trix_jax.nn.tiles import Aux
from trix_jax.nn.token_input import TokenInput, check_router_input
from trix_jax.routing import RoutingConfig, RoutingInfo
from trix_jax.ternary import TernaryConfig
from trix_jax.typing import (
    AnyArray,
    Array,
    AxisName,
    Float,
    Integer,
    Scalar,
    Shaped,
)

FFNKind = Literal["hierarchical", "sparse", "lookup", "dense"]
RouterInput = Literal["hidden", "embedding", "pair"]
MatchedWidth = Literal["match-params", "match-active", "match-bits"]
ComputeDtype = Literal["float32", "bfloat16"]
Positions = Literal["learned", "rotary"]
Init = Literal["gpt2", "fan_in"]

INIT_STD = 0.02  # GPT-2's
INIT = nn.initializers.normal(INIT_STD)


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
        num_tiles, tiles_per_cluster, top_k_clusters, tiles_per_token: see
            `TileSettings`.
        router_input: what the signatures are matched with: "embedding" is the token's
            row of the embedding table, so that its tiles depend on the token alone,
            "hidden" the FFN's input, as the original has it. The first is ahead on
            TinyShakespeare and English, level on bytes of Python (experiments/quality).
            "pair" is `rms_unit(row) + pair_weight * rms_unit(row of the token before)`,
            and the control "hash" then hashes pairs. The dense FFN has no use for it.
        pair_weight: see `router_input`.
        hidden_from: the first layer, counted from 0, that routes by hidden state
            whatever `router_input` says; None has no such layer.
        grid_size, compress_hidden, ternary_splines: of `SparseLookupFFN`.
        activation: None takes "gelu" for the dense FFN, "relu2" for the ternary ones.
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
            does by itself. Embeddings have 0.02 either way.
        document_mask: no token attends to another document, and positions begin anew in
            each: a document's logits are those that it gets alone.
        attention: "auto" takes cuDNN's where it runs and XLA's elsewhere, "xla" and
            "cudnn" exactly that; see `CausalSelfAttention.implementation`.
        remat: a block's activations are computed again in the backward pass, which
            keeps the blocks' inputs alone: less memory, a third more work.
        implementation: of the tiles' products, see `TileSettings`.
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
    router_input: RouterInput = "embedding"
    pair_weight: float = 0.5
    hidden_from: int | None = None
    grid_size: int = 16
    compress_hidden: int | None = None
    ternary_splines: bool = True
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
        ):
            if value not in get_args(kind):
                raise ValueError(
                    f"{name} must be one of {', '.join(get_args(kind))}. Got {value!r}."
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
        if self.ffn == "hierarchical":
            clusters = {"tiles_per_cluster": m, "top_k_clusters": self.top_k_clusters}
            TileSettings(num_tiles=n, tiles_per_token=k, implementation=how, **clusters)
        if self.ffn == "lookup":
            TileSettings(num_tiles=n, tiles_per_cluster=m)
            compress_width(self.d_model, self.compress_hidden)
            if k != 1:
                raise ValueError(
                    f"tiles_per_token must be 1 with ffn='lookup'. Got {k}."
                )

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


class TransformerLM(nn.Module):
    """Computes next-token logits: embeddings, pre-norm blocks, norm, head. The shape
    and initialization are nanoGPT's, or as `TransformerConfig` has them.

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
        tokens: Integer[AnyArray, "B L"],
        train: bool = False,
        decode: bool = False,
        progress: Scalar | None = None,
        *,
        mask: Shaped[AnyArray, "..."] | None = None,
        segment_ids: Shaped[AnyArray, "..."] | None = None,
        hidden: bool = False,
    ) -> tuple[Float[Array, "B L _"], tuple[RoutingInfo | None, ...], Aux]:
        """Applies the model.

        Args:
            tokens: ids, `[batch, length]`, at most `context` long.
            train: dropout on ("dropout" rng), batch statistics over `axis_name`.
            decode: append to the `"cache"` collection (see `CausalSelfAttention`).
            progress: share of training done, for `TernaryConfig` schedules; None is the
                end.
            mask: `[batch, length]`, True for real tokens, of which positions are
                counted; padding may stand left or right.
            segment_ids: `[batch, length]` integers; a token sees those of its own
                number, and positions begin anew where the number changes. None: the
                documents, with `TransformerConfig.document_mask`, or one.
            hidden: leaves the head to the caller, see
                `trix_jax.lm.train.loss`.

        Returns:
            logits in float32 (with `hidden` what the head multiplies, `[B, L, D]`), a
            `RoutingInfo` a layer (None for a dense FFN), and the auxiliary losses,
            layers averaged.

        Raises:
            ValueError: a sequence longer than the context, a mask or segments of
                another shape.
        """
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        v = _vocabulary(c, tokens.shape[1])
        embed = nn.Embed(v, c.d_model, embedding_init=INIT, dtype=dtype, name="embed")
        mask = check_mask(mask, tokens.shape)
        tokens = jnp.asarray(tokens)
        apart = c.document_mask, c.end_token
        segment_ids = segments_of(self, tokens, segment_ids, mask, decode, *apart)
        x = rows = embed(tokens)
        if c.positions == "learned":
            x = rows + self._positions(tokens.shape, mask, segment_ids, decode)
        x = nn.Dropout(c.dropout)(x, deterministic=not train)
        how: dict[str, Any] = {"progress": progress, "token_ids": tokens}
        how |= {"mask": mask, "segment_ids": segment_ids}
        how |= self._by_token(tokens, rows, embed, train, decode, how)
        x, infos, aux = self._blocks(x, train, decode, how)
        x = make_norm(c.norm, "norm", dtype=dtype)(x)
        if hidden:
            return x, infos, aux
        head = embed.attend
        if not c.tied:
            head = nn.Dense(
                v, use_bias=False, kernel_init=INIT, dtype=dtype, name="head"
            )
        return head(x).astype(jnp.float32), infos, aux

    def _by_token(self, tokens, rows, embed, train, decode, how) -> dict[str, Any]:
        """What the routers are given of each token; nothing where they look at hidden
        states.
        """
        c = self.config
        if c.router_input == "hidden" or c.ffn == "dense":
            return {}
        weight = c.pair_weight if c.router_input == "pair" else None
        look = TokenInput(c.routing, weight, name="router_input")
        about = (how[name] for name in ("progress", "mask", "segment_ids"))
        return look(tokens, rows, embed, train, decode, *about)._asdict()

    def _positions(self, shape, mask, segment_ids, decode) -> Float[Array, "B L D"]:
        """Embedded positions; see `positions_of`."""
        c = self.config
        embed = nn.Embed(
            c.context,
            c.d_model,
            embedding_init=INIT,
            dtype=jnp.dtype(c.dtype),
            name="positions",
        )
        return embed(positions_of(self, shape, mask, segment_ids, decode))

    def _blocks(self, x, train, decode, how):
        """The blocks' output, the routing infos of each, and their mean losses."""

        def run(block, x, how):
            return block(x, train, decode, **how)

        if self.config.remat and not decode:
            run = nn.remat(run)
        infos, losses = [], []
        for i in range(self.config.n_layers):
            block = make_block(
                self.config, self.axis_name, f"block_{i:02d}", self.tile_axis
            )
            if i == self.config.hidden_from:
                how = {**how, "router_input": None}
            x, info, aux = run(block, x, how)
            infos.append(info)
            losses.append(aux)
        mean = jax.tree.map(lambda *layers: jnp.mean(jnp.stack(layers)), *losses)
        return x, tuple(infos), mean


def _vocabulary(config: TransformerConfig, length: int) -> int:
    """Size of the vocabulary (V). Refuses a config without one, and a sequence longer
    than the context.
    """
    if config.vocab_size is None:
        raise ValueError("vocab_size must be set to build a model. Got None.")
    if length > (most := config.context):
        raise ValueError(f"tokens must be at most context={most} long. Got {length}.")
    return config.vocab_size


def make_block(
    config: TransformerConfig,
    axis_name: AxisName | None,
    name: str,
    tile_axis: str | None = None,
) -> Block:
    """The block that a config asks for; residual projections start smaller by `sqrt(2 *
    n_layers)`, as in GPT-2.
    """
    c, common = config, _block_arguments(config)
    common |= {"axis_name": axis_name, "tile_axis": tile_axis, "name": name}
    width, heads = c.d_model, c.n_heads
    if c.ffn == "dense":
        act = c.activation or "gelu"
        return DenseBlock(width, heads, c.dense_width, activation=act, **common)
    n, m, k = c.num_tiles, c.tiles_per_cluster, c.tiles_per_token
    common["routing"] = c.routing
    if c.ffn == "lookup":
        splines = c.grid_size, c.compress_hidden, c.ternary_splines
        return SparseLookupBlock(width, heads, n, m, *splines, **common)
    common |= {"ternary": c.ternary, "implementation": c.implementation}
    common["activation"] = c.activation or "relu2"
    if c.ffn == "sparse":
        return SparseTriXBlock(width, heads, n, c.expansion, k, **common)
    sizes = c.tile_width, n, m, c.top_k_clusters, k
    return HierarchicalTriXBlock(width, heads, *sizes, **common)


def _block_arguments(config: TransformerConfig) -> dict[str, Any]:
    """What the blocks of all FFNs are told."""
    c, depth = config, (2 * config.n_layers) ** -0.5
    std = c.d_model**-0.5 if c.init == "fan_in" else INIT_STD
    how: dict[str, Any] = {
        "dropout": c.dropout,
        "cache_length": c.context,
        "attention_init": nn.initializers.normal(std),
        "attention_out_init": nn.initializers.normal(std * depth),
        "norm": c.norm,
        "rotary": c.positions == "rotary",
        "qk_norm": c.qk_norm,
        "attention_implementation": c.attention,
        "dtype": jnp.dtype(c.dtype),
    }
    if c.init == "gpt2":
        into_residual = nn.initializers.normal(INIT_STD * depth)
        is_dense = c.ffn == "dense"
        how["up_init"] = INIT if is_dense else Whole(INIT)
        how["down_init"] = into_residual if is_dense else Whole(into_residual)
    return how
