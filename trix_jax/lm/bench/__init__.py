"""Speed and memory of the library on the device that is here, in one run.

`bench` measures the layers against dense FFNs (`layers`), what stands around them
(`around`: import, compilations, data) and how time and memory grow (`growth`);
`report.write` makes files of what it returns.
"""

import platform
from collections.abc import Callable
from typing import Any

import jax

from trix_jax.lm.bench.growth import measure_growth
from trix_jax.lm.bench.layers import measure_layers, packed_ratios
from trix_jax.lm.bench.report import write as write
from trix_jax.lm.bench.surroundings import measure_around
from trix_jax.lm.bench.timing import Sizes as Sizes

SIZES = Sizes()


def bench(
    rounds: int = 7,
    report: Callable[[str], None] = print,
    sizes: Sizes = SIZES,
    only_layers: bool = False,
) -> dict[str, Any]:
    """Measures everything; see DESIGN section 5 for the keys.

    Args:
        rounds: how often each function is timed; growth takes half as many.
        report: receives a line for each measurement.
        sizes: of the layers.
        only_layers: leaves `growth` and `around` out.
    """
    ratios = packed_ratios()
    result: dict[str, Any] = {
        "device": f"{jax.devices()[0].device_kind}, {_cpus()} cores",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "rounds": rounds,
        **measure_layers(rounds, report, sizes),
        "packed_ratio": min(ratios.values()),
        "packed_ratios": ratios,
    }
    for name, ratio in ratios.items():
        report(f"scales per {name}: {ratio:.2f} times fewer bytes than float32")
    if not only_layers:
        result |= {"around": measure_around(rounds, report)}
        result |= {"growth": measure_growth(max(rounds // 2, 2), report, sizes)}
    return result


def _cpus() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
