"""Causal self-attention with a key-value cache."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from trix_jax import ops
from trix_jax.nn import cudnn
from trix_jax.nn.cache import keep
from trix_jax.nn.inputs import as_floats, check_mask, hide
from trix_jax.nn.positions import positions_of, rotate
from trix_jax.nn.segments import check_segments
from trix_jax.nn.settings import check_divides
from trix_jax.typing import AnyArray, Array, Bool, Dtype, Float, Integer, Shaped

UNSEEN = -1e30  # added to a score; below every other, and finite
HIDDEN = jnp.iinfo(jnp.int32).min  # the segment of a masked token in the cache


class CausalSelfAttention(nn.Module):
    """Computes `softmax(q k^T / sqrt(E) + causal mask) v` over H heads.

    With `decode`, keys and values are appended to the collection `"cache"`, which holds
    up to `cache_length` tokens, and the call's tokens attend to everything before them:
    a prompt in one call, then a token a call, gives what one call over the whole
    sequence gives. A mask or segments belong to the first call too; a later call without
    segments goes on with that of the last real token.

    Attributes:
        d_model: D, the width of input and output.
        n_heads: H, a divisor of D.
        cache_length: longest sequence `decode` can hold.
        dropout: rate on the output, in training.
        kernel_init: of the projections.
        out_init: of the output's projection; None takes `kernel_init`.
        dtype: of the computation; None takes the input's.
        param_dtype: of the parameters.
        rotary: turns queries and keys by their positions in their segment (RoFormer).
        qk_norm: RMS norms, with a learned scale a head's width, of queries and keys
            (Dehghani et al., 2023, https://arxiv.org/abs/2302.05442).
        implementation: "auto" takes cuDNN where it runs (see `trix_jax.nn.cudnn`) and
            XLA elsewhere; a name runs exactly that, but for `decode`, which is XLA's. cuDNN's agrees with XLA's up to
            rounding, and has no forward mode.
    """

    d_model: int
    n_heads: int
    cache_length: int | None = None
    dropout: float = 0.0
    kernel_init: Callable = nn.initializers.normal(0.02)
    out_init: Callable | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    rotary: bool = False
    qk_norm: bool = False
    implementation: cudnn.AttentionKind = "auto"

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
            ValueError: a shape or a type that does not fit; more tokens than the cache
                holds, where their number is known.
            NotImplementedError: "cudnn" by name where it does not run, and why.
        """
        x = check_sequence(x, self.d_model, self.param_dtype)
        lead, (length, d) = x.shape[:-2], x.shape[-2:]
        shape = (math.prod(lead), length)
        mask = check_mask(mask, x.shape[:-1])
        segment_ids = check_segments(segment_ids, x.shape[:-1])
        x = hide(x, mask).reshape(*shape, d)
        flat = None if mask is None else mask.reshape(shape)
        ids = None if segment_ids is None else segment_ids.reshape(shape)
        q, k, v = self._project(x)
        if self.rotary:
            numbers = positions_of(self, shape, flat, ids, decode)
            q, k = rotate(q, numbers), rotate(k, numbers)
        is_plain = mask is None and ids is None
        if decode:
            y = attend(q, *self._append(k, v, flat, ids))
        elif cudnn.choose(self.implementation, q.dtype, q.shape[-1], is_plain):
            y = cudnn.attend(q, k, v)
        else:
            blocks = row_blocks(length, ops.platform())
            y = attend_back(q, k, v, visible(length, flat, ids), blocks)
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
        if self.rotary and width % 2:
            raise ValueError(
                f"d_model / n_heads must be even with rotary=True. Got {width}."
            )
        qkv = nn.DenseGeneral(
            (3, self.n_heads, width),
            use_bias=False,
            kernel_init=self.kernel_init,
            dtype=self.dtype or x.dtype,
            param_dtype=self.param_dtype,
            name="qkv",
        )
        q, k, v = jnp.moveaxis(qkv(x), -3, 0)
        if self.qk_norm:
            how = {"dtype": q.dtype, "param_dtype": self.param_dtype}
            q = nn.RMSNorm(name="query_norm", **how)(q)
            k = nn.RMSNorm(name="key_norm", **how)(k)
        return q, k, v

    def _append(self, k, v, mask, segment_ids):
        """Writes keys and values behind those of earlier calls; the mask lets a token
        see itself and what came before, of its segment.
        """
        if self.cache_length is None:
            raise ValueError("cache_length must be set to decode. Got None.")
        batch, length, *heads = k.shape
        shape = (batch, self.cache_length, *heads)
        keys = self.variable("cache", "keys", jnp.zeros, shape, k.dtype)
        values = self.variable("cache", "values", jnp.zeros, shape, v.dtype)
        index = self.variable("cache", "index", lambda: jnp.zeros((), jnp.int32))
        start = index.value
        check_room(start, length, self.cache_length)
        # Inside a jit that is not known: what does not fit is NaN, and all that sees it.
        v = jnp.where(start + length <= self.cache_length, v, jnp.nan)
        k = jax.lax.dynamic_update_slice_in_dim(keys.value, k, start, axis=1)
        v = jax.lax.dynamic_update_slice_in_dim(values.value, v, start, axis=1)
        keep(self, keys=k, values=v, index=start + length)
        now = start + jnp.arange(length)
        seen = (jnp.arange(self.cache_length)[None] <= now[:, None])[None]
        is_one = mask is None and segment_ids is None
        if not is_one or self.has_variable("cache", "segments"):
            seen &= self._append_segments((batch, length), start, mask, segment_ids)
        return k, v, seen[:, None]

    def _append_segments(self, shape, start, mask, segment_ids):
        """Writes the call's segments behind those of earlier calls, of which tokens
        without a mask have one, 0; returns which slots are of a token's segment.
        """
        size = (shape[0], self.cache_length)
        kept = self.variable("cache", "segments", jnp.zeros, size, jnp.int32)
        if segment_ids is None:
            slots = jnp.arange(self.cache_length)[None]
            real = (slots < start) & (kept.value != HIDDEN)
            last = jnp.max(jnp.where(real, slots, 0), axis=1, keepdims=True)
            last = jnp.take_along_axis(jnp.where(real, kept.value, 0), last, axis=1)
            segment_ids = jnp.broadcast_to(last, shape)
        ids = segment_ids.astype(jnp.int32)
        ids = ids if mask is None else jnp.where(mask, ids, HIDDEN)
        written = jax.lax.dynamic_update_slice_in_dim(kept.value, ids, start, axis=1)
        keep(self, segments=written)
        return ids[:, :, None] == written[:, None, :]


def rewind(cache: Any, length: Integer[Array, ""]) -> Any:
    """The `"cache"` of a model with only its first `length` slots written: the next call
    goes on there.

    For padding behind the real tokens of a call. Its mask has kept it out of all else.
    """

    def at(path, leaf):
        return length.astype(leaf.dtype) if path[-1].key == "index" else leaf

    return jax.tree_util.tree_map_with_path(at, cache)


def attend(
    q: Float[Array, "B rows H E"],
    k: Float[Array, "B L H E"],
    v: Float[Array, "B L H E"],
    seen: Bool[Array, "#B one rows L"],
) -> Float[Array, "B rows H E"]:
    """Computes `softmax(q k^T / sqrt(E)) v` over the keys that are seen, in float32 or
    wider.

    Heads go in front first, so that both products are plain batched ones: with 256
    tokens on a CPU more than twice as fast, backward pass included, as
    `jax.nn.dot_product_attention`. Its sum divides the output, which is smaller than
    the weights. A row that sees nothing gets the mean of all values.
    """
    q, k, v = (jnp.swapaxes(part, 1, 2) for part in (q, k, v))
    wide = {"preferred_element_type": jnp.promote_types(q.dtype, jnp.float32)}
    scores = jnp.einsum("bhqe,bhke->bhqk", q * q.shape[-1] ** -0.5, k, **wide)
    scores = scores + jnp.where(seen, 0.0, UNSEEN)
    best = scores.max(axis=-1, keepdims=True, initial=UNSEEN)
    weights = jnp.exp(scores - jax.lax.stop_gradient(best))
    total = weights.sum(axis=-1)[..., None]
    y = jnp.einsum("bhqk,bhke->bhqe", weights.astype(v.dtype), v, **wide) / total
    return jnp.swapaxes(y, 1, 2).astype(q.dtype)


def attend_back(
    q: Float[Array, "B L H E"],
    k: Float[Array, "B L H E"],
    v: Float[Array, "B L H E"],
    seen: Bool[Array, "#B one L L"],
    blocks: int,
) -> Float[Array, "B L H E"]:
    """Computes `attend` where no token sees a later one, its rows in blocks.

    A block meets the keys up to its own last row, so that of `n` equal blocks the work
    is `(n + 1) / 2n` of the whole. What is left out has weight 0: the result is equal up
    to rounding. A row that sees nothing gets the mean of the values its block meets.
    """
    if blocks == 1:
        return attend(q, k, v, seen)
    length = q.shape[1]
    ends = [length * i // blocks for i in range(blocks + 1)]
    parts = [
        attend(q[:, a:b], k[:, :b], v[:, :b], seen[:, :, a:b, :b])
        for a, b in pairwise(ends)
    ]
    return jnp.concatenate(parts, axis=1)


def row_blocks(length: Any, platform: str) -> int:
    """Blocks of rows in which a whole sequence attends: several where it is faster,
    which was measured on CPUs (`experiments.speed.forms`); one of a symbolic length.
    """
    if platform != "cpu" or not isinstance(length, int) or length < 128:
        return 1
    return 2 if length < 512 else 4


def visible(
    length: int,
    mask: Bool[Array, "B L"] | None,
    segment_ids: Integer[Array, "B L"] | None,
) -> Bool[Array, "#B one L L"]:
    """What a token sees: itself and what came before, of that the real tokens (True in
    `mask`) of its own segment.
    """
    seen = jnp.tri(length, dtype=bool)[None, None]
    if mask is not None:
        seen = seen & mask[:, None, None, :]
    if segment_ids is not None:
        seen = seen & (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    return seen


def check_room(start: Array, length: int, cache_length: int) -> None:
    """Raises a ValueError where the cache is known to be too short: what does not fit
    would overwrite what is there.
    """
    if not isinstance(start, jax.core.Tracer) and int(start) + length > cache_length:
        raise ValueError(
            f"the cache holds {cache_length} tokens. Got {length} after {int(start)}: "
            "start a new cache with the last ones."
        )


def check_sequence(
    x: Shaped[AnyArray, "..."], d_model: int, param_dtype: Dtype = jnp.float32
) -> Float[Array, "..."]:
    """The input as floats.

    Raises:
        ValueError: it is not `[..., length, d_model]`.
    """
    x = jnp.asarray(x)
    if x.ndim < 2 or x.shape[-1] != d_model:
        raise ValueError(
            f"x must be [..., length, {d_model}], with d_model as its last axis. Got {list(x.shape)}."
        )
    return as_floats(x, param_dtype)
