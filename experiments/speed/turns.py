"""Calls timed in turn, in processor time: on a machine that others use, only ratios of one
process say anything.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax


def in_turn(
    calls: Mapping[str, Callable[[], Any]], rounds: int, times: int = 1
) -> dict[str, list[float]]:
    """Seconds of `times` calls of each, round by round."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.process_time()
            for _ in range(times):
                jax.block_until_ready(call())
            found[name].append(time.process_time() - began)
    return found


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """The ratio of the medians, and the least and greatest ratio of a round."""
    rounds = sorted(a / b for a, b in zip(above, below, strict=True))
    middle = statistics.median(above) / statistics.median(below)
    return {"ratio": middle, "low": rounds[0], "high": rounds[-1]}
