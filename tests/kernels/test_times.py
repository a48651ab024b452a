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


MODULE = """HloModule step

ENTRY %main (t: s32[4], u: s32[1], x: bf16[4,128,256], w: bf16[2,256,512]) -> f32[2,256,512] {
  %t = s32[4]{0} parameter(0)
  %u = s32[1]{0} parameter(1)
  %x = bf16[4,128,256]{2,1,0} parameter(2)
  %w = bf16[2,256,512]{2,1,0} parameter(3)
  %y = bf16[4,128,512]{2,1,0} custom-call(%t, %u, %x, %w), custom_call_target="mosaic_gpu_v2"
  %rows = bf16[512,256]{1,0} bitcast(%x)
  %dy = bf16[512,512]{1,0} bitcast(%y)
  %dw = f32[2,256,512]{2,1,0} custom-call(%u, %u, %rows, %dy), custom_call_target="mosaic_gpu_v2"
  ROOT %copy = f32[2,256,512]{2,1,0} copy(%dw)
}
"""


def test_a_modules_time_is_that_of_its_launches():
    x, w, y = 2 * 4 * 128 * 256, 2 * 2 * 256 * 512, 2 * 4 * 128 * 512
    forward = times.grouped_us(H100, 20 + x + w + y, 4 * 2, 128 * 256 * 256)
    # Half of the 512 rows a tile; `first` and `rows` are one array here.
    outer = times.grouped_us(H100, 4 + x + y + 2 * w, 2 * 2 * 2, 128 * 256 * 256)
    copy = times.product_us(H100, 4 * w, 0)
    found = times.module_us(MODULE, H100)
    np.testing.assert_allclose(found, forward + outer + copy)
    assert times.module_us(MODULE, H100, "no such scope") == 0


def test_a_core_with_more_outputs_refills_its_pipeline_for_each():
    one, three = (times.grouped_us(H100, 8, n, 0) for n in (H100.cores, 3 * H100.cores))
    np.testing.assert_allclose(one, times.LAUNCH + times.FILL, rtol=1e-5)
    np.testing.assert_allclose(three - one, 2 * times.REFILL)
    with_more = times.grouped_us(H100, 8, 3 * H100.cores, 0, refills=2)
    np.testing.assert_allclose(with_more - three, 3 * times.REFILL)
