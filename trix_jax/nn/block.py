"""Pre-norm transformer blocks around the FFNs, the dense one for comparison included."""

import dataclasses
from collections.abc import Callable
from typing import Literal, get_args

import jax.numpy as jnp
from flax import linen as nn

from trix_jax.nn.activations import activation
from trix_jax.nn.attention import CausalSelfAttention, check_sequence
from trix_jax.nn.cudnn import AttentionKind
from trix_jax.nn.hierarchical_ffn import HierarchicalTriXFFN
from trix_jax.nn.inputs import check_input, check_mask, hide
from trix_jax.nn.settings import LayerArguments, TileArguments, TileSettings
from trix_jax.nn.sparse_ffn import SparseTriXFFN
from trix_jax.nn.sparse_lookup_ffn import Reads, SparseLookupFFN
from trix_jax.nn.tiles import Aux
from trix_jax.routing import RoutingConfig, RoutingInfo
from trix_jax.ternary import TernaryConfig
from trix_jax.typing import AnyArray, Array, Dtype, Float, Scalar, Shaped

Norm = Literal["layer", "rms"]


def make_norm(kind: Norm, name: str, **how) -> nn.Module:
    """A layer norm without bias, or an RMS norm (Zhang and Sennrich, 2019,
    https://arxiv.org/abs/1910.07467).
    """
    if kind not in get_args(Norm):
        raise ValueError(
            f"norm must be one of {', '.join(get_args(Norm))}. Got {kind!r}."
        )
    if kind == "rms":
        return nn.RMSNorm(name=name, **how)
    return nn.LayerNorm(use_bias=False, name=name, **how)


class DenseFFN(nn.Module):
    """Computes `act(x @ W_up) @ W_down`: the baseline, called like the others; it has
    no routing info and no losses.

    Attributes:
        d_model: D, the width of input and output.
        width: hidden width.
        activation: "relu2", "relu", "gelu" or "silu".
        dropout: rate on the output, in training.
        up_init, down_init: of the two matrices; None takes `lecun_normal`.
        dtype: of the computation; None takes the input's.
        param_dtype: of the parameters.
    """

    d_model: int
    width: int
    activation: str = "gelu"
    dropout: float = 0.0
    up_init: Callable | None = None
    down_init: Callable | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

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
    ) -> tuple[Float[Array, "..."], None, Aux]:
        x = check_input(x, self.d_model, self.param_dtype)
        mask = check_mask(mask, x.shape[:-1])
        common = {
            "use_bias": False,
            "dtype": self.dtype or x.dtype,
            "param_dtype": self.param_dtype,
        }
        default = nn.initializers.lecun_normal()
        up = nn.Dense(
            self.width, kernel_init=self.up_init or default, name="up", **common
        )
        down = nn.Dense(
            self.d_model, kernel_init=self.down_init or default, name="down", **common
        )
        y = hide(down(activation(self.activation)(up(hide(x, mask)))), mask)
        y = nn.Dropout(self.dropout)(y, deterministic=not train)
        return y, None, {"total_aux": jnp.zeros(())}


class Block(LayerArguments):
    """Computes `x = x + attention(norm(x))`, `x = x + ffn(norm(x))`; returns `(x,
    routing_info, aux_losses)`.

    Subclasses build the FFN. They repeat its positional arguments, whose order after
    `d_model` and `n_heads` is public; the others are keywords of `LayerArguments` and
    `TileArguments`, of which a block ignores those its FFN does not have.

    Attributes:
        d_model: D, the width of input and output.
        n_heads: H, a divisor of D.
        dropout: rate behind the attention and the FFN, in training.
        cache_length: longest sequence that `decode` can hold.
        attention_init, attention_out_init: of the attention's projections.
        norm: "layer" norms without bias, or "rms" norms.
        rotary, qk_norm: see `CausalSelfAttention`.
        attention_implementation: its `implementation`.
        shared_width: hidden width of a `DenseFFN` of real weights beside the FFN, on the
            same input, added for every token: DeepSeekMoE's shared expert (Dai et al.,
            2024, https://arxiv.org/abs/2401.06066), beside ternary ones as in MoTE
            (2025, https://arxiv.org/abs/2506.14435). Its activation is gelu. 0 is none.
        shared_init: of its two matrices; None takes `lecun_normal`.
    """

    d_model: int
    n_heads: int
    _: dataclasses.KW_ONLY
    dropout: float = 0.0
    cache_length: int | None = None
    attention_init: Callable = nn.initializers.normal(0.02)
    attention_out_init: Callable | None = None
    norm: Norm = "layer"
    rotary: bool = False
    qk_norm: bool = False
    attention_implementation: AttentionKind = "auto"
    shared_width: int = 0
    shared_init: tuple[Callable, Callable] | None = None

    @nn.compact
    def __call__(
        self,
        x: Shaped[AnyArray, "..."],
        train: bool = False,
        decode: bool = False,
        *,
        progress: Scalar | None = None,
        token_ids: Shaped[AnyArray, "..."] | None = None,
        router_input: Shaped[AnyArray, "..."] | None = None,
        mask: Shaped[AnyArray, "..."] | None = None,
        segment_ids: Shaped[AnyArray, "..."] | None = None,
    ) -> tuple[Float[Array, "..."], RoutingInfo | None, Aux]:
        """Applies the block to `[..., length, d_model]`; `mask` and `segment_ids` as in
        `CausalSelfAttention`, the others as in `SparseTriXFFN`.
        """
        x = check_sequence(x, self.d_model, self.param_dtype)
        x = x.astype(self.dtype or x.dtype)
        mask = check_mask(mask, x.shape[:-1])
        how = {"dtype": x.dtype, "param_dtype": self.param_dtype}
        attention = CausalSelfAttention(
            self.d_model,
            self.n_heads,
            self.cache_length,
            self.dropout,
            self.attention_init,
            self.attention_out_init,
            self.dtype,
            self.param_dtype,
            self.rotary,
            self.qk_norm,
            self.attention_implementation,
            name="attention",
        )
        h = make_norm(self.norm, "attention_norm", **how)(hide(x, mask))
        x = x + attention(h, train, decode, mask=mask, segment_ids=segment_ids)
        h = make_norm(self.norm, "ffn_norm", **how)(hide(x, mask))
        y, info, aux = self._ffn()(
            h,
            train,
            progress=progress,
            token_ids=token_ids,
            router_input=router_input,
            mask=mask,
        )
        if self.shared_width:
            y = y + self._shared()(h, train, mask=mask)[0]
        return x + y, info, aux

    def _shared(self) -> nn.Module:
        """The FFN that is always on."""
        up, down = self.shared_init or (None, None)
        return DenseFFN(
            self.d_model,
            self.shared_width,
            dropout=self.dropout,
            up_init=up,
            down_init=down,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="shared",
        )

    def _ffn(self) -> nn.Module:
        """Builds the FFN, under the name "ffn"."""
        raise NotImplementedError(f"{type(self).__name__} must build its FFN.")


class DenseBlock(Block):
    """A block with `DenseFFN`."""

    width: int = 512
    activation: str = "gelu"

    def _ffn(self):
        how = self.activation, self.dropout, self.up_init, self.down_init
        dtypes = self.dtype, self.param_dtype
        return DenseFFN(self.d_model, self.width, *how, *dtypes, name="ffn")


class SparseTriXBlock(TileArguments, Block):
    """A block with `SparseTriXFFN`, whose arguments it takes after `d_model` and
    `n_heads`.
    """

    num_tiles: int = 4
    expansion: int = 4
    tiles_per_token: int = 1

    def _ffn(self):
        sizes = self.d_model, self.num_tiles, self.expansion, self.tiles_per_token
        how = self.tile_arguments()
        return SparseTriXFFN(*sizes, self.dropout, **how, name="ffn")


class HierarchicalTriXBlock(TileArguments, Block):
    """A block with `HierarchicalTriXFFN`, whose arguments it takes after `d_model` and
    `n_heads`.
    """

    d_hidden: int | None = None
    num_tiles: int = 64
    tiles_per_cluster: int = 8
    top_k_clusters: int = 1
    tiles_per_token: int = 1

    def _ffn(self):
        sizes = self.d_model, self.d_hidden, self.num_tiles, self.tiles_per_cluster
        chosen = self.top_k_clusters, self.tiles_per_token
        how = self.tile_arguments()
        return HierarchicalTriXFFN(*sizes, *chosen, self.dropout, **how, name="ffn")


class SparseLookupBlock(Block):
    """A block with `SparseLookupFFN`, whose arguments it takes after `d_model` and
    `n_heads`.
    """

    num_tiles: int = 64
    tiles_per_cluster: int = 8
    grid_size: int = 16
    compress_hidden: int | None = None
    ternary_splines: bool = True
    routing: RoutingConfig = TileSettings.routing
    top_k_clusters: int = 1
    tiles_per_token: int = 1
    reads: Reads = "shared"
    ternary: TernaryConfig = TileSettings.ternary

    def _ffn(self):
        sizes = self.d_model, self.num_tiles, self.tiles_per_cluster
        splines = self.grid_size, self.compress_hidden, self.ternary_splines
        return SparseLookupFFN(
            *sizes,
            *splines,
            self.dropout,
            routing=self.routing,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            axis_name=self.axis_name,
            top_k_clusters=self.top_k_clusters,
            tiles_per_token=self.tiles_per_token,
            reads=self.reads,
            ternary=self.ternary,
            name="ffn",
        )
