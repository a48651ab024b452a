"""A decoder-only language model with any of the three TriX FFNs or the dense one."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from trix_jax import routing
from trix_jax.nn.block import (
    Block,
    DenseBlock,
    HierarchicalTriXBlock,
    SparseLookupBlock,
    SparseTriXBlock,
    make_norm,
)
from trix_jax.nn.inputs import check_mask
from trix_jax.nn.kernel import Whole
from trix_jax.nn.positions import positions_of
from trix_jax.nn.segments import segments_of
from trix_jax.nn.tiles import Aux
from trix_jax.nn.token_input import TokenInput
from trix_jax.nn.transformer_config import TransformerConfig as TransformerConfig
from trix_jax.routing import RoutingInfo
from trix_jax.typing import (
    AnyArray,
    Array,
    AxisName,
    Float,
    Integer,
    Scalar,
    Shaped,
)

INIT_STD = 0.02  # GPT-2's
INIT = nn.initializers.normal(INIT_STD)


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
            ValueError: tokens of another rank, a sequence longer than the context, a mask or segments of
                another shape.
        """
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        if jnp.ndim(tokens) != 2:
            raise ValueError(
                f"tokens must be [batch, length]. Got {list(jnp.shape(tokens))}."
            )
        v = _vocabulary(c, tokens.shape[1])
        embed = nn.Embed(v, c.d_model, embedding_init=INIT, dtype=dtype, name="embed")
        mask = check_mask(mask, tokens.shape)
        tokens = jnp.asarray(tokens)
        apart = c.document_mask, c.end_token
        segment_ids = segments_of(self, tokens, segment_ids, mask, decode, *apart)
        if mask is not None:  # NaN is the row of no token, and the residual keeps it
            tokens = jnp.where(mask, tokens, 0)
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
            x, info, aux = run(block, x, self._hashed_in(i, how))
            infos.append(info)
            losses.append(aux)
        mean = jax.tree.map(lambda *layers: jnp.mean(jnp.stack(layers)), *losses)
        return x, tuple(infos), mean

    def _hashed_in(self, i: int, how: dict[str, Any]) -> dict[str, Any]:
        """What the i-th block is given; its own ids where every layer hashes for itself."""
        if not self.config.hash_per_layer:
            return how
        ids = routing.layer_ids(how["token_ids"], i, _vocabulary(self.config, 1))
        return {**how, "token_ids": ids}


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
    common |= {"routing": c.routing, "shared_width": c.shared_width}
    if c.ffn == "lookup":
        splines = c.grid_size, c.compress_hidden, c.ternary_splines
        common |= {"top_k_clusters": c.top_k_clusters, "tiles_per_token": k}
        if c.reads == "own":
            common |= {"reads": c.reads, "ternary": c.ternary}
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
        is_fixed = c.ternary.rule == "fixed" and c.ternary.mode != "none"
        if is_dense or not is_fixed:  # whose threshold is far above 0.02
            how["up_init"] = INIT if is_dense else Whole(INIT)
            how["down_init"] = into_residual if is_dense else Whole(into_residual)
        how["shared_init"] = INIT, into_residual
    return how
