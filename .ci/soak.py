"""Trains for a while and watches memory, threads, file descriptors and compilations:
`python .ci/soak.py MINUTES FILE`.

A run that evaluates and saves every 100 steps goes on for MINUTES; every 10 seconds the
process is measured. The first fifth is warm-up. FILE gets the samples and what they
say; exit code 1 if anything grew.
"""

import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import numpy as np

from trix_jax.lm import checkpoint, metrics, train
from trix_jax.lm.config import RunConfig, TrainConfig
from trix_jax.lm.data import DataConfig
from trix_jax.lm.signals import Interrupted
from trix_jax.nn.transformer import TransformerConfig

EVERY_SECONDS = 10.0
MAY_GROW = 0.02  # of resident memory, over all that follows the warm-up
compilations = 0


def count(event: str, *_, **__) -> None:
    """Counts what XLA compiles."""
    global compilations
    compilations += event == "/jax/core/compile/backend_compile_duration"


def sample(began: float, workdir: Path) -> dict[str, float]:
    """What this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "seconds": round(time.monotonic() - began, 1),
        "saved_step": max(checkpoint.steps(workdir / "checkpoints")),
        "resident_bytes": pages * os.sysconf("SC_PAGE_SIZE"),
        "threads": len(os.listdir("/proc/self/task")),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "compilations": compilations,
    }


def watch(minutes: float, workdir: Path, samples: list[dict[str, float]]) -> None:
    """Samples until the time is up, then asks the run to stop."""
    began = time.monotonic()
    while time.monotonic() - began < 60 * minutes:
        time.sleep(EVERY_SECONDS)
        if checkpoint.steps(workdir / "checkpoints"):
            samples.append(sample(began, workdir))
    os.kill(os.getpid(), 15)  # the run saves and stops, as it would on a cluster


def growth(samples: list[dict[str, float]]) -> dict[str, float]:
    """What each measure gained from the warm-up's end to the end, of memory by a fitted
    line.
    """
    steady = samples[len(samples) // 5 :]
    gained = {
        name: steady[-1][name] - steady[0][name]
        for name in ("threads", "descriptors", "compilations")
    }
    at, held = (np.array([s[k] for s in steady]) for k in ("seconds", "resident_bytes"))
    slope = np.polyfit(at, held, 1)[0]
    return gained | {"memory_share": float(slope * (at[-1] - at[0]) / held[0])}


def main(minutes: float, file: Path) -> int:
    """Trains, watches and writes the result; 0 if nothing grew."""
    jax.monitoring.register_event_duration_secs_listener(count)
    config = RunConfig(
        arm="sparse",
        model=TransformerConfig(
            d_model=64, n_layers=2, context=64, ffn="sparse", tiles_per_token=4
        ),
        data=DataConfig(max_bytes=300_000),
        train=TrainConfig(steps=10**8, eval_every=100, rebuild_every=50, log_every=10),
    )
    samples: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as place:
        workdir = Path(place) / "run"
        threading.Thread(target=watch, args=(minutes, workdir, samples)).start()
        try:
            train.train(config, workdir)
        except Interrupted as stop:
            print(stop)
    grown = growth(samples)
    is_flat = grown.pop("memory_share") <= MAY_GROW and not any(grown.values())
    result = {
        "minutes": minutes,
        "is_flat": is_flat,
        "growth": growth(samples),
        "environment": metrics.environment(jax.devices()),
        "samples": samples,
    }
    metrics.write_json(file, result)
    print(json.dumps({k: result[k] for k in ("minutes", "is_flat", "growth")}))
    return 0 if is_flat else 1


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), Path(sys.argv[2])))
