"""Writes `kernels/trix_kernels/choices.json`: which implementation wins where.

    python -m experiments.speed.gpu.choices

reads `measured/h100.json` for packed weights. In a class of shapes the kernel is chosen if
it is at least as fast as XLA's path from the same two bits in every case that was timed.

For whole weights, as in training, it reads `measured/measured.jsonl`, once one is
committed. The kernels are chosen if the layer, forward and backward, is at least as fast
with them as by XLA at every number of tiles. There is no row while a part that they need
is missing, or has an error or a check that failed.
"""

import json
from typing import Any

from experiments.speed.gpu import page, record
from experiments.speed.gpu.page import H100, shipped_us
from experiments.speed.gpu.shapes import FULL
from trix_kernels.aot import CASES
from trix_kernels.choice import PATH, size_of
from trix_kernels.device import ARCHS

NEEDED = {"versions", "checks", "layer", "losses"}


def choices() -> list[dict[str, Any]]:
    """The rows of the file."""
    return packed() + whole()


def packed() -> list[dict[str, Any]]:
    """The rows of packed weights."""
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


def whole() -> list[dict[str, Any]]:
    """The row of whole weights, where everything that it needs was measured."""
    lines = [line for line in record.read(page.GPU) if line["shapes"] == FULL.name]
    last = {line["part"]: line for line in lines}
    if not record.measured(lines) >= NEEDED:
        return []
    rows = last["layer"]["rows"]
    timed = [row for row in rows if row.get("what") == "forward and backward"]
    kernels = [row for row in timed if row["way"] == "trix"]
    if any(row.get("implementation") != "mosaic_gpu" for row in kernels):
        return []  # of a GPU without them
    xla = {row["tiles"]: row["us"] for row in timed if row["way"] == "trix, xla"}
    ratios = [xla[row["tiles"]] / row["us"] for row in kernels]
    version = next(row for row in last["versions"]["rows"] if "capability" in row)
    where = f"{last['layer']['device']}, jax {version['packages']['jax']}"
    return [
        {
            "arch": ARCHS[version["capability"]],
            "weights": "whole",
            "implementation": "mosaic_gpu" if min(ratios) >= 1 else "xla",
            "reason": f"{_range(ratios)} times as fast as XLA's path ({where})",
        }
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
