"""Evaluation on a split, or on its first tokens, where the variables are.

A batch is under way while the sums of the one before come back; the tiles of tokens stay
on the devices.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import lru_cache
from itertools import count
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from trix_jax import routing
from trix_jax.lm.data import Store, eval_batches, eval_targets
from trix_jax.lm.train import eval_step
from trix_jax.lm.train.eval_step import Placement
from trix_jax.nn.transformer import TransformerConfig, TransformerLM
from trix_jax.ops import PACKED
from trix_jax.ternary import is_as_served
from trix_jax.typing import Array

ROUTES_KEPT = 131_072  # validation tokens whose tiles are remembered, to tell how stable the routing is


class Evaluation(NamedTuple):
    """Results on a split, of the weights as they are served.

    Attributes:
        val_loss: nats a token.
        val_loss_unquantized: of the weights that training computes with, where they are
            others: before late quantization, in soft mode and in progressive mode
            before its end; None where they are the same.
        val_bits_per_byte: of the text's UTF-8 bytes, so that tokenizers compare; None of
            tokens whose text is not known. Tokens have as many bytes as those of the
            whole split, also where a part of it is evaluated.
        tokens: that were predicted.
        tile_usage: share of assignments a tile, a list a layer.
        routes: tiles of the first `ROUTES_KEPT` tokens, `uint16[layers, tokens, K]`, on
            the devices of the variables.
    """

    val_loss: float
    val_ppl: float
    val_bits_per_byte: float | None
    tokens: int
    tile_usage: list[list[float]]
    entropy: list[float]
    max_load: list[float]
    dead_tiles: list[int]
    routes: jax.Array
    val_loss_unquantized: float | None = None


def evaluate(
    model: TransformerLM,
    variables: Any,
    store: Store,
    batch_size: int = 64,
    progress: float = 1.0,
    context: int | None = None,
    most: int = 0,
) -> Evaluation:
    """Evaluates on every token of the validation split but the first, in windows of the
    model's context, as the model will be served: ternary weights are ternary, whatever
    training computes with at `progress`.

    Variables stay where they are; where they lie on a mesh of devices, in whole or in
    parts, all of these evaluate (`trix_jax.lm.train.eval_step`).

    Args:
        context: length of the windows, L; None: the model's.
        most: tokens to predict, the first of the split, rounded up to whole windows; 0
            takes all.

    Raises:
        ValueError: a context that the model has no positions for, or longer than the
            split; variables on several meshes.
    """
    context = model.config.context if context is None else context
    config = at_context(model.config, context)
    is_same = trains_as_served(config, progress)
    variables, placement = eval_step.settle(variables)
    now = jax.device_put(progress, placement.everywhere)
    how = variables, placement, store, batch_size, context, now, most
    result = _evaluate(config.as_served(), *how)
    if PACKED in variables or is_same:
        return result
    trained = _evaluate(config, *how)
    return result._replace(val_loss_unquantized=trained.val_loss)


def longest_context(config: TransformerConfig) -> int | None:
    """The longest sequence that a model has positions for; None: any length."""
    return config.context if config.positions == "learned" else None


def at_context(config: TransformerConfig, context: int) -> TransformerConfig:
    """The config with which a trained model takes sequences of `context` tokens.

    Raises:
        ValueError: it has no positions for them.
    """
    longest = longest_context(config)
    if context < 1 or (longest is not None and context > longest):
        rule = "be at least 1"
        if longest is not None:
            rule = f"be 1 to {longest}: the model learned no positions beyond"
        raise ValueError(f"context must {rule}. Got {context}.")
    return dataclasses.replace(config, context=max(context, config.context))


def trains_as_served(config: TransformerConfig, progress: float) -> bool:
    """Whether training computes at `progress` with the weights that are served."""
    has_latent = config.has_ternary_products
    return not has_latent or is_as_served(config.ternary, progress)


def _evaluate(
    config: TransformerConfig,
    variables: Any,
    placement: Placement,
    store: Store,
    batch_size: int,
    context: int,
    progress: Array,
    most: int,
) -> Evaluation:
    step = eval_step.compiled(config, placement)
    kept = min(ROUTES_KEPT, eval_targets(store.val, context, most))
    total, late = Total(), None
    routes: Any = None
    size = {"batch_size": batch_size, "context": context}
    batches = eval_batches(store.val, **size, most=most)
    for start, rows in zip(count(0, batch_size * context), batches):
        sums = step(variables, *eval_step.put(placement, *rows), progress)
        if start < kept:
            routes = _with_routes(routes, sums.tiles, start, kept, placement)
        total, late = total.plus(late), sums[:3]
    total = total.plus(late)
    counts, mean = jnp.asarray(total.counts, jnp.float32), total.loss / total.tokens
    return Evaluation(
        val_loss=mean,
        val_ppl=perplexity(mean),
        val_bits_per_byte=_bits_per_byte(mean, store),
        tokens=int(total.tokens),
        tile_usage=(counts / jnp.maximum(counts.sum(-1, keepdims=True), 1)).tolist(),
        entropy=routing.usage_entropy(counts).tolist(),
        max_load=routing.max_load(counts).tolist() if counts.size else [],
        dead_tiles=routing.dead_tiles(counts).tolist() if counts.size else [],
        routes=routes[:, :kept],
    )


def perplexity(loss: float) -> float:
    """`exp(loss)`, of at most 700 nats, above which no float holds it."""
    return math.exp(min(loss, 700.0))


class Total(NamedTuple):
    """Sums over batches, in float64 on the host."""

    loss: float = 0.0
    tokens: float = 0.0
    counts: np.ndarray | float = 0.0

    def plus(self, sums: tuple[Array, Array, Array] | None) -> "Total":
        """With another batch, fetched now; as it is with None."""
        if sums is None:
            return self
        loss, tokens, counts = jax.device_get(sums)
        counts = self.counts + counts.astype(np.float64)
        return Total(self.loss + float(loss), self.tokens + float(tokens), counts)


def _with_routes(
    routes: Array | None, tiles: Array, start: int, kept: int, placement: Placement
) -> Array:
    """The tiles of all tokens so far and of a batch's, which begin at `start`; of all
    that are kept, and what fills up the last batch.
    """
    layers, size, k = tiles.shape
    where = placement.everywhere
    if routes is None:
        shape = (layers, -(-kept // size) * size + size, k)
        routes = jnp.zeros(shape, tiles.dtype, device=where)
    return _writer(where)(routes, tiles, jax.device_put(np.int32(start), where))


@lru_cache(maxsize=8)
def _writer(everywhere: Sharding | None) -> Callable:
    def write(routes, tiles, start):
        return jax.lax.dynamic_update_slice_in_dim(routes, tiles, start, axis=1)

    return jax.jit(write, donate_argnums=0, out_shardings=everywhere)


def _bits_per_byte(mean: float, store: Store) -> float | None:
    if not store.val_bytes:
        return None
    return mean * store.val_tokens / store.val_bytes / math.log(2)
