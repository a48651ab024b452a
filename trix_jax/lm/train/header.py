"""What a run is, in the lines that it begins with."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from trix_jax import grouped_ffn, ops
from trix_jax.lm.accounting import costs
from trix_jax.lm.config import RunConfig
from trix_jax.nn.activations import activation
from trix_jax.nn.transformer import TransformerConfig


def header(
    config: RunConfig,
    devices: Sequence[jax.Device],
    workdir: Path,
    start: int,
    spread: int = 1,
) -> list[str]:
    """A model's shape and size, what it trains on, and where it starts.

    Args:
        config: with its vocabulary.
        start: steps that are done.
        spread: devices that the tiles of a layer are spread over.
    """
    model, tokens = config.model, config.train.batch_size * config.model.context
    cost, steps = costs(model), config.train.steps
    shape = f"D={model.d_model}, layers {model.n_layers}, context {model.context}"
    width = cost.ffn_active / (2 * model.d_model * model.n_layers)
    bits = cost.ffn_bits + cost.routing_bits
    device, many = devices[0].device_kind, len(devices)
    on = f"{many} x {device}" if many > 1 else device
    where = f"from step {start}" if start else "from the start"
    products = products_text(config, many, spread)
    return [
        f"arm {config.arm}: {ffn_text(model)}; {shape}; {cost.total:,} parameters",
        f"FFN: {cost.ffn:,} parameters, compute of a dense one {width:.0f} wide, "
        f"{bits / 8 / 2**10:,.0f} KiB as served",
        *([f"tiles' products: {products}"] if products else []),
        f"{on}, {model.dtype}; "
        f"{steps:,} steps of {tokens:,} tokens, {steps * tokens:,} in all; "
        f"{config.train.optimizer}, rate {config.train.learning_rate:g}",
        f"{workdir}: {where}",
    ]


def products_text(config: RunConfig, devices: int, spread: int = 1) -> str | None:
    """What computes the products of the tiles in training, and why if it is XLA; None of
    an FFN without such tiles.
    """
    model, train = config.model, config.train
    if model.ffn not in ("sparse", "hierarchical"):
        return None
    sequences = train.batch_size // (train.accumulate * devices)
    shapes = grouped_ffn.Shapes(
        jnp.dtype(model.dtype),
        model.d_model,
        model.tile_width,
        model.num_tiles // spread,
        sequences * model.context * model.tiles_per_token,
        model.ternary.activations,
    )
    name = model.activation or "relu2"
    beside = "" if ops.knows(activation(name)) else f", {name} by xla"
    if model.implementation == "mosaic_gpu":
        return f"mosaic_gpu{beside}, as asked for"
    if model.implementation:
        return f"{model.implementation}, as asked for"
    reason = grouped_ffn.default_reason(shapes)
    return f"xla. {reason}" if reason else f"mosaic_gpu{beside}"


def ffn_text(model: TransformerConfig) -> str:
    """The FFN in a few words."""
    if model.ffn == "dense":
        return f"dense FFN, {model.dense_width} wide"
    chosen = f"{model.tiles_per_token} a token"
    chosen += " by hash" if model.routing.source == "hash" else ""
    chosen += ", another in every layer" if model.hash_per_layer else ""
    if s := model.routing.hash_sets:
        chosen += f", those of {model.routing.sets_per_token} of {s} sets"
    chosen += f", beside a real FFN of {model.shared_width}" * (model.shared_width > 0)
    if model.ffn == "lookup":
        return f"lookup FFN, {_tiles(model)}, {chosen}"
    return f"{model.ffn} FFN, {_tiles(model)} of {model.tile_width}, {chosen}"


def _tiles(model: TransformerConfig) -> str:
    return "1 tile" if model.num_tiles == 1 else f"{model.num_tiles} tiles"
