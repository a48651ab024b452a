"""Tokens a second of a whole language model that generates, on this machine.

    python -m experiments.speed.generation

Four layers of width 512, 4,096 ids, context 128, float32; FFNs of 64 tiles of 128, one a
token, with two bits a weight and with a byte (`widen`), beside the dense FFN of as many
parameters. Greedy, 64 tokens after a prompt of 8, batches of 1 and 8, seven rounds in
turn. Writes `experiments/speed/measured/generation.json`. Run it on an otherwise idle
machine.
"""

import dataclasses
import json
import os
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.speed.turns import ratio
from trix_jax import TransformerConfig, TransformerLM, freeze, widen
from trix_jax.lm.serve.generate import generate_batch
from trix_jax.lm.serve.sampling import SamplingConfig

PATH = Path(__file__).parent / "measured" / "generation.json"
ROUNDS, BATCHES = 7, (1, 8)
PROMPT, NEW = 8, 64
CONFIG = TransformerConfig(
    vocab_size=4096,
    context=128,
    d_model=512,
    n_layers=4,
    n_heads=8,
    ffn="sparse",
    num_tiles=64,
    expansion=16,
)
DENSE = "dense, equal parameters"


def models(config: TransformerConfig) -> dict[str, tuple[TransformerLM, Any]]:
    """The models by name, with the variables that they are served with."""
    width = config.expansion * config.d_model
    twin = dataclasses.replace(config, ffn="dense", ffn_width=width)
    trix, dense = TransformerLM(config), TransformerLM(twin)
    tokens, key = jnp.zeros((1, PROMPT), jnp.int32), jax.random.key(0)
    packed = freeze(trix, jax.jit(trix.init)(key, tokens), tokens)
    return {
        "two bits": (trix, packed),
        "a byte": (trix, widen(packed)),
        DENSE: (dense, jax.jit(dense.init)(key, tokens)),
    }


def measure(config: TransformerConfig, batch: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each model: tokens a second, and how many times those of the twin."""
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (batch, PROMPT))
    greedy, served = SamplingConfig(temperature=0.0), models(config)
    calls = {
        name: partial(generate_batch, *each, list(ids), NEW, greedy)
        for name, each in served.items()
    }
    for call in calls.values():
        call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - began)
    rows = []
    for name, seconds in taken.items():
        leaves = jax.tree.leaves(served[name][1])
        row: dict[str, Any] = {"batch": batch, "weights": name}
        row["tokens_per_second"] = round(batch * NEW / statistics.median(seconds))
        row["megabytes"] = round(sum(leaf.nbytes for leaf in leaves) / 1e6, 1)
        rows.append(row | ratio(taken[DENSE], seconds))
    return rows


def main() -> None:
    rows = [row for batch in BATCHES for row in measure(CONFIG, batch, ROUNDS)]
    device = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores"
    about = {"device": device, "jax": jax.__version__, "rounds": ROUNDS}
    PATH.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", "utf-8")
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
