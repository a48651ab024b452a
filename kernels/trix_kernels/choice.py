"""Which implementation `None` is, where more than one runs: by committed measurements.

`choices.json` has a row for each architecture, kind of activations and class of shapes of
packed weights, and one for each architecture's grouped products of whole weights.
`experiments.speed.gpu.choices` writes it from what was measured on a GPU. What no GPU has
timed is XLA.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from trix_kernels.device import Arch
from trix_kernels.quantize import Activations

PATH = Path(__file__).with_name("choices.json")
FEW_ROWS = 16  # of a block: at most so many are few, where weights are the traffic
SIZES = (FEW_ROWS, FEW_ROWS + 1)  # rows of either class
Size = Literal["few", "many"]
UNMEASURED = "not measured on a GPU yet"


class Choice(NamedTuple):
    """What `None` is, and why."""

    implementation: Literal["mosaic_gpu", "xla"]
    reason: str


def size_of(rows: int) -> Size:
    """The class of blocks of so many rows."""
    return "few" if rows <= FEW_ROWS else "many"


def choose(arch: Arch, rows: int, activations: Activations = "float") -> Choice:
    """What `None` is on an architecture for packed weights, in blocks of `rows` rows."""
    kind = {"arch": arch, "activations": activations, "rows": size_of(rows)}
    for row in _table():
        if kind.items() <= row.items():
            return Choice(row["implementation"], row["reason"])
    return Choice("xla", UNMEASURED)


def choose_whole(arch: Arch) -> Choice:
    """What `None` is on an architecture for grouped products of whole weights, as in
    training.
    """
    kind = {"arch": arch, "weights": "whole"}
    for row in _table():
        if kind.items() <= row.items():
            return Choice(row["implementation"], row["reason"])
    return Choice("xla", UNMEASURED)


def told(arch: Arch) -> list[str]:
    """The choices of an architecture for packed weights, a sentence each."""
    lines = []
    for activations in ("float", "int8"):
        for rows, what in zip(SIZES, (f"up to {FEW_ROWS}", "more"), strict=True):
            chosen = choose(arch, rows, activations)
            about = f"packed weights, {activations} activations, blocks of {what} rows"
            lines.append(f"{about}: {chosen.implementation}, {chosen.reason}")
    return lines


@cache
def _table() -> list[dict[str, Any]]:
    return json.loads(PATH.read_text("utf-8"))
