"""The step of a language model compiled for an H100, its time modelled.

    python -m experiments.speed.modelled

That of `experiments.speed.gpu` (D=1,024, 12 layers, vocabulary 32,768, 16 sequences of
1,024, bfloat16) with 16 and 64 tiles of 256, four a token, on our kernels, and of its
dense twins. Attention is XLA's in all of them, since cuDNN's does not compile for a GPU
that is not here. Needs the aot group; writes `experiments/speed/measured/modelled.json`.
"""

import dataclasses
import json
from pathlib import Path

import jax

from experiments.speed.gpu.language_model import WAYS, configs
from experiments.speed.gpu.shapes import Shapes
from trix_jax.lm import aot

PATH = Path(__file__).parent / "measured" / "modelled.json"
TARGET = "h100"
KEPT = "modelled_us", "attention_us", "temporary_bytes"


def main() -> None:
    python, shapes = aot.compiler(), Shapes()
    if python is None:
        raise SystemExit(
            "Compiling for a GPU needs the group aot: uv sync --group aot."
        )
    rows = []
    for tiles in shapes.tiles:
        for name in WAYS:
            config = configs(shapes, tiles)[name]
            if name == "trix":
                config = dataclasses.replace(config, implementation="mosaic_gpu")
            found = aot.compile_case(python, TARGET, config, shapes.sequences, 1, 1)
            kept = {key: found[key] for key in KEPT}
            rows.append({"tiles": tiles, "what": name, **kept})
            print(json.dumps(rows[-1]), flush=True)
    about = {"target": TARGET, "jax": jax.__version__, "attention": "xla"}
    PATH.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
