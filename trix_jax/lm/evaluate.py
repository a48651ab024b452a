"""Evaluation on a whole split, and restoring a run or an exported model to evaluate, generate or export."""

import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from trix_jax import routing
from trix_jax.lm import checkpoint, config, export
from trix_jax.lm.data import Store, eval_batches, load_tokenizer
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
def _compiled(model: TransformerLM) -> Callable:
    return jax.jit(make_eval_step(model))


def evaluate(
    model: TransformerLM,
    variables: Any,
    store: Store,
    batch_size: int = 64,
    progress: float = 1.0,
) -> Evaluation:
    """Evaluates on every token of the validation split but the first, in windows of the model's context."""
    step = _compiled(model)
    loss, tokens, counts, routes, kept = 0.0, 0.0, 0.0, [], 0
    for batch, mask in eval_batches(
        store.val, batch_size=batch_size, context=model.config.context
    ):
        sums = jax.device_get(step(variables, batch, mask, progress))
        loss, tokens, counts = (
            loss + float(sums.loss),
            tokens + float(sums.tokens),
            counts + sums.counts,
        )
        if kept < ROUTES_KEPT:
            seen = sums.tiles[:, np.asarray(mask, bool).reshape(-1)][
                :, : ROUTES_KEPT - kept
            ]
            routes.append(seen.astype(np.uint16))
            kept += seen.shape[1]
    mean = loss / tokens
    nats_per_byte = mean * store.val_tokens / store.val_bytes
    return Evaluation(
        val_loss=mean,
        val_ppl=math.exp(min(mean, 700.0)),
        val_bits_per_byte=nats_per_byte / math.log(2),
        tokens=int(tokens),
        tile_usage=(
            counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)
        ).tolist(),
        entropy=np.asarray(routing.usage_entropy(counts)).tolist(),
        max_load=np.asarray(routing.max_load(counts)).tolist() if counts.size else [],
        dead_tiles=np.asarray(routing.dead_tiles(counts)).tolist()
        if counts.size
        else [],
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
        ValueError: no run there, or a config, tokenizer or checkpoint that is damaged or does not fit; says which.
    """
    directory = Path(directory)
    if export.is_export(directory):
        return export.load(directory)
    run = read_config(directory)
    model = TransformerLM(run.model)
    checkpoints = directory / "checkpoints"
    number = checkpoint.resolve(checkpoints, step)
    arrays = checkpoint.restore_arrays(checkpoints, number, ("params", "routing"))
    check_fits(run.model, arrays, f"checkpoint {number} of {directory}")
    variables = {
        name: jax.tree.map(jax.numpy.asarray, tree)
        for name, tree in arrays.items()
        if tree
    }
    return model, variables, load_tokenizer(directory / "tokenizer.json")


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
    return config.from_tree(config.read_yaml(path))


def check_fits(model: TransformerConfig, variables: dict[str, Any], what: str) -> None:
    """Raises a ValueError unless the arrays have the names and shapes that the config gives."""
    expected = jax.eval_shape(
        lambda: TransformerLM(model).init(
            jax.random.key(0), np.zeros((1, model.context), np.int32)
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
