"""A training step beside the PyTorch original's, on this machine.

    git clone https://github.com/anjaustin/trix SOURCE        # e87ba17 was measured
    python -m experiments.speed.original --source SOURCE --python PYTHON_WITH_TORCH

A character model of 4 layers, width 128, 4 heads and 65 characters, hierarchical routing,
16 tiles in clusters of 4 and 64 in clusters of 8, 64 x 128 tokens a step, float32, AdamW,
clipping at 1, auxiliary losses included. The original's blocks run in a process of their
own; the two take a step in turn, a thread a core each. After eight steps of warm-up fifteen
rounds; ratios are medians. Adds a run to `experiments/speed/measured/original.json`, in the
place of that with the same GLIBC_TUNABLES, which both processes get. Run it on an otherwise
idle machine.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
from pathlib import Path
from typing import Any

import jax

from experiments.speed.steps import Setting, Stepper, config_of
from experiments.speed.turns import ratio
from trix_jax.lm import allocator
from trix_jax.lm.train.metrics import git_commit

PATH = Path(__file__).parent / "measured" / "original.json"
WORKER = Path(__file__).with_name("original_step.py")
TILES = {16: 4, 64: 8}  # and how many a cluster
TUNABLES = "GLIBC_TUNABLES"
WARM_UP, ROUNDS = 8, 15
ARM = "--arm hierarchical"
SETTING = Setting(
    "configs/shakespeare_char.yaml",
    "--model.context 128 --train.batch-size 64",
    65,
    {
        f"{tiles}": f"{ARM} --model.num-tiles {tiles} --model.tiles-per-cluster {each}"
        for tiles, each in TILES.items()
    },
)


class Original:
    """The original's step, a call a step, in a process of its own."""

    def __init__(self, python: str, source: Path, tiles: int):
        command = [python, str(WORKER), str(source), str(tiles), str(TILES[tiles])]
        env = os.environ | {"OMP_NUM_THREADS": str(os.cpu_count())}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, env=env
        )
        self.about = json.loads(self._answer())

    def __call__(self) -> float:
        """Seconds of a step."""
        assert self._process.stdin is not None
        print("step", file=self._process.stdin, flush=True)
        return float(self._answer())

    def close(self) -> None:
        """Closes its pipes and waits for its end."""
        with self._process:
            pass

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.close()
            status = f"status {self._process.returncode}"
            raise RuntimeError(f"{WORKER.name} must answer. Got its end, {status}.")
        return line


def measure(python: str, source: Path, tiles: int, rounds: int) -> dict[str, Any]:
    """Both steps in turn: tokens a second, and the ratio over the rounds."""
    config = config_of(SETTING, SETTING.arms[str(tiles)])
    ours, theirs = Stepper(config), Original(python, source, tiles)
    pairs = [(ours(), theirs()) for _ in range(WARM_UP + rounds)][WARM_UP:]
    theirs.close()
    mine, original = ([pair[i] for pair in pairs] for i in range(2))
    return {
        "tiles": tiles,
        "ours": round(ours.tokens / statistics.median(mine)),
        "original": round(ours.tokens / statistics.median(original)),
        **{name: round(value, 3) for name, value in ratio(original, mine).items()},
        "about": theirs.about,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, required=True, help="a checkout of it")
    parser.add_argument("--python", required=True, help="one that has torch")
    args = parser.parse_args()
    allocator.keep_freed_memory()
    rows = [measure(args.python, args.source, tiles, ROUNDS) for tiles in TILES]
    run = {
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "tunables": os.environ.get(TUNABLES, ""),
        "git_commit": git_commit(),
        "rounds": ROUNDS,
        "rows": rows,
    }
    runs = json.loads(PATH.read_text("utf-8")) if PATH.exists() else []
    runs = [each for each in runs if each["tunables"] != run["tunables"]] + [run]
    PATH.write_text(json.dumps(runs, indent=1) + "\n", "utf-8")
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
