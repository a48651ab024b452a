"""A trained language model as files: packed weights, config, tokenizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from trix_jax.files import write_json
from trix_jax.frozen import freeze
from trix_jax.interop import safetensors
from trix_jax.lm import config as run_config
from trix_jax.lm.accounting import Routes, costs
from trix_jax.lm.data import load_tokenizer
from trix_jax.lm.train.exported import (
    CONFIG,
    PROGRAM,
    TOKENIZER,
    WEIGHTS,
    read_model_config,
)
from trix_jax.nn.route_table import tabulate_routes
from trix_jax.nn.transformer import TransformerLM
from trix_jax.ops import PACKED
from trix_jax.typing import Variables

TABLES = (".router.tiles", ".router.gates")


def export(
    model: TransformerLM,
    variables: Variables,
    tokenizer: Any,
    directory: str | Path,
    routes: Routes = "signatures",
    dtype: safetensors.RealDtype = "float32",
) -> dict[str, int]:
    """Packs a trained model and writes `model.safetensors`, `config.json` and
    `tokenizer.json`.

    Args:
        directory: made if missing; files of these names are replaced, and the StableHLO
            program of what it held before goes.
        routes: "table" stores the tiles and gates of each token (`tabulate_routes`);
            "signatures" leaves the variables as they are.
        dtype: of the parameters that are not packed, and of a table's gates. bfloat16
            rounds them; signatures, biases and clusters stay as they are. The embedding
            that signatures meet, rows of a learned router and directions of a lookup are
            parameters: a token near a tie may then take another tile.

    Returns:
        bytes of the FFN weights: `ffn_float32` as trained, `ffn_packed` as written,
            scales included in both; and `routes`, of what routing has in the file.

    Raises:
        ValueError: a table for a model that does not route by single tokens; the
            directory of a run or of a token store.
    """
    directory = Path(directory)
    check_output(directory)
    directory.mkdir(parents=True, exist_ok=True)
    is_done = PACKED in variables or not model.config.has_ternary_weights
    sample = jnp.zeros((1, 1), jnp.int32)
    frozen = variables if is_done else freeze(model, variables, sample)
    if routes == "table":
        frozen = tabulate_routes(model, frozen)
    (directory / PROGRAM).unlink(missing_ok=True)
    sizes = safetensors.write(directory / WEIGHTS, model, frozen, dtype)
    shape = run_config.to_tree(run_config.RunConfig(model=model.config))["model"]
    tree = {"model_type": "trix_jax", "model": shape}
    write_json(directory / CONFIG, tree)
    tokenizer.save(directory / TOKENIZER)
    written = part_bytes(sizes)
    return {
        "ffn_float32": 4 * costs(model.config).ffn,
        "ffn_packed": written["ffn"],
        "routes": written["routes"],
    }


def check_output(directory: str | Path) -> None:
    """Raises a ValueError for the directory of a run or of a token store, whose files an
    export would stand for or write over.
    """
    of = {"config.yaml": "a run", "manifest.json": "a token store"}
    for name, what in of.items():
        if (Path(directory) / name).exists():
            raise ValueError(
                f"output must be a folder of its own, not that of {what}. Got {directory}."
            )


def part_bytes(sizes: Mapping[str, int]) -> dict[str, int]:
    """Bytes of the FFN weights, scales included, and of the routes.

    Args:
        sizes: of the tensors of a file, by name.
    """
    routing = {n for n in sizes if n.startswith("routing") or n.endswith(TABLES)}
    ffn = {n for n in sizes if ".ffn." in n or ".shared." in n} - routing
    return {
        part: sum(sizes[name] for name in names)
        for part, names in (("ffn", ffn), ("routes", routing))
    }


def load(directory: str | Path) -> tuple[TransformerLM, dict[str, Any], Any]:
    """Reads what `export` wrote; the variables are packed, and evaluate as the trained
    ones did, up to the rounding of parameters in bfloat16.

    Raises:
        ValueError: a file that is cut short, of another version, or does not fit its
            config; says which. A changed number is not noticed.
    """
    directory = Path(directory)
    model = TransformerLM(read_model_config(directory / CONFIG).on_any_device())
    variables = safetensors.read(directory / WEIGHTS, model)
    return model, variables, load_tokenizer(directory / TOKENIZER)
