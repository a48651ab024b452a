"""Causal self-attention with a key-value cache."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from trix_jax.nn.settings import check_divides
from trix_jax.typing import Array, Dtype, Float


class CausalSelfAttention(nn.Module):
    """Computes `softmax(q k^T / sqrt(E) + causal mask) v` over H heads, by
    `jax.nn.dot_product_attention`.

    With `decode`, keys and values are appended to the collection `"cache"`, which holds
    up to `cache_length` tokens, and the call's tokens attend to everything before them:
    a prompt in one call, then a token a call, gives what one call over the whole
    sequence gives.

    Attributes:
        d_model: D, the width of input and output.
        n_heads: H, a divisor of D.
        cache_length: longest sequence `decode` can hold.
        dropout: rate on the output, in training.
        kernel_init: of the projections.
        out_init: of the output's projection; None takes `kernel_init`.
        dtype: of the computation; None takes the input's.
        param_dtype: of the parameters.
    """

    d_model: int
    n_heads: int
    cache_length: int | None = None
    dropout: float = 0.0
    kernel_init: Callable = nn.initializers.normal(0.02)
    out_init: Callable | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], train: bool = False, decode: bool = False
    ) -> Float[Array, "B L D"]:
        width = check_divides("d_model", self.d_model, "n_heads", self.n_heads)
        common = {
            "use_bias": False,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }
        qkv = nn.DenseGeneral(
            (3, self.n_heads, width), kernel_init=self.kernel_init, name="qkv", **common
        )(x)
        q, k, v = jnp.moveaxis(qkv, -3, 0)
        if decode:
            k, v, mask = self._append(k, v)
            y = jax.nn.dot_product_attention(q, k, v, mask=mask)
        else:
            y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        out = nn.DenseGeneral(
            self.d_model,
            axis=(-2, -1),
            kernel_init=self.out_init or self.kernel_init,
            name="out",
            **common,
        )
        return nn.Dropout(self.dropout)(out(y), deterministic=not train)

    def _append(self, k, v):
        """Writes keys and values behind those of earlier calls; the mask lets a token
        see itself and what came before.
        """
        if self.cache_length is None:
            raise ValueError("cache_length must be set to decode. Got None.")
        batch, length, *heads = k.shape
        shape = (batch, self.cache_length, *heads)
        keys = self.variable("cache", "keys", jnp.zeros, shape, k.dtype)
        values = self.variable("cache", "values", jnp.zeros, shape, v.dtype)
        index = self.variable("cache", "index", lambda: jnp.zeros((), jnp.int32))
        start = index.value
        keys.value = jax.lax.dynamic_update_slice(keys.value, k, (0, start, 0, 0))
        values.value = jax.lax.dynamic_update_slice(values.value, v, (0, start, 0, 0))
        index.value = start + length
        now = start + jnp.arange(length)
        seen = jnp.arange(self.cache_length)[None] <= now[:, None]
        return keys.value, values.value, seen[None, None]
