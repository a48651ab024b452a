"""What the verbs share: parsing presets and flags, the JSON line, interruption."""

import json
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

from trix_jax.lm.signals import Signals


def say(as_json: bool) -> Callable[[str], None]:
    """Where messages go: standard output, or standard error where standard output ends
    in JSON. Where nobody reads them any more (`| head -1`), the verb stops as at a
    signal: a run saves first.
    """

    def tell(text: str) -> None:
        stream = sys.stderr if as_json else sys.stdout
        try:
            print(text, file=stream, flush=True)
        except BrokenPipeError:
            silence(stream)
            if not Signals.stop("SIGPIPE"):
                raise

    return tell


def silence(stream: TextIO) -> None:
    """What is still written to a closed pipe goes nowhere, and raises no more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def print_json(values: dict[str, Any]) -> None:
    """The one JSON object that ends a verb's standard output under `--json`."""
    print(json.dumps(values), flush=True)


def be_deterministic() -> None:
    """Asks XLA for deterministic GPU kernels; on CPU they are so anyway. Must run
    before JAX starts a backend.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()
