"""The model of time against what an H100 took."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from trix_kernels import times
from trix_kernels.aot import CASES
from trix_kernels.gpu_specs import GPUS
from trix_kernels.measure import FFNS

ROOT = Path(__file__).resolve().parents[2]
MEASURED = json.loads((ROOT / "experiments/speed/measured/h100.json").read_text())
RESOURCES = {
    kernel["name"]: kernel
    for kernel in json.loads((ROOT / "kernels/resources.json").read_text())["h100"]
}
H100 = GPUS["h100"]
CASE = {case.name: case for case in (*CASES, *FFNS)}
TIMES = {kernel["name"]: kernel["us"] for kernel in MEASURED["first"]["kernels"]}
# Measured with blocks of 128 rows, which are not shipped, and with those of 64, which are.
SHIPPED = {
    variant["name"]: {"kernel": variant["us"]}
    for variant in MEASURED["variants"]
    if (variant["rows"], variant["stages"], variant["features"]) == (64, 2, None)
    and variant["block"] == 256
}
PACKED = {
    name: (TIMES | SHIPPED)[name]["kernel"]
    for name in TIMES
    if not CASE[name].hidden and CASE[name].groups == 1
}
WHOLE = {name: us["bfloat16"] for name, us in TIMES.items() if "bfloat16" in us}


def test_rates_are_those_of_the_copy_and_of_the_product_that_were_timed():
    found = MEASURED["first"]["ceilings"]
    peak = 2e-3 * H100.cores * H100.macs * H100.clock_ghz
    np.testing.assert_allclose(found["tflops"], times.SHARE * peak, rtol=0.01)
    copied = times.SHARE * H100.bandwidth / 1e9
    np.testing.assert_allclose(found["gb_per_second"], copied, rtol=0.01)


def test_there_are_twenty_times_to_reproduce():
    assert (len(PACKED), len(WHOLE), len(SHIPPED)) == (9, 11, 2)


@pytest.mark.parametrize("name", PACKED)
def test_packed_kernels_take_what_they_took(name):
    kernel = RESOURCES[name]
    us = times.packed_us(CASE[name], H100, kernel["registers"], kernel["smem_bytes"])
    print(name, round(us / PACKED[name], 2))
    assert abs(us / PACKED[name] - 1) <= 0.2


@pytest.mark.parametrize("name", WHOLE)
def test_products_of_whole_weights_take_what_they_took(name):
    case, rows = CASE[name], CASE[name].tiles * CASE[name].rows
    widths = [w for w in (case.d_in, case.hidden, case.d_out) if w]
    us = sum(
        times.product_us(H100, 2 * (case.tiles * i * o + rows * (i + o)), rows * i * o)
        for i, o in pairwise(widths)
    )
    if case.hidden:  # the activation between the two
        us += times.product_us(H100, 4 * rows * case.hidden, 0)
    print(name, round(us / WHOLE[name], 2))
    assert abs(us / WHOLE[name] - 1) <= 0.2
