"""What the machine is, and what it does at best."""

import importlib.util
import platform
import shutil
import statistics
import subprocess
from collections.abc import Iterator, Sequence
from importlib import metadata

import jax

from experiments.speed.gpu.shapes import Shapes
from experiments.speed.gpu.timing import Case, Row, on_gpu, timed
from trix_jax.ops import implementation
from trix_kernels import device, measure
from trix_kernels.grouped_matmul import device_reason

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "optax", "tokamax")
CLOCKS = (
    "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
)


def versions(shapes: Shapes) -> Iterator[Row]:
    """Packages, device, clocks, and which kernels run."""
    del shapes
    first = jax.devices()[0]
    found = {name: metadata.version(name) for name in PACKAGES if is_there(name)}
    yield {
        "name": "versions",
        "python": platform.python_version(),
        "packages": found,
        "platform": first.client.platform_version,
        "capability": str(getattr(first, "compute_capability", "")),
        "devices": len(jax.devices()),
    }
    yield {"name": "clocks", **clocks()}
    yield {
        "name": "kernels",
        "packed": device.unsupported_reason() or "mosaic_gpu",
        "grouped": device_reason() or "mosaic_gpu",
        "served": implementation({"packed": {}}),
    }


def is_there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def clocks() -> Row:
    """What `nvidia-smi` says of the clocks; None where there is none, or it fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {"nvidia_smi": None}
    command = [program, f"--query-gpu={CLOCKS}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    values = [value.strip() for value in done.stdout.partition("\n")[0].split(",")]
    names = CLOCKS.split(",")
    is_whole = done.returncode == 0 and len(values) == len(names)
    return {"nvidia_smi": dict(zip(names, values, strict=True)) if is_whole else None}


def ceilings(shapes: Shapes) -> Iterator[Row]:
    """A product and a copy at best: CUPTI's time on a GPU, the clock's elsewhere."""

    def by_clock(call, sets: Sequence[tuple]) -> list[float]:
        row = timed({"call": Case(jax.jit(call), sets[0])}, shapes)["call"]
        return [us / 1e6 for us in row["us_of_rounds"]]

    seconds = measure.seconds if on_gpu() else by_clock
    sizes = {"size": shapes.ceiling, "copied": shapes.copied}
    found = measure.ceilings(**sizes, seconds=seconds)
    yield {"name": "ceilings", **sizes, "by": "CUPTI" if on_gpu() else "clock", **found}
    yield {"name": "overhead", "us": statistics.median(_overhead(shapes))}


def _overhead(shapes: Shapes) -> list[float]:
    """Microseconds of a call that does next to nothing: what a row by the clock has of
    the host's.
    """
    add = jax.jit(lambda x: x + 1)
    return timed({"add": Case(add, (jax.numpy.zeros(8),))}, shapes)["add"][
        "us_of_rounds"
    ]
