"""How long a training step takes in the setting of the front page, on this machine.

    python -m experiments.speed.steps

times the whole step of `experiments/quality/english_256.yaml` (forward, backward, Muon,
routing update) for each FFN of the front page, in float32 on CPUs, in turn, and writes
`experiments/speed/measured/steps.json`. Run it on an otherwise idle machine.
"""

import json
import os
import platform
import shlex
import statistics
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np

from trix_jax.cli.train import Args
from trix_jax.lm import allocator
from trix_jax.lm.config import RunConfig, resolve
from trix_jax.lm.presets import parse_preset
from trix_jax.lm.train import parallel
from trix_jax.lm.train.metrics import git_commit
from trix_jax.lm.train.optimizer import make_optimizer
from trix_jax.lm.train.step import init_state, make_train_step
from trix_jax.nn.transformer import TransformerLM

ROOT = Path(__file__).parents[2]
PATH = ROOT / "experiments" / "speed" / "measured" / "steps.json"
PRESET = "experiments/quality/english_256.yaml"
FLAGS = "--train.optimizer muon --model.dtype float32"
ARMS = {
    "sparse-16-top4-embedding": "--arm sparse --model.tiles-per-token 4 --model.router-input embedding",
    **{f"dense-{w}": f"--arm dense --model.ffn-width {w}" for w in (128, 256, 1024)},
}
ROUNDS = 7
VOCABULARY = 2048


def config_of(flags: str) -> RunConfig:
    argv = [str(ROOT / PRESET), *shlex.split(f"{flags} {FLAGS}")]
    config = parse_preset(Args, argv, "train").config
    return resolve(config, VOCABULARY, end_token=0)


class Stepper:
    """A model that trains on random tokens, a step a call."""

    def __init__(self, config: RunConfig):
        model, devices = TransformerLM(config.model), jax.devices()[:1]
        optimizer = make_optimizer(config.train)
        make = partial(make_train_step, model, optimizer, config.train)
        self._step = parallel.compile_step(make, devices, "jit")
        self._state = parallel.place(init_state(model, optimizer, 0), devices, "jit")
        shape = 1, config.train.batch_size, config.model.context + 1
        self._batch = np.random.default_rng(0).integers(0, VOCABULARY, shape, np.int32)

    def __call__(self) -> float:
        """Seconds of a step."""
        began = time.perf_counter()
        self._state, metrics = self._step(self._state, self._batch)
        jax.block_until_ready((self._state, metrics))
        return time.perf_counter() - began


def measure(arms: dict[str, str], rounds: int) -> dict[str, list[float]]:
    """Seconds a step of each arm in each round, in turn, compiled before."""
    steppers = {name: Stepper(config_of(flags)) for name, flags in arms.items()}
    for step in steppers.values():
        step()
    taken: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, step in steppers.items():
            taken[name].append(step())
    return taken


def main() -> None:
    allocator.keep_freed_memory()
    taken = measure(ARMS, ROUNDS)
    result = {
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "command": "python -m experiments.speed.steps",
        "git_commit": git_commit(),
        "preset": f"{PRESET} {FLAGS}",
        "rounds": ROUNDS,
        "arms": {
            name: {
                "flags": ARMS[name],
                "seconds": round(statistics.median(seconds), 4),
                "range": [round(min(seconds), 4), round(max(seconds), 4)],
            }
            for name, seconds in taken.items()
        },
    }
    PATH.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(json.dumps(result["arms"], indent=1))


if __name__ == "__main__":
    main()
