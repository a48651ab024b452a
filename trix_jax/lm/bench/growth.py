"""Cost as work grows: time and memory against tokens, tiles and width.

Time is that of one call, memory what the compiled program holds at once: arguments,
outputs and temporaries. An exponent `e` is fitted to `cost ~ size^e` by least squares
on logarithms.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from trix_jax.lm.bench import layers
from trix_jax.lm.bench.timing import Case, Sizes, forward, interleaved, tokens, train

AXES = ("tokens", "tiles", "width")
KINDS = ("flat", "hierarchical", "training")


def measure_growth(
    rounds: int, report: Callable[[str], None], sizes: Sizes
) -> dict[str, dict[str, Any]]:
    """For each of `AXES`: `sizes`, and for each of `KINDS` seconds, bytes and their
    exponents; None where a training was left out.

    "flat" and "hierarchical" are frozen forward passes, "training" is the gradient of
    the hierarchical layer.
    """
    found = {}
    for axis, values in zip(AXES, sizes.grow, strict=True):
        points = []
        for value in values:
            shape = dict(zip(AXES, sizes.grow_from, strict=True)) | {axis: value}
            points.append(_point(shape, rounds, sizes))
        row: dict[str, Any] = {"sizes": list(values), "others": dict(sizes_of(sizes))}
        row["others"].pop(axis)
        for kind in KINDS:
            costs = [point.get(kind, (None, None)) for point in points]
            seconds, held = ([c[i] for c in costs] for i in range(2))
            row[kind] = {
                "seconds": seconds,
                "bytes": held,
                "seconds_exponent": exponent(values, seconds),
                "bytes_exponent": exponent(values, held),
            }
            report(
                f"{kind} against {axis}: time ^ {row[kind]['seconds_exponent']:.2f}, "
                f"memory ^ {row[kind]['bytes_exponent']:.2f}"
            )
        found[axis] = row
    return found


def sizes_of(sizes: Sizes) -> dict[str, int]:
    """What stands still while something else grows."""
    return dict(zip(AXES, sizes.grow_from, strict=True))


def exponent(
    sizes: Sequence[int | float], costs: Sequence[int | float | None]
) -> float:
    """The slope of `log cost` over `log size`, over the points that were measured."""
    pairs = [(s, c) for s, c in zip(sizes, costs, strict=True) if c]
    if len(pairs) < 2:
        return float("nan")
    x, y = np.log(np.asarray(pairs, float)).T
    return float(np.polyfit(x, y, 1)[0])


def _point(shape, rounds, sizes):
    d, n, f = shape["width"], shape["tiles"], sizes.tile_width
    x = tokens(shape["tokens"], d)
    flat, deep = layers.flat(d, n, f), layers.hierarchical(d, n, f)
    cases: dict[str, Case] = {
        "flat": (forward(flat), layers.random_frozen(flat, x), x),
        "hierarchical": (forward(deep), layers.random_frozen(deep, x), x),
    }
    if n <= sizes.train_tiles:
        variables: Any = jax.jit(deep.init)(jax.random.key(0), x[:1])
        state = {"routing": variables["routing"]}
        cases["training"] = (train(deep), variables["params"], state, x)
    cases = {name: _compiled(case) for name, case in cases.items()}
    taken = interleaved(cases, rounds)
    return {
        name: (float(np.median(taken[name])), _bytes(case[0]))
        for name, case in cases.items()
    }


def _compiled(case: Case) -> Case:
    call: Any = case[0]
    return (call.lower(*case[1:]).compile(), *case[1:])


def _bytes(compiled: Any) -> int:
    memory = compiled.memory_analysis()
    return int(
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
    )
