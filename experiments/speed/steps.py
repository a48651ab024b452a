"""How long a training step takes on this machine: in the setting of the front page, and of
a laptop's preset at width 128.

    python -m experiments.speed.steps [SETTING ...]

times the whole step (forward, backward, optimizer, routing update) of each FFN, in float32
on CPUs, in turn, and writes `experiments/speed/measured/steps.json`. Run it on an
otherwise idle machine.
"""

import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.speed.turns import ratio
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
ROUNDS = 7


class Setting(NamedTuple):
    """A preset of which some arms are timed.

    Attributes:
        flags: of all arms.
        arms: flags by name; ratios are to the first.
    """

    preset: str
    flags: str
    vocabulary: int
    arms: dict[str, str]


BODY = "--model.positions rotary --model.norm rms --model.qk-norm"
FEWER = "--arm tiles --model.tiles-per-token 7 --model.shared-width"
TILES = (
    "--arm tiles --model.num-tiles 96 --model.expansion 24 --model.tiles-per-token 11 "
    "--model.shared-width"
)
HASH = "--model.routing.source hash"
LAYERS = f"{HASH} --model.hash-per-layer"
SETS = "--model.routing.hash-sets"
ROUTES = "--model.routing.hold-after 0.1 --model.routing.hold routes --model.routing.signature sign"


def dense(*widths: int) -> dict[str, str]:
    return {f"dense-{w}": f"--arm dense --model.ffn-width {w}" for w in widths}


SETTINGS = {
    "english-256": Setting(
        "experiments/quality/english_256.yaml",
        "--train.optimizer muon --model.dtype float32",
        2048,
        {
            "sparse-16-top4-embedding": "--arm sparse --model.tiles-per-token 4 --model.router-input embedding",
            **dense(128, 256, 1024),
        },
    ),
    "wikipedia-128": Setting(
        "experiments/quality/wikipedia.yaml",
        BODY,
        4096,
        {
            "tiles-96-hash-eighth-shared-layers": f"{TILES} 32 {LAYERS}",
            "tiles-96-hash-eighth-shared-sets-64x1": f"{TILES} 32 {LAYERS} {SETS} 64",
            "tiles-64-hash-eighth-shared-layers": f"{FEWER} 32 {LAYERS}",
            "tiles-64-hash-eighth-shared": f"{FEWER} 32 {HASH}",
            "tiles-64-held-eighth-shared-routes": f"{FEWER} 32 {ROUTES}",
            **dense(256, 384, 512, 1024, 2048),
        },
    ),
    "wikipedia-128-of-8192": Setting(
        "experiments/quality/wikipedia.yaml",
        f"{BODY} --train.batch-size 128",
        4096,
        {
            "tiles-96-hash-eighth-shared-layers": f"{TILES} 32 {LAYERS}",
            "tiles-96-hash-eighth-shared-sets-64x1": f"{TILES} 32 {LAYERS} {SETS} 64",
            "tiles-96-hash-eighth-shared-sets-256x1": f"{TILES} 32 {LAYERS} {SETS} 256",
            **dense(384, 512, 1024),
        },
    ),
    "wikipedia-64": Setting(
        "experiments/quality/wikipedia.yaml",
        f"--model.d-model 64 --model.n-heads 2 {BODY}",
        4096,
        {
            "tiles-96-hash-eighth-shared-layers": f"{TILES} 16 {LAYERS}",
            "tiles-96-hash-eighth-shared-sets-64x1": f"{TILES} 16 {LAYERS} {SETS} 64",
            "tiles-64-hash-eighth-shared-layers": f"{FEWER} 16 {LAYERS}",
            "tiles-64-held-eighth-shared-routes": f"{FEWER} 16 {ROUTES}",
            **dense(128, 192, 256, 512, 1024),
        },
    ),
    "shakespeare-128": Setting(
        "configs/shakespeare_char.yaml",
        "",
        65,
        {"sixteen-tiles": "", "dense-512": "--arm dense --model.ffn-width 512"},
    ),
}


def config_of(setting: Setting, flags: str) -> RunConfig:
    """The config of an arm; later flags win."""
    argv = [str(ROOT / setting.preset), *shlex.split(f"{flags} {setting.flags}")]
    config = parse_preset(Args, argv, "train").config
    return resolve(config, setting.vocabulary, end_token=0)


class Stepper:
    """A model that trains on random tokens, a step a call."""

    def __init__(self, config: RunConfig):
        model, devices = TransformerLM(config.model), jax.devices()[:1]
        optimizer = make_optimizer(config.train)
        make = partial(make_train_step, model, optimizer, config.train)
        self._step = parallel.compile_step(make, devices, "jit")
        self._state = parallel.place(init_state(model, optimizer, 0), devices, "jit")
        shape = 1, config.train.batch_size, config.model.context + 1
        vocabulary = config.model.vocab_size
        self._batch = np.random.default_rng(0).integers(0, vocabulary, shape, np.int32)
        self.tokens = config.train.batch_size * config.model.context

    def __call__(self) -> float:
        """Seconds of a step."""
        began = time.perf_counter()
        self._state, metrics = self._step(self._state, self._batch)
        jax.block_until_ready((self._state, metrics))
        return time.perf_counter() - began


def measure(setting: Setting, rounds: int) -> dict[str, dict[str, Any]]:
    """A step of each arm, compiled before: the median of its seconds over the rounds, taken
    in turn, and how many times as fast as its step the first arm's is.
    """
    steppers = {
        name: Stepper(config_of(setting, flags)) for name, flags in setting.arms.items()
    }
    for step in steppers.values():
        step()
    taken: dict[str, list[float]] = {name: [] for name in setting.arms}
    for _ in range(rounds):
        for name, step in steppers.items():
            taken[name].append(step())
    first = next(iter(taken.values()))
    found = {}
    for name, seconds in taken.items():
        middle = statistics.median(seconds)
        found[name] = {
            "flags": setting.arms[name],
            "seconds": round(middle, 4),
            "range": [round(min(seconds), 4), round(max(seconds), 4)],
            "tokens_per_second": round(steppers[name].tokens / middle),
            "first_is": {k: round(v, 3) for k, v in ratio(seconds, first).items()},
        }
    return found


def main(names: Sequence[str]) -> None:
    """Measures the settings of these names, or all; what is measured of others stays."""
    allocator.keep_freed_memory()
    measured = json.loads(PATH.read_text("utf-8"))["settings"]
    made = {
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "git_commit": git_commit(),
        "rounds": ROUNDS,
    }
    for name in names or SETTINGS:
        setting = SETTINGS[name]
        preset = f"{setting.preset} {setting.flags}".strip()
        arms = measure(setting, ROUNDS)
        measured[name] = {"preset": preset, **made, "arms": arms}
        print(name, json.dumps(arms, indent=1))
    result = {
        "command": "python -m experiments.speed.steps [SETTING ...]",
        "settings": {name: measured[name] for name in SETTINGS if name in measured},
    }
    PATH.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
