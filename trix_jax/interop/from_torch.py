"""PyTorch TriX checkpoints as arrays that `trix_jax.interop.original` computes with.

`torch_to_safetensors.py` makes the file, in any Python that has torch. Here its tensors
keep their names, but for `tiles.0.up_weight, tiles.1.up_weight, ...`, which become one
array `tiles.up_weight`, and the splines likewise. `save` packs the ternary weights to
the interchange format, two bits each; `load` reads that back, with the same forward.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from trix_jax.files import write_json, write_whole
from trix_jax.interop import original
from trix_jax.typing import Array
from trix_kernels import packing

FORMAT, VERSION = "trix-original", 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
# The bare "weight" is TriXLinear's: weights of other layers have a name before it.
TERNARY = re.compile(
    r"^weight$|(^|\.)((up|down)_proj\.weight|tiles\.(up|down)_weight)$"
)
FFNS = {
    "sparse": original.sparse_ffn,
    "hierarchical": original.hierarchical_ffn,
    "lookup": original.lookup_ffn,
}
# An array that only this kind of layer has, by its name inside the layer.
MARKS = {
    "up_proj.weight": "sparse",
    "tiles.up_weight": "hierarchical",
    "splines.coeffs": "lookup",
    "scales": "linear",
}


class Imported(NamedTuple):
    """A PyTorch TriX model.

    Attributes:
        kind: "linear", "sparse", "hierarchical", "lookup", or "lm".
        ffn: the kind of the FFN in it.
        arrays: by the original's names; tiles and splines stacked.
        settings: sizes that the arrays do not tell by themselves.
    """

    kind: str
    ffn: str
    arrays: dict[str, Array]
    settings: dict[str, int]


def apply(imported: Imported, x: Array) -> Any:
    """The forward pass in evaluation mode.

    Args:
        x: tokens `[B, L]` for a language model, otherwise vectors `[T, D]`.

    Returns:
        outputs and chosen tiles (a list a block for a language model); for "linear"
        outputs.
    """
    kind, ffn, arrays, settings = imported
    if kind == "linear":
        return original.linear(arrays, x, settings)
    if kind == "lm":
        return original.language_model(arrays, x, settings, FFNS[ffn])
    return FFNS[ffn](arrays, x, settings)


def read(path: str | Path, **settings: int | None) -> Imported:
    """Reads what `torch_to_safetensors.py` wrote, a layer or a whole language model.

    Args:
        path: the file.
        **settings: `num_tiles`, `n_heads`, `top_k_clusters`, where the checkpoint does
            not say.

    Raises:
        ValueError: not such a file, a layer that is none of the four, or a setting
            missing.
    """
    metadata, tensors = _open(path)
    if metadata.get("format") != "trix-pytorch":
        raise ValueError(
            f"{path} must be made by torch_to_safetensors.py. Got format {metadata.get('format')!r}."
        )
    about = json.loads(metadata["about"]).get("config") or {}
    arrays = {name: jnp.asarray(value) for name, value in _stack(tensors).items()}
    is_model = "token_emb.weight" in arrays
    layer = original.inner(arrays, "blocks.0.ffn") if is_model else arrays
    ffn = next((kind for mark, kind in MARKS.items() if mark in layer), None)
    if ffn is None or (is_model and ffn not in FFNS):
        raise ValueError(
            f"{path} must hold a TriXLinear, SparseTriXFFN, HierarchicalTriXFFN, "
            f"SparseLookupFFN, or a language model of them. Got {sorted(layer)[:4]}."
        )
    given = {k: v for k, v in settings.items() if v is not None}
    return Imported(
        "lm" if is_model else ffn,
        ffn,
        arrays,
        _settings(ffn, arrays, layer, is_model, {**about, **given}),
    )


def save(imported: Imported, directory: str | Path) -> dict[str, int]:
    """Writes `model.safetensors`, ternary weights packed, and `config.json`.

    Returns:
        bytes of the ternary weights, `float32` and `packed`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors, columns = {}, {}
    arrays = {**imported.arrays, **_signatures(imported)}
    for name, value in arrays.items():
        if threshold := _threshold(name, arrays):
            rows = np.asarray(original.q(value, threshold))
            tensors[f"{name}.bits"] = packing.pack(rows)
            columns[name] = rows.shape[-1]
        else:
            tensors[name] = np.array(value, order="C")
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "columns": json.dumps(columns),
    }
    write_whole(directory / WEIGHTS, to_bytes(tensors, metadata=metadata))
    tree = {
        "model_type": FORMAT,
        "kind": imported.kind,
        "ffn": imported.ffn,
        "settings": imported.settings,
    }
    write_json(directory / CONFIG, tree)
    packed = sum(t.nbytes for name, t in tensors.items() if name.endswith(".bits"))
    return {"float32": sum(arrays[name].nbytes for name in columns), "packed": packed}


def load(directory: str | Path) -> Imported:
    """Reads what `save` wrote; the latent weights are gone, the forward is the same.

    Raises:
        ValueError: a file that is damaged or of another format.
    """
    directory = Path(directory)
    metadata, tensors = _open(directory / WEIGHTS)
    if (found := (metadata.get("format"), metadata.get("version"))) != (
        FORMAT,
        str(VERSION),
    ):
        raise ValueError(f"{directory} must hold an imported model. Got {found}.")
    columns = json.loads(metadata["columns"])
    for name, row in columns.items():
        bits = tensors.pop(f"{name}.bits")
        packing.check(bits, row)
        tensors[name] = packing.unpack(bits, row, np.float32)
    arrays = {name: jnp.asarray(value) for name, value in tensors.items()}
    tree = json.loads((directory / CONFIG).read_text("utf-8"))
    return Imported(tree["kind"], tree["ffn"], arrays, tree["settings"])


def _open(path):
    try:
        with safe_open(path, "numpy") as file:
            return file.metadata() or {}, {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error


def _stack(tensors):
    """`...tiles.7.up_weight` and its like as one array `...tiles.up_weight`."""
    groups: dict[str, dict[int, np.ndarray]] = {}
    flat = {}
    for name, value in tensors.items():
        if match := re.match(r"(.*\b(?:tiles|splines))\.(\d+)\.(.+)$", name):
            groups.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = value
        else:
            flat[name] = value
    stacked = {n: np.stack([g[i] for i in range(len(g))]) for n, g in groups.items()}
    return flat | stacked


def _settings(ffn, arrays, layer, is_model, known):
    """Integers that the arrays do not carry in their shapes."""
    found: dict[str, Any] = {"top_k_clusters": known.get("top_k_clusters", 1)}
    if ffn in ("linear", "sparse"):
        found["num_tiles"] = _num_tiles(ffn, layer, known.get("num_tiles"))
    if ffn == "hierarchical" and "cluster_assignments" not in layer:
        raise ValueError(
            "cluster_assignments must be in the checkpoint of a HierarchicalTriXFFN: the "
            "original makes them, at random, in its first forward pass. Got none."
        )
    if ffn == "hierarchical":
        clusters = int(layer["cluster_assignments"].max()) + 1
        if not 1 <= (top_k := found["top_k_clusters"]) <= clusters:
            raise ValueError(
                f"top_k_clusters must be at least 1 and at most the {clusters} clusters. Got {top_k}."
            )
    if ffn == "lookup":
        found["num_clusters"] = int(layer["cluster_assignments"].max()) + 1
    if is_model:
        found["n_heads"] = known.get("n_heads")
        found["n_layers"] = len(
            {n.split(".")[1] for n in arrays if n.startswith("blocks.")}
        )
    missing = [name for name, value in found.items() if value is None]
    if missing:
        raise ValueError(f"{missing[0]} must be given: the checkpoint does not say.")
    return found


def _num_tiles(ffn, layer, given):
    """As the checkpoint says, or else as given; None where neither does."""
    ema = layer.get("ema_signatures")
    number = given if ema is None else ema.shape[0]
    if given not in (None, number):
        raise ValueError(
            f"num_tiles must be {number}, as the checkpoint says. Got {given}."
        )
    rows = layer["weight" if ffn == "linear" else "up_proj.weight"].shape[0]
    if number is not None and (number < 1 or rows % number):
        raise ValueError(
            f"num_tiles must divide the {rows} rows of the checkpoint's matrix. Got {number}."
        )
    return number


def _signatures(imported):
    """Signatures that the original reads off latent weights, which packing leaves
    behind.
    """
    read, num_tiles = {}, imported.settings.get("num_tiles")
    for name, value in imported.arrays.items():
        prefix = name.rpartition(".")[0]
        if name.endswith("up_proj.weight") or name == "weight":
            key = f"{prefix}.cached_signatures".removeprefix(".")
            read[key] = original.row_signatures(value, num_tiles)
        elif name.endswith("tiles.up_weight"):
            key = f"{prefix.removesuffix('tiles')}ema_tile_signatures"
            read[key] = original.tile_signatures(value)
    kept = {key: imported.arrays[key] for key in read if key in imported.arrays}
    return read | kept  # what was loaded has no latent weights to read them off


def _threshold(name, arrays):
    """The threshold of a ternary array; None for one that stays real."""
    if name.endswith("splines.coeffs"):
        scale = name.replace("coeffs", "scale")
        return original.SPLINE_THRESHOLD if scale in arrays else None
    return 0.5 if TERNARY.search(name) else None
