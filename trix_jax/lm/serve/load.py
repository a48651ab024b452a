"""Restores a run, or a model that `trix-jax export` wrote, to evaluate, generate or
export.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from trix_jax.lm import config
from trix_jax.lm.checkpoint import checkpoint
from trix_jax.lm.data import (
    Store,
    is_store,
    load_tokenizer,
    open_store,
)
from trix_jax.lm.serve import export
from trix_jax.lm.train import provenance
from trix_jax.lm.train.exported import is_export
from trix_jax.nn.transformer import TransformerConfig, TransformerLM


def load_run(
    directory: str | Path, step: str | int = "latest"
) -> tuple[TransformerLM, dict[str, Any], Any]:
    """Restores a run, or a model that `trix-jax export` wrote, in any process.

    Args:
        directory: a run directory, or an export directory (`model.safetensors`).
        step: of a run: "latest" (the newest good one), "best" or a number.

    Returns:
        the model, its variables (packed ones for an export), and the tokenizer. Kernels
            that it was trained with by name are taken where they run.

    Raises:
        ValueError: no run there, or a config, tokenizer or checkpoint that is damaged
            or does not fit; says which.
    """
    directory = Path(directory)
    if is_export(directory):
        if step != "latest":
            raise ValueError(
                f"{directory} is an export, which has no steps. Got {step}."
            )
        return export.load(directory)
    run = read_config(directory)
    model = TransformerLM(run.model.on_any_device())
    checkpoints = directory / "checkpoints"
    number = checkpoint.resolve(checkpoints, step)
    arrays = checkpoint.restore_arrays(checkpoints, number, ("params", "routing"))
    what, tokenizer = (
        f"checkpoint {number} of {directory}",
        directory / "tokenizer.json",
    )
    check_fits(run.model, arrays, what)
    loaded = load_tokenizer(tokenizer)
    meta = checkpoint.read_meta(checkpoints, number)
    provenance.check(meta, run, tokenizer, number, what)
    variables = {
        name: jax.tree.map(jnp.asarray, tree) for name, tree in arrays.items() if tree
    }
    return model, variables, loaded


def resolve_step(directory: str | Path, step: str | int) -> int | None:
    """The number of a run's step ("latest", "best" or a number); None for an export."""
    directory = Path(directory)
    if is_export(directory):
        return None
    read_config(directory)  # says so where there is no run
    return checkpoint.resolve(directory / "checkpoints", step)


def eval_batch_size(directory: str | Path) -> int:
    """Sequences in an evaluation batch of a run; of an export 64."""
    directory = Path(directory)
    return 64 if is_export(directory) else read_config(directory).train.eval_batch_size


def eval_tokens(directory: str | Path) -> int:
    """Validation tokens of a run's evaluations, from the first; 0, as of an export: all."""
    directory = Path(directory)
    return 0 if is_export(directory) else read_config(directory).train.eval_tokens


def open_run_data(directory: str | Path, data: str | Path | None = None) -> Store:
    """The token store to evaluate a run on: `data`, or the one it was trained on.

    Raises:
        ValueError: there is none, its tokens are not the model's, or the one it was
            trained on is gone or was made again since.
    """
    directory, is_own = Path(directory), data is None
    if data is None:
        data = directory / "data"
        named = None if is_export(directory) else read_config(directory).data.path
        if named and (is_store(named) or not data.is_dir()):
            data = named
    if not is_store(data):
        raise ValueError(
            f"data must name a token store (`trix-jax prepare`) to evaluate {directory} "
            f"on. Got {data}, which has no manifest.json."
        )
    store = open_store(data)
    own, other = (folder / "tokenizer.json" for folder in (directory, store.directory))
    if own.read_bytes() != other.read_bytes():
        raise ValueError(f"{data} was made with another tokenizer than {directory}'s.")
    if is_own:
        _check_unchanged(directory, store)
    return store


def _check_unchanged(directory: Path, store: Store) -> None:
    checkpoints = directory / "checkpoints"
    steps = checkpoint.steps(checkpoints) if checkpoints.is_dir() else []
    good = checkpoint.newest_good(checkpoints, report=lambda _: None) if steps else None
    meta = {} if good is None else checkpoint.read_meta(checkpoints, good)
    if meta.get("data_fingerprint", store.fingerprint) != store.fingerprint:
        raise ValueError(
            f"{store.directory} is not the data that {directory} was trained on: it is "
            "another store, or was made again since. To evaluate on it all the same: "
            f"--data {store.directory}."
        )


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
    lm = TransformerLM(model.on_any_device())
    expected = jax.eval_shape(
        lambda: lm.init(jax.random.key(0), jnp.zeros((1, model.context), jnp.int32))
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
