"""Trains for a while and watches memory, threads, file descriptors and compilations:
`python .ci/soak.py MINUTES FILE [STEPS]`, on Linux with glibc.

A run that evaluates and saves every STEPS steps (5,000, a minute or two) goes on for
MINUTES; every second the process is measured. FILE gets what the samples say, and every
tenth of them; exit code 1 if anything grew. The rule, fixed before the run:

- The first fifth is warm-up.
- Memory is the anonymous part of what is resident: pages of shared libraries come and go
  as the kernel likes.
- What comes and goes (memory, threads of pools, descriptors) is judged by a line fitted
  to all samples after it. Memory may gain 2 % from its first to its last point, threads
  and descriptors less than one.
- Nothing may be compiled.

`allocated_bytes`, what malloc has given out and not got back, has no rule: where it
stays and memory grows, it is glibc that keeps more.

One leak is known, and not ours: TensorStore 0.1.86's `KvStore.Spec.to_json()`, which
Orbax calls for every array of a save, leaves four Python objects each time.
`python_blocks` shows it. `per_save` says what each save leaves; with few STEPS there are
many.
"""

import ctypes
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import numpy as np

from trix_jax.files import write_json
from trix_jax.lm import allocator
from trix_jax.lm.checkpoint import checkpoint
from trix_jax.lm.config import RunConfig, TrainConfig
from trix_jax.lm.data import DataConfig
from trix_jax.lm.signals import Interrupted
from trix_jax.lm.train import loop, metrics
from trix_jax.nn.transformer import TransformerConfig

EVERY_SECONDS = 1.0
KEPT = 10  # every so many samples are written
STEPS = 5000
MAY_GROW = {"memory_share": 0.02, "threads": 1, "descriptors": 1, "compilations": 1}
compilations = 0


class Mallinfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def count(event: str, *_, **__) -> None:
    """Counts what XLA compiles."""
    global compilations
    compilations += event == "/jax/core/compile/backend_compile_duration"


def allocated_bytes() -> int:
    """Bytes that malloc has given out, in all arenas, and mapped."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Mallinfo
    info = mallinfo()
    return info.uordblks + info.hblkhd


def sample(began: float, workdir: Path) -> dict[str, float]:
    """What this process holds now."""
    pages = [int(n) for n in Path("/proc/self/statm").read_text().split()[1:3]]
    page = os.sysconf("SC_PAGE_SIZE")
    return {
        "seconds": round(time.monotonic() - began, 1),
        "saved_step": max(checkpoint.steps(workdir / "checkpoints")),
        "resident_bytes": pages[0] * page,
        "anonymous_bytes": (pages[0] - pages[1]) * page,
        "allocated_bytes": allocated_bytes(),
        "threads": len(os.listdir("/proc/self/task")),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "compilations": compilations,
        "python_blocks": sys.getallocatedblocks(),
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
    """What each measure gained from the warm-up's end to the end."""
    if len(samples) < 10:
        raise SystemExit(f"Too short to say anything: {len(samples)} samples.")
    steady = samples[len(samples) // 5 :]
    at = np.array([s["seconds"] for s in steady])

    def fitted(name: str) -> tuple[float, float]:
        slope, start = np.polyfit(at, [s[name] for s in steady], 1)
        return slope * (at[-1] - at[0]), start + slope * at[0]

    gained, held = fitted("anonymous_bytes")
    more, had = fitted("allocated_bytes")
    gains = {name: fitted(name)[0] for name in ("threads", "descriptors")}
    gains["python_blocks"] = fitted("python_blocks")[0]
    gains["compilations"] = steady[-1]["compilations"] - steady[0]["compilations"]
    gains["memory_share"] = gained / held
    gains["allocated_share"] = more / had
    return {name: round(float(value), 4) for name, value in gains.items()}


def per_save(samples: list[dict[str, float]], steps: int) -> dict[str, float]:
    """What a save adds, by a line fitted to the samples after the warm-up."""
    steady = samples[len(samples) // 5 :]
    saves = np.array([s["saved_step"] for s in steady]) / steps
    if saves[0] == saves[-1]:
        raise SystemExit("Too short to say anything: no save after the warm-up.")
    return {
        name: round(float(np.polyfit(saves, [s[name] for s in steady], 1)[0]), 1)
        for name in ("anonymous_bytes", "allocated_bytes", "python_blocks")
    }


def main(minutes: float, file: Path, steps: int = STEPS) -> int:
    """Trains, watches and writes the result; 0 if nothing grew."""
    allocator.keep_freed_memory()  # first of all, as `trix-jax train` does
    jax.monitoring.register_event_duration_secs_listener(count)
    config = RunConfig(
        arm="sparse",
        model=TransformerConfig(
            d_model=64, n_layers=2, context=64, ffn="sparse", tiles_per_token=4
        ),
        data=DataConfig(max_bytes=300_000),
        train=TrainConfig(
            steps=10**8, eval_every=steps, rebuild_every=50, log_every=10
        ),
    )
    samples: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as place:
        workdir = Path(place) / "run"
        threading.Thread(target=watch, args=(minutes, workdir, samples)).start()
        try:
            loop.train(config, workdir)
        except Interrupted as stop:
            print(stop)
    grown = growth(samples)
    is_flat = all(grown[name] < limit for name, limit in MAY_GROW.items())
    result = {
        "minutes": minutes,
        "is_flat": is_flat,
        "growth": grown,
        "saves": samples[-1]["saved_step"] // steps,
        "steps_per_save": steps,
        "per_save": per_save(samples, steps),
        "environment": metrics.environment(jax.devices()),
        "samples": samples[::KEPT],
    }
    write_json(file, result)
    said = ("minutes", "saves", "is_flat", "growth", "per_save")
    print(json.dumps({k: result[k] for k in said}))
    return 0 if is_flat else 1


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:4])))
