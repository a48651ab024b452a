"""Speed and memory of the library on the device that is here, in one run.

`bench` measures the layers against dense FFNs (`layers`), their surroundings
(`surroundings`: import, compilations, data) and how time and memory grow (`growth`);
`report.write` makes files of what it returns.
"""

import platform
from collections.abc import Callable
from typing import Any

import jax

from trix_jax.lm.bench.growth import measure_growth
from trix_jax.lm.bench.layers import measure_layers, packed_ratios
from trix_jax.lm.bench.report import write as write
from trix_jax.lm.bench.surroundings import measure_surroundings
from trix_jax.lm.bench.timing import Sizes as Sizes

SIZES = Sizes()


def bench(
    rounds: int = 7,
    report: Callable[[str], None] = print,
    sizes: Sizes = SIZES,
    only_layers: bool = False,
) -> dict[str, Any]:
    """Measures everything. Ratios, greater is better, routing and un-permutation
    included: `forward_vs_dense`, `train_vs_dense` and `decode_vs_dense` are the time of
    the dense FFN of as many parameters over that of TriX (forward; forward and backward
    with ternarization; one token, packed), `forward_vs_one_tile` that of one dense FFN
    as wide as a tile, `packed_vs_unpacked` that of the unpacked frozen layer over the
    packed one, `packed_ratio` float32 bytes over packed bytes. `table` has the shapes.

    Args:
        rounds: how often each function is timed; growth takes half as many.
        report: receives a line for each measurement.
        sizes: of the layers.
        only_layers: leaves `growth` and `surroundings` out.
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
        result |= {"around": measure_surroundings(rounds, report)}
        result |= {"growth": measure_growth(max(rounds // 2, 2), report, sizes)}
    return result


def _cpus() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
