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
) -> Evaluation:
    """Evaluates on every token of the validation split but the first, in windows of the
    model's context, as the model will be served: ternary weights are ternary, whatever
    training computes with at `progress`.
    """
    config = model.config
    result = _evaluate(_served(config), variables, store, batch_size, progress)
    if PACKED in variables or trains_as_served(config, progress):
        return result
    trained = _evaluate(config, variables, store, batch_size, progress)
    return result._replace(val_loss_unquantized=trained.val_loss)


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
    progress: float,
) -> Evaluation:
    step = _compiled(config)
    loss, tokens, routes, kept = 0.0, 0.0, [], 0
    total = np.zeros((), np.float64)
    for batch, mask in eval_batches(
        store.val, batch_size=batch_size, context=config.context
    ):
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
