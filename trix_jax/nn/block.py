"""Pre-norm transformer blocks around the FFNs, the dense one for comparison included."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn

from trix_jax.nn.attention import CausalSelfAttention
from trix_jax.nn.hierarchical_ffn import HierarchicalTriXFFN
from trix_jax.nn.sparse_ffn import SparseTriXFFN
from trix_jax.nn.sparse_lookup_ffn import SparseLookupFFN
from trix_jax.nn.tiles import Aux, activation, check_input
from trix_jax.routing import RoutingConfig, RoutingInfo
from trix_jax.ternary import TernaryConfig
from trix_jax.typing import Array, AxisName, Dtype, Float, Integer, Scalar


class DenseFFN(nn.Module):
    """Computes `act(x @ W_up) @ W_down`: the baseline, called like the others; it has
    no routing info and no losses.
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
        x: Float[Array, "*B D"],
        train: bool = False,
        *,
        progress: Scalar = 1.0,
        token_ids: Integer[Array, "*B"] | None = None,
        router_input: Float[Array, "*B D"] | None = None,
    ) -> tuple[Float[Array, "*B D"], None, Aux]:
        check_input(x, self.d_model)
        common = {
            "use_bias": False,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }
        default = nn.initializers.lecun_normal()
        h = activation(self.activation)(
            nn.Dense(
                self.width, kernel_init=self.up_init or default, name="up", **common
            )(x)
        )
        y = nn.Dense(
            self.d_model, kernel_init=self.down_init or default, name="down", **common
        )(h)
        return (
            nn.Dropout(self.dropout)(y, deterministic=not train),
            None,
            {"total_aux": jnp.zeros(())},
        )


class Block(nn.Module):
    """Computes `x = x + attention(norm(x))`, `x = x + ffn(norm(x))`; returns `(x,
    routing_info, aux_losses)`.

    Subclasses name the FFN and repeat its attributes. Norms are layer norms without
    bias.

    Attributes:
        d_model: D.
        n_heads: H, a divisor of D.
        dropout: rate behind the attention and the FFN, in training.
        cache_length: longest sequence that `decode` can hold.
        attention_init, attention_out_init: of the attention's projections.
    """

    d_model: int
    n_heads: int
    dropout: float = dataclasses.field(default=0.0, kw_only=True)
    cache_length: int | None = dataclasses.field(default=None, kw_only=True)
    attention_init: Callable = dataclasses.field(
        default=nn.initializers.normal(0.02), kw_only=True
    )
    attention_out_init: Callable | None = dataclasses.field(default=None, kw_only=True)
    up_init: Callable | None = dataclasses.field(default=None, kw_only=True)
    down_init: Callable | None = dataclasses.field(default=None, kw_only=True)
    dtype: Dtype | None = dataclasses.field(default=None, kw_only=True)
    param_dtype: Dtype = dataclasses.field(default=jnp.float32, kw_only=True)
    axis_name: AxisName | None = dataclasses.field(default=None, kw_only=True)
    tile_axis: str | None = dataclasses.field(default=None, kw_only=True)

    FFN: ClassVar[type[nn.Module]] = DenseFFN

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        train: bool = False,
        decode: bool = False,
        *,
        progress: Scalar = 1.0,
        token_ids: Integer[Array, "B L"] | None = None,
        router_input: Float[Array, "B L D"] | None = None,
    ) -> tuple[Float[Array, "B L D"], RoutingInfo | None, Aux]:
        norm = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}
        attention = CausalSelfAttention(
            self.d_model,
            self.n_heads,
            self.cache_length,
            self.dropout,
            self.attention_init,
            self.attention_out_init,
            self.dtype,
            self.param_dtype,
            name="attention",
        )
        x = x + attention(nn.LayerNorm(name="attention_norm", **norm)(x), train, decode)
        own = {field.name for field in dataclasses.fields(self.FFN)} - {
            "name",
            "parent",
        }
        shared = {name: getattr(self, name) for name in own if hasattr(self, name)}
        ffn = self.FFN(**shared, name="ffn")
        y, info, aux = ffn(
            nn.LayerNorm(name="ffn_norm", **norm)(x),
            train,
            progress=progress,
            token_ids=token_ids,
            router_input=router_input,
        )
        return x + y, info, aux


class DenseBlock(Block):
    """A block with `DenseFFN`."""

    width: int = 512
    activation: str = "gelu"
    FFN: ClassVar[type[nn.Module]] = DenseFFN


class SparseTriXBlock(Block):
    """A block with `SparseTriXFFN`, whose attributes it takes after `d_model` and
    `n_heads`.
    """

    num_tiles: int = 4
    expansion: int = 4
    tiles_per_token: int = 1
    activation: str = "relu2"
    ternary: TernaryConfig = TernaryConfig()
    routing: RoutingConfig = RoutingConfig()
    FFN: ClassVar[type[nn.Module]] = SparseTriXFFN


class HierarchicalTriXBlock(Block):
    """A block with `HierarchicalTriXFFN`, whose attributes it takes after `d_model` and
    `n_heads`.
    """

    d_hidden: int | None = None
    num_tiles: int = 64
    tiles_per_cluster: int = 8
    top_k_clusters: int = 1
    tiles_per_token: int = 1
    activation: str = "relu2"
    ternary: TernaryConfig = TernaryConfig()
    routing: RoutingConfig = RoutingConfig()
    FFN: ClassVar[type[nn.Module]] = HierarchicalTriXFFN


class SparseLookupBlock(Block):
    """A block with `SparseLookupFFN`, whose attributes it takes after `d_model` and
    `n_heads`.
    """

    num_tiles: int = 64
    tiles_per_cluster: int = 8
    grid_size: int = 16
    compress_hidden: int | None = None
    ternary_splines: bool = True
    routing: RoutingConfig = RoutingConfig()
    FFN: ClassVar[type[nn.Module]] = SparseLookupFFN
