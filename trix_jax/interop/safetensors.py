"""Packed models as a safetensors file, ternary kernels in the interchange format.

A ternary kernel is a tensor `NAME.bits`, uint8 `[..., out, ceil(in / 4)]` as
`trix_kernels.packing` defines it, with `NAME.scale`, bfloat16. Everything else is
stored under its own name. Names are paths joined by dots and start with their
collection; parameters, and gates in a table of routes, may be bfloat16. The file's
metadata holds the format's name and version and, as `columns`, the unpacked row length
of every kernel.
"""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from trix_jax import ops
from trix_jax.files import write_whole
from trix_jax.frozen import freeze
from trix_jax.nn.route_table import (
    GATES,
    TILES,
    layers_by_token,
    table_shapes,
    tables_in,
)
from trix_jax.nn.transformer import TransformerLM
from trix_jax.ops import PACKED
from trix_jax.routing import MARGINS
from trix_jax.ternary import Ternary
from trix_jax.typing import Variables
from trix_kernels import packing

LOOKED_UP = ("tile_read", "tile_write")  # kernels of which layers take single rows

RealDtype = Literal["float32", "bfloat16"]


def write(
    path: Path,
    model: TransformerLM,
    variables: Variables,
    dtype: RealDtype = "float32",
) -> dict[str, int]:
    """Writes frozen variables; returns the bytes of every tensor by name.

    Args:
        dtype: of the parameters in the file, and of the gates of a table of routes.
            bfloat16 rounds them. Nothing is wider than float32.
    """
    tensors, columns = to_tensors(model, variables)
    tensors = {
        name: value.astype(np.float32) if value.dtype == np.float64 else value
        for name, value in tensors.items()
    }  # biases, where `jax_enable_x64` is set
    if dtype == "bfloat16":
        tensors = {
            name: value.astype(jnp.bfloat16) if _is_rounded(name.split(".")) else value
            for name, value in tensors.items()
        }
    metadata = {
        "format": packing.FORMAT_NAME,
        "version": str(packing.FORMAT_VERSION),
        "columns": json.dumps(columns),
    }
    write_whole(path, save(tensors, metadata=metadata))
    return {name: tensor.nbytes for name, tensor in tensors.items()}


def _is_rounded(path: Sequence[str]) -> bool:
    """Whether a file may hold this array in bfloat16."""
    return path[0] == "params" or tuple(path[-2:]) == ("router", GATES)


def stored(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors of a file as they are stored, by name, and its metadata."""
    with safe_open(path, "numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, file.metadata() or {}


def read(path: Path, model: TransformerLM) -> dict[str, Any]:
    """Reads variables that fit the model, parameters in its own dtype.

    Raises:
        ValueError: a file that is damaged, of another version, or of another model.
    """
    try:
        tensors, metadata = stored(path)
        wanted = (packing.FORMAT_NAME, str(packing.FORMAT_VERSION))
        if (found := (metadata.get("format"), metadata.get("version"))) != wanted:
            raise ValueError(f"format and version must be {wanted}. Got {found}.")
        return from_tensors(model, tensors)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be used: {error}") from error


def to_tensors(
    model: TransformerLM, variables: Variables
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Variables as named arrays in the interchange format, and the unpacked row length
    of every packed kernel.
    """
    flat: dict[tuple[str, ...], Any] = flatten_dict(nn.unbox(dict(variables)))
    shapes = kernel_shapes(model)
    tensors, columns = {}, {}
    for path, leaf in flat.items():
        value, name = np.asarray(leaf), ".".join(path)
        if path[0] == PACKED and path[-1] == "bits":
            held = ops.Packed(leaf, flat[(*path[:-1], "scale")])
            q = np.asarray(ops.unpack(held, shapes[path[1:-1]][-1]).q, np.int8)
            rows = np.swapaxes(q, -1, -2)
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
            scale = tensors.get(f"{name.removesuffix('bits')}scale")
            if scale is None:
                raise ValueError(f"{name} must have a scale beside it. Got none.")
            ternary = Ternary(jnp.asarray(q, jnp.float32), jnp.asarray(scale))
            flat[path] = ops.pack(ternary, by_row=path[-2] in LOOKED_UP).bits
            table = ".".join((*path[:-2], "router", TILES))
            is_read = model.config.routing.source != "hash" and table not in tensors
            if path[-2] == "up" and is_read:
                flat[(*path[:-2], "signature_sums")] = jnp.asarray(
                    q.sum(axis=-1, dtype=np.int16)
                )
        else:
            flat[path] = jnp.asarray(value)
    with jax.enable_x64(False):  # files have no wider numbers
        return _complete(model, flat)


def kernel_shapes(model: TransformerLM) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Shapes of all kernels of a model by the path of their module."""
    params: dict = flatten_dict(_abstract(model)["params"])
    return {
        path[:-1]: leaf.shape for path, leaf in params.items() if path[-1] == "kernel"
    }


def _abstract(model):
    return jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    )


def _is_idle(path, flat, model) -> bool:
    """Whether a leaf of the routing state does nothing in a frozen model: margins,
    signatures and rows that nobody holds or that a table stands for.
    """
    tables = tables_in(flat)
    if (path[-1] == "signature" and path[1:-1] in tables) or (
        path[-1] == "rows" and tables
    ):
        return True
    held = model.config.routing.source == "random" or any(
        np.any(flat.get((*path[:-1], name), False)) for name in ("frozen", "held")
    )
    kept = path[-1] in ("signature", "rows")
    return path[-1] in MARGINS or (kept and not held)


def _expect_tables(need, flat, model):
    """Adds the tables of routes that a file has to what is needed, and checks that they
    name tiles that are there.
    """
    for path in tables_in(flat):
        layer = (PACKED, *path[:-1])
        by_token = layers_by_token(model.config)
        known = [f"block_{i:02d}" for i in range(by_token)]
        if path[0] not in known or ("routing", *path, "bias") not in need:
            raise ValueError(f"{'.'.join(path)} must not have a table of routes.")
        need.pop((*layer, "signature_sums"), None)
        for name, shape in table_shapes(model.config).items():
            need[(PACKED, *path, name)] = shape
        tiles, count = flat[(PACKED, *path, TILES)], model.config.num_tiles
        if tiles.size and int(tiles.max()) >= count:
            raise ValueError(
                f"{'.'.join(path)}.{TILES} must name tiles below {count}. Got {tiles.max()}."
            )


def _complete(model, flat):
    """Checks every array against what the frozen model needs, and adds the routing
    state that files leave out.
    """
    want = dict(_abstract(model))
    needs_packing = any(path[0] == PACKED for path in flat)
    if needs_packing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # shapes alone: nothing is frozen here
            want = jax.eval_shape(
                lambda v: freeze(model, v, jnp.zeros((1, 1), jnp.int32)), want
            )
    need: dict = flatten_dict(want)
    _expect_tables(need, flat, model)
    for path in need.keys() & flat.keys():
        if _is_rounded(path) and flat[path].dtype == jnp.bfloat16:
            flat[path] = flat[path].astype(need[path].dtype)
    for path in sorted(need.keys() - flat.keys()):
        if path[0] == "routing" and _is_idle(path, flat, model):
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
