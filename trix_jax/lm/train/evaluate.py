"""Evaluation on a whole split, and restoring a run or an exported model to evaluate,
generate or export.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trix_jax import routing
from trix_jax.lm.data import (
    Store,
    eval_batches,
)
from trix_jax.lm.train.step import make_eval_step
from trix_jax.nn.transformer import TransformerConfig, TransformerLM
from trix_jax.ops import PACKED
from trix_jax.ternary import as_served, is_as_served

ROUTES_KEPT = 131_072  # validation tokens whose tiles are remembered, to tell how stable the routing is


class Evaluation(NamedTuple):
    """Results on a split, of the weights as they are served.

    Attributes:
        val_loss: nats a token.
        val_loss_unquantized: of the weights that training computes with, where they are
            others: before late quantization, in soft mode and in progressive mode
            before its end; None where they are the same.
        val_bits_per_byte: of the text's UTF-8 bytes, so that tokenizers compare; None of
            tokens whose text is not known.
        tile_usage: share of assignments a tile, a list a layer.
        routes: tiles of the first `ROUTES_KEPT` tokens, `uint16[layers, tokens, K]`.
    """

    val_loss: float
    val_ppl: float
    val_bits_per_byte: float | None
    tokens: int
    tile_usage: list[list[float]]
    entropy: list[float]
    max_load: list[float]
    dead_tiles: list[int]
    routes: np.ndarray
    val_loss_unquantized: float | None = None


@lru_cache(maxsize=8)
def _compiled(config: TransformerConfig) -> Callable:
    return jax.jit(make_eval_step(TransformerLM(config)))


def evaluate(
    model: TransformerLM,
    variables: Any,
    store: Store,
    batch_size: int = 64,
    progress: float = 1.0,
    context: int | None = None,
) -> Evaluation:
    """Evaluates on every token of the validation split but the first, in windows of the
    model's context, as the model will be served: ternary weights are ternary, whatever
    training computes with at `progress`.

    Args:
        context: length of the windows, L; None: the model's.

    Raises:
        ValueError: a context that the model has no positions for, or longer than the
            split.
    """
    context = model.config.context if context is None else context
    config = at_context(model.config, context)
    how = variables, store, batch_size, context, progress
    result = _evaluate(_served(config), *how)
    if PACKED in variables or trains_as_served(config, progress):
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
    has_latent = config.ffn in ("sparse", "hierarchical")
    return not has_latent or is_as_served(config.ternary, progress)


def _served(config: TransformerConfig) -> TransformerConfig:
    return dataclasses.replace(config, ternary=as_served(config.ternary))


def _evaluate(
    config: TransformerConfig,
    variables: Any,
    store: Store,
    batch_size: int,
    context: int,
    progress: float,
) -> Evaluation:
    step = _compiled(config)
    loss, tokens, routes, kept = 0.0, 0.0, [], 0
    total = np.zeros((), np.float64)
    for batch, mask in eval_batches(store.val, batch_size=batch_size, context=context):
        sums = jax.device_get(step(variables, batch, mask, progress))
        loss, tokens = loss + float(sums.loss), tokens + float(sums.tokens)
        total = total + sums.counts
        if kept < ROUTES_KEPT:
            seen = sums.tiles[:, np.asarray(mask, bool).reshape(-1)]
            routes.append(seen[:, : ROUTES_KEPT - kept].astype(np.uint16))
            kept += routes[-1].shape[1]
    counts = jnp.asarray(total, jnp.float32)
    mean = loss / tokens
    return Evaluation(
        val_loss=mean,
        val_ppl=math.exp(min(mean, 700.0)),
        val_bits_per_byte=_bits_per_byte(mean, store),
        tokens=int(tokens),
        tile_usage=(counts / jnp.maximum(counts.sum(-1, keepdims=True), 1)).tolist(),
        entropy=routing.usage_entropy(counts).tolist(),
        max_load=routing.max_load(counts).tolist() if counts.size else [],
        dead_tiles=routing.dead_tiles(counts).tolist() if counts.size else [],
        routes=np.concatenate(routes, axis=1),
    )


def _bits_per_byte(mean: float, store: Store) -> float | None:
    if not store.val_bytes:
        return None
    return mean * store.val_tokens / store.val_bytes / math.log(2)
