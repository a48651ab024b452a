"""Evaluation on a whole split, and restoring a run or an exported model to evaluate,
generate or export.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trix_jax import routing
from trix_jax.lm import checkpoint, config, export, origin
from trix_jax.lm.data import (
    Store,
    eval_batches,
    is_store,
    load_tokenizer,
    open_store,
)
from trix_jax.lm.step import make_eval_step
from trix_jax.nn.transformer import TransformerConfig, TransformerLM

ROUTES_KEPT = 131_072  # validation tokens whose tiles are remembered, to tell how stable the routing is


class Evaluation(NamedTuple):
    """Results on a split.

    Attributes:
        val_loss: nats a token.
        val_bits_per_byte: of the text's UTF-8 bytes, so that tokenizers compare.
        tile_usage: share of assignments a tile, a list a layer.
        routes: tiles of the first `ROUTES_KEPT` tokens, `uint16[layers, tokens, K]`.
    """

    val_loss: float
    val_ppl: float
    val_bits_per_byte: float
    tokens: int
    tile_usage: list[list[float]]
    entropy: list[float]
    max_load: list[float]
    dead_tiles: list[int]
    routes: np.ndarray


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
    model's context.
    """
    step = _compiled(model.config)
    loss, tokens, routes, kept = 0.0, 0.0, [], 0
    total = np.zeros((), np.float64)
    for batch, mask in eval_batches(
        store.val, batch_size=batch_size, context=model.config.context
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
    nats_per_byte = mean * store.val_tokens / store.val_bytes
    return Evaluation(
        val_loss=mean,
        val_ppl=math.exp(min(mean, 700.0)),
        val_bits_per_byte=nats_per_byte / math.log(2),
        tokens=int(tokens),
        tile_usage=(counts / jnp.maximum(counts.sum(-1, keepdims=True), 1)).tolist(),
        entropy=routing.usage_entropy(counts).tolist(),
        max_load=routing.max_load(counts).tolist() if counts.size else [],
        dead_tiles=routing.dead_tiles(counts).tolist() if counts.size else [],
        routes=np.concatenate(routes, axis=1),
    )


def load_run(
    directory: str | Path, step: str | int = "latest"
) -> tuple[TransformerLM, dict[str, Any], Any]:
    """Restores a run, or a model that `trix-jax export` wrote, in any process.

    Args:
        directory: a run directory, or an export directory (`model.safetensors`).
        step: of a run: "latest" (the newest good one), "best" or a number.

    Returns:
        the model, its variables (packed ones for an export), and the tokenizer.

    Raises:
        ValueError: no run there, or a config, tokenizer or checkpoint that is damaged
            or does not fit; says which.
    """
    directory = Path(directory)
    if export.is_export(directory):
        return export.load(directory)
    run = read_config(directory)
    model = TransformerLM(run.model)
    checkpoints = directory / "checkpoints"
    number = checkpoint.resolve(checkpoints, step)
    arrays = checkpoint.restore_arrays(checkpoints, number, ("params", "routing"))
    what, tokenizer = (
        f"checkpoint {number} of {directory}",
        directory / "tokenizer.json",
    )
    check_fits(run.model, arrays, what)
    loaded = load_tokenizer(tokenizer)
    origin.check(checkpoint.read_meta(checkpoints, number), run, tokenizer, what)
    variables = {
        name: jax.tree.map(jnp.asarray, tree) for name, tree in arrays.items() if tree
    }
    return model, variables, loaded


def resolve_step(directory: str | Path, step: str | int) -> int | None:
    """The number of a run's step ("latest", "best" or a number); None for an export."""
    directory = Path(directory)
    if export.is_export(directory):
        return None
    return checkpoint.resolve(directory / "checkpoints", step)


def open_run_data(directory: str | Path, data: str | Path | None = None) -> Store:
    """The token store to evaluate a run on: `data`, or the one it was trained on.

    Raises:
        ValueError: there is none, or its tokens are not the model's.
    """
    directory = Path(directory)
    if data is None:
        data = directory / "data"
        if not data.is_dir() and not export.is_export(directory):
            data = read_config(directory).data.path or data
    if not is_store(data):
        raise ValueError(
            f"data must name a token store (`trix-jax prepare`) to evaluate {directory} "
            f"on. Got {data}, which has no manifest.json."
        )
    store = open_store(data)
    own, other = (folder / "tokenizer.json" for folder in (directory, store.directory))
    if own.read_bytes() != other.read_bytes():
        raise ValueError(f"{data} was made with another tokenizer than {directory}'s.")
    return store


def read_config(directory: Path) -> config.RunConfig:
    """The resolved config of a run.

    Raises:
        ValueError: there is no run.
    """
    path = directory / "config.yaml"
    if not path.is_file():
        raise ValueError(
            f"{directory} must be a run directory, with a config.yaml, or an export. There is none."
        )
    return config.load(path)


def check_fits(model: TransformerConfig, variables: dict[str, Any], what: str) -> None:
    """Raises a ValueError unless the arrays have the names and shapes that the config
    gives.
    """
    expected = jax.eval_shape(
        lambda: TransformerLM(model).init(
            jax.random.key(0), jnp.zeros((1, model.context), jnp.int32)
        )
    )
    for name in ("params", "routing"):
        want = {
            jax.tree_util.keystr(k): v.shape
            for k, v in jax.tree_util.tree_leaves_with_path(expected.get(name, {}))
        }
        have = {
            jax.tree_util.keystr(k): v.shape
            for k, v in jax.tree_util.tree_leaves_with_path(variables.get(name) or {})
        }
        for key in sorted(want.keys() | have.keys()):
            if want.get(key) != have.get(key):
                raise ValueError(
                    f"{what} does not fit its config: {name}{key} should be {want.get(key)}. Got {have.get(key)}."
                )
