"""What the verbs share: parsing presets and flags, the JSON line, interruption."""

import json
import os
import sys
from collections.abc import Callable
from typing import Any


def say(as_json: bool) -> Callable[[str], None]:
    """Where messages go: standard output, or standard error where standard output ends
    in JSON.
    """
    stream = sys.stderr if as_json else sys.stdout
    return lambda text: print(text, file=stream, flush=True)


def print_json(values: dict[str, Any]) -> None:
    """The one JSON object that ends a verb's standard output under `--json`."""
    print(json.dumps(values), flush=True)


def be_deterministic() -> None:
    """Asks XLA for deterministic GPU kernels; on CPU they are so anyway. Must run
    before JAX starts a backend.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()
