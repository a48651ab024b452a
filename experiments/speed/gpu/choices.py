"""Writes `kernels/trix_kernels/choices.json`: which implementation wins where.

    python -m experiments.speed.gpu.choices

reads `measured/h100.json`. In a class of shapes the kernel is chosen if it is at least as
fast as XLA's path from the same two bits in every case that was timed.
"""

import json
from typing import Any

from experiments.speed.gpu.page import H100, shipped_us
from trix_kernels.aot import CASES
from trix_kernels.choice import PATH, size_of
from trix_kernels.device import ARCHS


def choices() -> list[dict[str, Any]]:
    """The rows of the file."""
    found = json.loads(H100.read_text("utf-8"))
    first, ours = found["first"], shipped_us(found)
    cases = {case.name: case for case in CASES}
    times: dict[tuple[str, str], list[float]] = {}
    for kernel in first["kernels"]:
        if case := cases.get(kernel["name"]):
            kind = case.activations, size_of(case.block)
            ratio = kernel["us"]["xla"] / ours[kernel["name"]]
            times.setdefault(kind, []).append(ratio)
    where = f"{first['device']}, jax {first['versions']['jax']}"
    return [
        {
            "arch": ARCHS[first["capability"]],
            "activations": activations,
            "rows": rows,
            "implementation": "mosaic_gpu" if min(ratios) >= 1 else "xla",
            "reason": f"{_range(ratios)} times as fast as XLA's path ({where})",
        }
        for (activations, rows), ratios in times.items()
    ]


def _range(ratios: list[float]) -> str:
    low, high = (f"{ratio:.1f}" for ratio in (min(ratios), max(ratios)))
    return low if low == high else f"{low} to {high}"


def text() -> str:
    """The file."""
    return json.dumps(choices(), indent=1) + "\n"


def main() -> None:
    PATH.write_text(text(), "utf-8")


if __name__ == "__main__":
    main()
