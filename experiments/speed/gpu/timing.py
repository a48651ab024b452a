"""Functions timed in turn, by the clock around chains of calls and, on a GPU, by CUPTI.

A chain is as many calls as take about `Shapes.chain_seconds`, one handed to the device
behind the other, so that the host's work hides behind the device's where that takes
longer. CUPTI's time is that of the kernels alone, without the gaps between them.
"""

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from experiments.speed.gpu import record
from experiments.speed.gpu.shapes import Shapes
from trix_jax.lm.bench.timing import Case as Chain
from trix_jax.lm.bench.timing import interleaved
from trix_kernels import measure

Row = dict[str, Any]


class Case(NamedTuple):
    """A function to be timed.

    Attributes:
        call: jitted, of `args`.
        needs_gpu: elsewhere it is traced and not run.
    """

    call: Any
    args: tuple
    needs_gpu: bool = False


def on_gpu() -> bool:
    return jax.devices()[0].platform == "gpu"


def timed(cases: dict[str, Case], shapes: Shapes) -> dict[str, Row]:
    """Each case's median and range in microseconds a call, by the clock, and how often
    the first case's time goes into it: above 1 a case is slower than the first.

    A case that only a GPU runs is traced elsewhere, and its row says so. Where one but the
    first cannot run its row says that it `failed`, and the others are timed.
    """
    rows: dict[str, Row] = {}
    chains: dict[str, Chain] = {}
    for name, case in cases.items():
        if case.needs_gpu and not on_gpu():
            jax.eval_shape(case.call, *case.args)
            rows[name] = {"traced_only": True}
            continue
        try:
            calls = _calls(case, shapes)
        except Exception as error:
            if not rows:  # what is measured here, not a rival
                raise
            rows[name] = {"failed": _said(error)}
            continue
        rows[name] = {"calls": calls}
        chains[name] = (_chain(case.call, calls), *case.args)
    for name, seconds in interleaved(chains, shapes.rounds).items():
        each = [1e6 * s / rows[name]["calls"] for s in seconds]
        rows[name] |= summary(each)
    first = next(iter(cases))
    for row in rows.values():
        if "us_of_rounds" in row and "us_of_rounds" in rows[first]:
            pairs = zip(row["us_of_rounds"], rows[first]["us_of_rounds"], strict=True)
            row["times_the_first"] = round(
                statistics.median(a / b for a, b in pairs), 4
            )
    return rows


def summary(each: list[float]) -> Row:
    """Median, range and all of them, in microseconds."""
    return {
        "us": round(statistics.median(each), 3),
        "range_us": [round(min(each), 3), round(max(each), 3)],
        "us_of_rounds": [round(value, 3) for value in each],
    }


def by_cupti(case: Case) -> Row:
    """CUPTI's median of a call, `kernel_us`; None where there is no GPU, or where it says
    why it could not: the clock's time is there.
    """
    if not on_gpu():
        return {"kernel_us": None}
    from jax.experimental.mosaic.gpu import profiler

    try:
        _, taken = profiler.measure(case.call, iterations=measure.ROUNDS)(*case.args)
        if taken is None:
            raise RuntimeError("CUPTI saw no kernel of this call.")
    except Exception as error:
        return {"kernel_us": None, "kernel_error": _said(error)}
    return {"kernel_us": round(1e3 * statistics.median(taken), 3)}


def _said(error: Exception) -> str:
    return record.portable(f"{type(error).__name__}: {error}")[:600]


def _chain(call: Callable, calls: int) -> Callable:
    def run(*args):
        for _ in range(calls - 1):
            call(*args)
        return call(*args)

    return run


def _calls(case: Case, shapes: Shapes) -> int:
    """Calls that take about `chain_seconds`, from the second call of the function."""
    one = {"once": (case.call, *case.args)}
    (seconds,) = interleaved(one, 1)["once"]
    return max(1, min(shapes.most_calls, int(shapes.chain_seconds / seconds)))
