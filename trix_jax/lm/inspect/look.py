"""What a trained model's routing and weights look like, as plain numbers that JSON can
hold.
"""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from trix_jax import ops
from trix_jax.lm.accounting import costs
from trix_jax.lm.checkpoint import checkpoint
from trix_jax.lm.data import Store
from trix_jax.lm.inspect.routes import has_signatures, layer_states, route
from trix_jax.lm.serve.load import load_run, resolve_step
from trix_jax.lm.train import metrics
from trix_jax.lm.train.exported import is_export
from trix_jax.ops import PACKED
from trix_jax.routing import Source
from trix_jax.ternary import TernaryConfig, hard_ternary
from trix_jax.typing import Variables

TEXT_TOKENS = 1280  # shown as coloured text
SEEN_TOKENS = 16_384  # over which tiles are described
WORDS = 8  # tokens that describe a tile


def look(
    directory: str | Path, store: Store, step: str | int = "latest"
) -> dict[str, Any]:
    """Everything that `write_page` shows.

    Args:
        directory: a run or an export.
        store: its data; the start of the validation split is looked at.
        step: of a run.

    Returns:
        `name`, `model`, `history` (of a run), `tokens`, and a dict a layer in `layers`.

    Raises:
        ValueError: a dense model, which has no tiles.
    """
    directory = Path(directory)
    model, variables, tokenizer = load_run(directory, step)
    if model.config.ffn == "dense":
        raise ValueError(f"{directory} must be of a TriX arm. Got a dense model.")
    ids = store.val.window(0, min(SEEN_TOKENS + 1, len(store.val)))
    seen = route(model, variables, ids)
    ids = ids[: len(seen.losses)]
    before = _earlier(directory, model, step)
    shown = slice(0, TEXT_TOKENS)
    return {
        "name": directory.name,
        "step": resolve_step(directory, step),
        "model": _model(model.config, seen.routing),
        "history": _history(directory),
        "tokens": [tokenizer.decode([int(i)]) for i in ids[shown]],
        "context": model.config.context,
        "losses": [_finite(round(float(v), 3)) for v in seen.losses[shown]],
        "layers": [
            {
                "tiles": seen.tiles[i, shown].tolist(),
                **_tiles(seen.tiles[i], ids, model.config.num_tiles, tokenizer),
                **_routing(state, model.config.routing.source),
                **_weights(model.config, variables, before, name),
            }
            for i, ((name, *_), state) in enumerate(layer_states(seen.routing).items())
        ],
    }


def _model(c, routing) -> dict[str, Any]:
    stored = [has_signatures(state) for state in layer_states(routing).values()]
    is_table = c.routing.source != "hash" and not all(stored)
    cost = costs(c, "table" if is_table else "signatures")
    return {
        "ffn": c.ffn,
        "d_model": c.d_model,
        "n_layers": c.n_layers,
        "num_tiles": c.num_tiles,
        "tiles_per_token": c.tiles_per_token,
        "tile_width": c.tile_width if c.ffn != "lookup" else None,
        "context": c.context,
        "parameters": cost.total,
        "ffn_parameters": cost.ffn,
        "ffn_bits": cost.ffn_bits,
        "ffn_active": cost.ffn_active,
        "routing_bits": cost.routing_bits,
    }


def _history(directory: Path) -> list[dict[str, Any]]:
    """The evaluations of a run, in order; an export has none."""
    path = directory / "metrics.jsonl"
    if not path.is_file():
        return []
    keys = ("val_loss", "tile_usage", "routing_stability")
    evals = {
        e["step"]: {"step": e["step"], **{k: _finite(e[k]) for k in keys}}
        for e in metrics.read(path)
        if e["event"] == "eval"
    }
    return [evals[step] for step in sorted(evals)]


def _finite(value: Any) -> Any:
    """A number, or lists of them, with None for what JSON cannot hold."""
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return value if value is not None and math.isfinite(value) else None


def _tiles(tiles, ids, count, tokenizer) -> dict[str, Any]:
    """Loads, and the tokens that a tile reads more than its share of."""
    base = Counter(ids.tolist())
    usage, words = [], []
    for tile in range(count):
        here = ids[(tiles == tile).any(axis=1)]
        usage.append(len(here) / max(len(tiles) * tiles.shape[1], 1))
        own = Counter(here.tolist())
        expected = len(here) / len(tiles)
        # The excess over what an indifferent tile would read, so that rare tokens do
        # not win.
        excess = {i: n - expected * base[i] for i, n in own.items()}
        best = sorted(excess, key=lambda i: -excess[i])[:WORDS]
        words.append(
            [[tokenizer.decode([i]), own[i] / base[i]] for i in best if excess[i] > 0]
        )
    return {"usage": usage, "words": words}


def _routing(state, source: Source) -> dict[str, Any]:
    without = "hash" if source == "hash" else "table"
    signature = np.asarray(state["signature"], np.float32)
    unit = signature / np.maximum(
        np.linalg.norm(signature, axis=1, keepdims=True), 1e-6
    )
    members = np.asarray(state["members"]).tolist() if "members" in state else None
    return {
        "similarity": np.round(unit @ unit.T, 3).tolist()
        if has_signatures(state)
        else None,
        "routes": "signatures" if has_signatures(state) else without,
        "bias": np.round(np.asarray(state["bias"], np.float32), 4).tolist(),
        "clusters": members,
        "frozen": bool(state["frozen"]),
        "held": bool(state.get("held", False)),
    }


def _weights(config, variables, before, name) -> dict[str, Any]:
    """Share of zeros a tile, share of weights that changed since the earlier
    checkpoint, splines, bytes.
    """
    kernels = _kernels(config, variables, name)
    earlier = _kernels(config, before, name) if before else {}
    zero = {k: (q == 0).mean(axis=_rest(q)).tolist() for k, q in kernels.items()}
    flips = {
        k: (q != earlier[k]).mean(axis=_rest(q)).tolist()
        for k, q in kernels.items()
        if k in earlier
    }
    ternary = sum(q.size for q in kernels.values())
    return {
        "zero": zero,
        "flips": flips,
        "bytes": {"float32": 4 * ternary, "packed": ternary / 4},
        "splines": _splines(config, variables, kernels, name),
    }


def _rest(q):
    return tuple(range(1, q.ndim))


def _kernels(config, variables: Variables, name: str) -> dict[str, np.ndarray]:
    """Ternary weights of a layer, a tile on the first axis."""
    is_lookup, splines = (
        config.ffn == "lookup",
        TernaryConfig(rule="fixed", threshold=0.3),
    )
    wanted = {}
    if config.has_ternary_products and config.ternary.mode != "none":
        d, width = config.d_model, config.tile_width
        widths = (
            {"tile_read": d, "tile_write": d} if is_lookup else {"up": width, "down": d}
        )
        wanted = {kernel: (config.ternary, width) for kernel, width in widths.items()}
    if is_lookup and config.ternary_splines:
        wanted["splines"] = splines, math.prod(_spline_shape(config)[1:])
    found = {}
    for kernel, (ternary, width) in wanted.items():
        path = (name, "ffn", kernel) if is_lookup else (name, "ffn", "tiles", kernel)
        if PACKED in variables:
            weights = ops.unpack(ops.Packed(**_at(variables[PACKED], path)), width)
        else:
            latent = _at(variables["params"], path)["kernel"]
            weights = hard_ternary(jnp.asarray(latent), ternary)
        found[kernel] = np.asarray(weights.q)
    return found


def _spline_shape(config) -> tuple[int, ...]:
    """Of a lookup layer's coefficients."""
    grid = config.grid_size
    cells = (grid, 2) if config.reads == "own" else (grid, grid, 3)
    return config.num_tiles, *cells


def _splines(config, variables, kernels, name):
    """The magnitude at the middle of every cell, `s * (c0 + (c1 + c2) / 2)`, `[N, G,
    G]`; of splines of one number, `s * (c0 + c1 / 2)`, `[N, 1, G]`.
    """
    if config.ffn != "lookup":
        return None
    layer = variables["params"][name]["ffn"]
    c = kernels["splines"] if "splines" in kernels else np.asarray(layer["splines"])
    c = c.reshape(_spline_shape(config))
    c = c[:, None] if config.reads == "own" else c
    scale = np.asarray(layer["spline_scale"])[:, None, None]
    middle = scale * (c[..., 0] + c[..., 1:].sum(axis=-1) / 2)
    return np.round(middle, 3).tolist()


def _earlier(directory: Path, model, step) -> Variables | None:
    """Parameters at the step kept before the one that is shown."""
    if is_export(directory):
        return None
    checkpoints = directory / "checkpoints"
    number = checkpoint.resolve(checkpoints, step)
    kept = [s for s in checkpoint.steps(checkpoints) if s < number]
    if not kept:
        return None
    return checkpoint.restore_arrays(checkpoints, kept[-1], ("params",))


def _at(tree, path):
    for name in path:
        tree = tree[name]
    return tree
