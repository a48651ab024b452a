"""The parts in order of value: what is lost last if the minutes are few."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from experiments.speed.gpu import (
    baselines,
    configurations,
    language_model,
    layer,
    machine,
    products,
    sets,
)
from experiments.speed.gpu.shapes import Shapes
from experiments.speed.gpu.timing import Row


class Part(NamedTuple):
    """A part of the measurement.

    Attributes:
        seconds: that it is allowed for on an H100, compilation included. Estimated; the
            file has what it took.
        rows: measures, row by row.
    """

    about: str
    seconds: int
    rows: Callable[[Shapes], Iterator[Row]]


PARTS = {
    "versions": Part("packages, device, clocks", 3, machine.versions),
    "ceilings": Part("a product and a copy at best", 7, machine.ceilings),
    "checks": Part("grouped products against the oracles", 50, products.checks),
    "products": Part("grouped products beside cuBLAS", 20, products.times),
    "layer": Part("the layer beside dense FFNs", 45, layer.times),
    "sets": Part("tiles in sets beside tile by tile", 5, sets.times),
    "step": Part("the language model's step", 110, language_model.step),
    "losses": Part("its losses beside XLA's path", 30, language_model.losses),
    "baselines": Part("grouped products by others", 35, baselines.times),
    "generation": Part("tokens after a prompt", 60, language_model.generation),
    "router": Part("the router, part by part", 15, layer.router),
    "evaluation": Part("an evaluation", 25, language_model.evaluation),
    "configurations": Part("kernels cut otherwise", 15, configurations.times),
}
