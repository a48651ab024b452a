"""The files of an exported model that training reads too (`trix_jax.lm.serve.export`
writes them).
"""

import json
from pathlib import Path

from trix_jax.lm import config as run_config
from trix_jax.nn.transformer import TransformerConfig

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
PROGRAM = "model.stablehlo"


def is_export(directory: Path) -> bool:
    """Whether a directory holds an exported model."""
    return (directory / WEIGHTS).is_file() and (directory / CONFIG).is_file()


def read_model_config(path: Path) -> TransformerConfig:
    """The config of an exported model.

    Raises:
        ValueError: it is none.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return run_config.from_tree({"model": tree["model"]}).model
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is not the config of an exported model: {error}"
        ) from error
