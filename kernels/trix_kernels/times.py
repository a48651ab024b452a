"""Time of kernels on a GPU that need not be there, modelled.

    a launch          us = LAUNCH + max(bytes / copy rate, multiply-accumulates / rate)
    packed kernels    the same + FILL a wave of programs, + a launch for joining a split
                      contraction, + one for rounding int8 activations
    grouped products  the same + FILL + REFILL an output that a core computes after its
                      first, and matrix units at work on whole outputs alone

Rates are `SHARE` of the data sheet's. `SHARE` is what an H100 did (2026-11-26, driver
580.159.04, jax 0.12.0.1): 2,933 of 3,350 GB/s in a copy and 830 of 949 TFLOP/s at 8,192
cubed. `LAUNCH` and `FILL` are fitted to its times of cuBLAS's products and of the packed
kernels, all twenty of which come out within 15 % (`experiments/speed/measured/h100.json`; a
test holds 20 %). XLA's own path on packed weights is not among them. `REFILL`, about what a
copy from device memory waits, is an assumption: no grouped product has run on a GPU yet. A
product with elementwise work behind it has two an output.
So is `SHARE` of any other GPU.
"""

import math
from typing import Any

from trix_kernels import hlo
from trix_kernels.gpu_specs import Gpu

Number = int | float

LAUNCH = 2.5  # us
FILL = 2.5  # us from a program's start to its first product, and of its last results
REFILL = 1.0  # us between two outputs of a program that stays on its core
SHARE = 0.875


def product_us(gpu: Gpu, moved: Number, macs: Number) -> float:
    """One launch that moves so many bytes and multiplies so much."""
    return LAUNCH + max(_copy_us(gpu, moved), _macs_us(gpu, macs, gpu.cores))


def packed_us(case: Any, gpu: Gpu, registers: int, smem_bytes: int) -> float:
    """A kernel on packed words.

    Args:
        case: an `aot.Case`, not of the fused FFN.
        registers, smem_bytes: what it was compiled to.
    """
    count, splits = case.programs(gpu)
    resident = min(gpu.shared_bytes // smem_bytes, 512 // registers) or 1
    waves = math.ceil(count * splits / (gpu.cores * resident))
    rows, is_int8 = case.blocks * case.block, case.activations == "int8"
    moved = case.weights / 4 + rows * (
        case.d_in * (1 if is_int8 else 2) + 2 * case.d_out
    )
    macs = case.weights / case.tiles * rows / (2 if is_int8 else 1)
    us = product_us(gpu, moved, macs) + FILL * waves
    if splits > 1:
        us += product_us(gpu, 8 * splits * rows * case.d_out, 0)
    return us + product_us(gpu, 3 * rows * case.d_in, 0) if is_int8 else us


def grouped_us(
    gpu: Gpu, moved: Number, outputs: int, macs: Number, refills: int = 1
) -> float:
    """A grouped product on Hopper.

    Args:
        moved: bytes.
        outputs: that programs share.
        macs: of one of them.
        refills: of an output; 2 where it is stored with elementwise work, which nothing
            overlaps.
    """
    each = math.ceil(outputs / gpu.cores)
    work = max(_copy_us(gpu, moved), _macs_us(gpu, each * macs, 1))
    return LAUNCH + FILL + REFILL * (refills * each - 1) + work


def module_us(text: str, gpu: Gpu, scope: str = "") -> float:
    """All launches of a compiled module, or those whose name has `scope` in it, one after
    the other; of a loop one turn, unless the compiler knows how many there are.
    """
    found = (each for each in hlo.launches(text) if scope in each.name)
    return sum((each.turns * _launch_us(each, gpu) for each in found), 0.0)


def _launch_us(launch: hlo.Launch, gpu: Gpu) -> float:
    if not launch.target.startswith("mosaic_gpu"):
        return product_us(gpu, launch.bytes, launch.macs)
    from trix_kernels.grouped_matmul.hopper import ROWS, columns_of

    arrays = [a for a in launch.operands if a.dtype == "bf16"]
    result = launch.results[0]
    *lead, inputs, outputs = result.sizes
    # `dw` sums over all rows of the blocks, of which there are more than of tokens that
    # are read by number, `y` over the inputs of its row.
    is_outer = result.dtype == "f32"
    contraction = arrays[0].sizes[-1]
    if is_outer:
        contraction = max(a.sizes[0] for a in arrays)
    width = columns_of(outputs)
    count = math.prod(lead) * (inputs // ROWS) * (outputs // width)
    tiles = lead[0] if is_outer else 1
    macs = ROWS * width * contraction / tiles
    refills = min(len(launch.results), 2)
    return grouped_us(gpu, launch.bytes, count, macs, refills)


def _copy_us(gpu, moved):
    return 1e6 * moved / (SHARE * gpu.bandwidth)


def _macs_us(gpu, macs, cores):
    return macs / (SHARE * gpu.macs * gpu.clock_ghz * 1e3 * cores)
