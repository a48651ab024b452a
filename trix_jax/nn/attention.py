"""Causal self-attention with a key-value cache."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from trix_jax.nn.inputs import as_floats, check_mask, hide
from trix_jax.nn.settings import check_divides
from trix_jax.typing import AnyArray, Array, Bool, Dtype, Float, Shaped


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
        self,
        x: Shaped[AnyArray, "..."],
        train: bool = False,
        decode: bool = False,
        *,
        mask: Shaped[AnyArray, "..."] | None = None,
        segment_ids: Shaped[AnyArray, "..."] | None = None,
    ) -> Float[Array, "..."]:
        """Applies the layer to `[..., length, d_model]`.

        Args:
            x: the sequence is on the last axis but one.
            train: dropout on.
            decode: append to the collection `"cache"`.
            mask: `[..., length]`, True for real tokens; the others are attended to by
                none and get 0.
            segment_ids: `[..., length]` integers; tokens see those of their own number.

        Raises:
            ValueError: a shape or a type that does not fit.
            NotImplementedError: `mask` or `segment_ids` with `decode`.
        """
        x = check_sequence(x, self.d_model, self.param_dtype)
        lead, (length, d) = x.shape[:-2], x.shape[-2:]
        mask = check_mask(mask, x.shape[:-1])
        if segment_ids is not None and segment_ids.shape != x.shape[:-1]:
            raise ValueError(
                f"segment_ids must be {list(x.shape[:-1])}, a number a token. Got {list(segment_ids.shape)}."
            )
        if decode and (mask is not None or segment_ids is not None):
            raise NotImplementedError(
                "mask and segment_ids do not go with decode=True: the cache keeps neither."
            )
        x = hide(x, mask).reshape(math.prod(lead), length, d)
        q, k, v = self._project(x)
        if decode:
            k, v, seen = self._append(k, v)
            y = attend(q, k, v, mask=seen)
        else:
            seen = visible(mask, segment_ids, (x.shape[0], length))
            y = attend(q, k, v, mask=seen, is_causal=True)
        y = nn.DenseGeneral(
            d,
            axis=(-2, -1),
            use_bias=False,
            kernel_init=self.out_init or self.kernel_init,
            dtype=y.dtype,
            param_dtype=self.param_dtype,
            name="out",
        )(y)
        y = hide(y.reshape(*lead, length, d), mask)
        return nn.Dropout(self.dropout)(y, deterministic=not train)

    def _project(self, x):
        """Queries, keys and values, `[B, L, H, E]`."""
        width = check_divides("d_model", self.d_model, "n_heads", self.n_heads)
        qkv = nn.DenseGeneral(
            (3, self.n_heads, width),
            use_bias=False,
            kernel_init=self.kernel_init,
            dtype=self.dtype or x.dtype,
            param_dtype=self.param_dtype,
            name="qkv",
        )
        return jnp.moveaxis(qkv(x), -3, 0)

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


def attend(q, k, v, **how):
    """`jax.nn.dot_product_attention`, of float16 in float32: on CPUs it has no other."""
    if q.dtype != jnp.float16:
        return jax.nn.dot_product_attention(q, k, v, **how)
    wide = (part.astype(jnp.float32) for part in (q, k, v))
    return jax.nn.dot_product_attention(*wide, **how).astype(q.dtype)


def visible(
    mask: Bool[Array, "..."] | None,
    segment_ids: Shaped[AnyArray, "..."] | None,
    shape: tuple,
) -> Bool[Array, "B one rows L"] | None:
    """What a token may see beside the causal rule: real tokens, and of its own segment.

    Args:
        mask: True for real tokens.
        segment_ids: a number a token.
        shape: B and L.
    """
    seen = None if mask is None else mask.reshape(shape)[:, None, None, :]
    if segment_ids is None:
        return seen
    ids = jnp.asarray(segment_ids).reshape(shape)
    same = (ids[:, :, None] == ids[:, None, :])[:, None]
    return same if seen is None else same & seen


def check_sequence(
    x: Shaped[AnyArray, "..."], d_model: int, param_dtype: Dtype = jnp.float32
) -> Float[Array, "..."]:
    """The input as floats.

    Raises:
        ValueError: it is not `[..., length, d_model]`.
    """
    if x.ndim < 2 or x.shape[-1] != d_model:
        raise ValueError(
            f"x must be [..., length, {d_model}], with d_model as its last axis. Got {list(x.shape)}."
        )
    return as_floats(x, param_dtype)
