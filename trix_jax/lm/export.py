"""Packed models as files: `model.safetensors` with two-bit weights, `config.json`, `tokenizer.json`.

A ternary kernel is stored in the interchange format (`trix_kernels.packing`): tensor `NAME.bits`, uint8 `[..., out, in / 4]`,
with `NAME.scale`, bfloat16. Everything else is float32 under its own name; names are paths joined by dots and start with
their collection. The file's metadata holds the format's name and version and the unpacked width of every kernel.
"""

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from trix_jax.frozen import freeze
from trix_jax.lm import config as run_config
from trix_jax.lm.accounting import costs
from trix_jax.lm.data import load_tokenizer
from trix_jax.nn.kernel import PACKED
from trix_jax.nn.transformer import TransformerConfig, TransformerLM
from trix_jax.typing import Variables
from trix_kernels import packing

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"


def is_export(directory: Path) -> bool:
    """Whether a directory holds an exported model."""
    return (directory / WEIGHTS).is_file() and (directory / CONFIG).is_file()


def export(
    model: TransformerLM, variables: Variables, tokenizer: Any, directory: str | Path
) -> dict[str, int]:
    """Packs a trained model and writes `model.safetensors`, `config.json` and `tokenizer.json`.

    Args:
        directory: made if missing; files of these names are replaced.

    Returns:
        bytes of the FFN weights: `ffn_float32` as trained, `ffn_packed` as written, scales included in both.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokens = jnp.zeros((1, 1), jnp.int32)
    dense = model.config.ffn == "dense"
    frozen = (
        variables if dense or PACKED in variables else freeze(model, variables, tokens)
    )
    tensors, columns = to_tensors(model, frozen)
    metadata = {
        "format": packing.FORMAT_NAME,
        "version": str(packing.FORMAT_VERSION),
        "columns": json.dumps(columns),
    }
    tree = {
        "model_type": "trix_jax",
        "model": run_config.to_tree(run_config.RunConfig(model=model.config))["model"],
    }
    _write(directory / WEIGHTS, save(tensors, metadata=metadata))
    _write(directory / CONFIG, json.dumps(tree, indent=2).encode())
    tokenizer.save(directory / TOKENIZER)
    packed = sum(
        v.nbytes
        for name, v in tensors.items()
        if ".ffn." in name and not name.startswith("routing")
    )
    return {"ffn_float32": 4 * costs(model.config).ffn, "ffn_packed": packed}


def load(directory: str | Path) -> tuple[TransformerLM, dict[str, Any], Any]:
    """Reads what `export` wrote; the variables are packed, and evaluate as the trained ones did.

    Raises:
        ValueError: a file that is damaged, of another version, or does not fit its config; says which.
    """
    directory = Path(directory)
    model = TransformerLM(_read_model_config(directory / CONFIG))
    path = directory / WEIGHTS
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        wanted = (packing.FORMAT_NAME, str(packing.FORMAT_VERSION))
        if (found := (metadata.get("format"), metadata.get("version"))) != wanted:
            raise ValueError(f"format and version must be {wanted}. Got {found}.")
        variables = from_tensors(model, tensors)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
    return model, variables, load_tokenizer(directory / TOKENIZER)


def to_tensors(
    model: TransformerLM, variables: Variables
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Variables as named arrays in the interchange format, and the unpacked row length of every packed kernel."""
    flat = flatten_dict(dict(variables))
    shapes = kernel_shapes(model)
    tensors, columns = {}, {}
    for path, leaf in flat.items():
        value, name = np.asarray(leaf), ".".join(path)
        if path[0] == PACKED and path[-1] == "bits":
            rows = np.swapaxes(packing.unpack(value, shapes[path[1:-1]][-1]), -1, -2)
            tensors[name], columns[name] = (
                packing.pack(np.ascontiguousarray(rows)),
                rows.shape[-1],
            )
        elif path[-1] != "signature_sums" and not (
            path[0] == "routing" and _is_idle(path, flat, model)
        ):
            tensors[name] = np.array(value, order="C")
    return tensors, columns


def from_tensors(
    model: TransformerLM, tensors: dict[str, np.ndarray]
) -> dict[str, Any]:
    """The inverse of `to_tensors`; routing state that was left out starts anew.

    Raises:
        ValueError: names, shapes or codes that do not belong to the model.
    """
    shapes = kernel_shapes(model)
    flat: dict[tuple[str, ...], Any] = {}
    for name, value in tensors.items():
        path = tuple(name.split("."))
        if path[0] == PACKED and path[-1] == "bits":
            if path[1:-1] not in shapes:
                raise ValueError(f"{name} is no kernel of this model.")
            rows = shapes[path[1:-1]][-2]
            packing.check(value, rows)
            q = np.ascontiguousarray(np.swapaxes(packing.unpack(value, rows), -1, -2))
            flat[path] = jnp.asarray(packing.pack(q))
            if path[-2] == "up":
                flat[(*path[:-2], "signature_sums")] = jnp.asarray(
                    q.sum(axis=-1, dtype=np.int16)
                )
        else:
            flat[path] = jnp.asarray(value)
    return _complete(model, flat)


def kernel_shapes(model: TransformerLM) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Shapes of all kernels of a model by the path of their module."""
    params = flatten_dict(_abstract(model)["params"])
    return {
        path[:-1]: leaf.shape for path, leaf in params.items() if path[-1] == "kernel"
    }


def _abstract(model):
    return jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    )


def _is_idle(path, flat, model) -> bool:
    """Whether a leaf of the routing state does nothing in a frozen model: counts, and signatures that nobody holds."""
    held = model.config.routing.source == "random" or bool(
        np.any(flat[(*path[:-1], "frozen")])
    )
    return path[-1] == "counts" or (path[-1] == "signature" and not held)


def _complete(model, flat):
    """Checks every array against what the frozen model needs, and adds the routing state that files leave out."""
    want = dict(_abstract(model))
    needs_packing = any(path[0] == PACKED for path in flat)
    abstract = (
        jax.eval_shape(lambda v: freeze(model, v, jnp.zeros((1, 1), jnp.int32)), want)
        if needs_packing
        else want
    )
    need = flatten_dict(abstract)
    for path in sorted(need.keys() - flat.keys()):
        if path[0] == "routing" and path[-1] in ("counts", "signature"):
            flat[path] = jnp.zeros(need[path].shape, need[path].dtype)
    for path in sorted(need.keys() | flat.keys()):
        have = (
            f"{flat[path].dtype}{list(flat[path].shape)}" if path in flat else "nothing"
        )
        should = (
            f"{need[path].dtype}{list(need[path].shape)}" if path in need else "nothing"
        )
        if have != should:
            raise ValueError(f"{'.'.join(path)} should be {should}. Got {have}.")
    return unflatten_dict(flat)


def _read_model_config(path: Path) -> TransformerConfig:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return run_config.from_tree({"model": tree["model"]}).model
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not the config of an exported model: {error}"
        ) from error


def _write(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all."""
    building = path.with_name(f".{path.name}.tmp")
    building.write_bytes(data)
    os.replace(building, path)
