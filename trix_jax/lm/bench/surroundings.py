"""How long the import takes, how often a step compiles, and whether the data keeps up
with the training.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trix_jax.lm.config import TrainConfig
from trix_jax.lm.data.pipeline import train_batches
from trix_jax.lm.data.store import Split
from trix_jax.lm.train.eval_step import make_eval_step
from trix_jax.lm.train.optimizer import make_optimizer
from trix_jax.lm.train.step import init_state, make_train_step
from trix_jax.nn.transformer import TransformerConfig, TransformerLM

MODEL = TransformerConfig(
    vocab_size=65, context=64, d_model=128, n_layers=4, n_heads=4, num_tiles=16
)
BATCH = 12  # with MODEL the shapes of configs/shakespeare_char.yaml


def measure_surroundings(rounds: int, report: Callable[[str], None]) -> dict[str, Any]:
    """Import time over Flax's, compilations of each step function, tokens a second of
    the data pipeline over those of the training.
    """
    trix, flax = import_seconds(max(rounds // 2, 2))
    compiled, trained = steps(3 * rounds)
    read = pipeline_rate(20 * rounds)
    found = {
        "import_trix_jax_seconds": trix,
        "import_flax_seconds": flax,
        "import_vs_flax": trix / flax,
        "compilations": compiled,
        "train_tokens_per_second": trained,
        "pipeline_tokens_per_second": read,
        "pipeline_vs_training": read / trained,
    }
    report(f"import trix_jax: {found['import_vs_flax']:.2f} times import flax")
    report(f"compilations: {compiled}")
    report(f"data: {found['pipeline_vs_training']:.0f} times what training consumes")
    return found


def import_seconds(rounds: int) -> tuple[float, float]:
    """Seconds of `import trix_jax` and of `import flax`, each in processes of its own."""
    script = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"
    taken: dict[str, list[float]] = {"trix_jax": [], "flax": []}
    for _ in range(rounds):
        for name, seconds in taken.items():
            done = subprocess.run(
                [sys.executable, "-c", script.format(name)],
                capture_output=True,
                text=True,
                check=True,
            )
            seconds.append(float(done.stdout.split()[-1]))
    return statistics.median(taken["trix_jax"]), statistics.median(taken["flax"])


def steps(rounds: int) -> tuple[dict[str, int], float]:
    """How often the train and evaluation steps compile while data and weights change,
    and the training's tokens a second.
    """
    train = TrainConfig(steps=rounds + 1, batch_size=BATCH)
    model, optimizer = TransformerLM(MODEL), make_optimizer(train)
    traces = {"train": 0, "eval": 0}

    def counted(name, function):
        def call(*args):
            traces[name] += 1
            return function(*args)

        return jax.jit(call)

    step = counted("train", make_train_step(model, optimizer, train))
    evaluate = counted("eval", make_eval_step(model))
    state = init_state(model, optimizer, 0)
    rng, taken = np.random.default_rng(0), []
    for _ in range(rounds + 1):
        text = rng.integers(65, size=(1, BATCH, MODEL.context + 1))
        batch = jnp.asarray(text, jnp.int32)
        began = time.perf_counter()
        state, metrics = step(state, batch)
        float(metrics.loss)
        taken.append(time.perf_counter() - began)
        variables = {"params": state.params, "routing": state.routing}
        evaluate(variables, batch[0], jnp.ones((BATCH, MODEL.context)), 1.0)
    return traces, BATCH * MODEL.context / statistics.median(taken[1:])


def pipeline_rate(batches: int) -> float:
    """Tokens a second of `train_batches` on a million tokens, nobody consuming them."""
    text = np.random.default_rng(0).integers(65, size=10**6).astype(np.uint16)
    stream = train_batches(
        Split([text]), batch_size=BATCH, context=MODEL.context, seed=0
    )
    for _ in range(batches):  # what was read ahead before the clock starts
        next(stream)
    began = time.perf_counter()
    for _ in range(batches):
        next(stream)
    return batches * BATCH * MODEL.context / (time.perf_counter() - began)
