"""A model as one StableHLO program that runs without this package."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import export as jax_export

from trix_jax.lm.train.exported import PROGRAM
from trix_jax.nn.transformer import TransformerLM
from trix_jax.typing import Variables

PLATFORMS = ("cpu", "cuda", "tpu")


def write_program(
    model: TransformerLM, variables: Variables, directory: str | Path, batch: int = 1
) -> Path:
    """Writes `model.stablehlo`: tokens int32 `[batch, context]` to logits float32
    `[batch, context, V]`.

    The weights are inside, packed ones as their two bits. Any JAX reads it, with this
    package or without:

        data = Path("model.stablehlo").read_bytes()
        logits = jax.export.deserialize(bytearray(data)).call(tokens)
    """
    runs_everywhere: dict = {"attention": "xla", "implementation": "xla"}
    config = dataclasses.replace(model.config, **runs_everywhere)
    model = TransformerLM(config)
    shape = jax.ShapeDtypeStruct((batch, model.config.context), jnp.int32)
    forward = jax.jit(lambda tokens: model.apply(variables, tokens)[0])
    program = jax_export.export(forward, platforms=PLATFORMS)(shape)
    path = Path(directory) / PROGRAM
    path.write_bytes(program.serialize())
    return path
