"""Checking and timing kernels on a GPU, as far as a CPU can run it."""

import json

import jax
import jax.numpy as jnp
import pytest

from trix_kernels import device, measure
from trix_kernels.aot import Case

SMALL = (
    Case("tile_matmul", 3, 16, 16, 256, 64),
    Case("tile_matmul", 3, 16, 16, 256, 64, groups=2),
    Case("tile_matmul", 3, 16, 16, 256, 64, activations="int8"),
    Case("tile_ffn", 3, 16, 16, 256, 128, hidden=128),
)

most_cases = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=pytest.mark.slow if i else [])
        for i, case in enumerate(SMALL)
    ],
)


@most_cases
def test_xla_passes_the_check_and_a_wrong_bit_does_not(case, monkeypatch):
    measure.check(case, "xla")
    call_of = measure._call

    def wrong(*args):
        return lambda *inputs: call_of(*args)(*inputs).at[1, 3, 5].set(12345)

    monkeypatch.setattr(measure, "_call", wrong)
    with pytest.raises(AssertionError, match=r"Mismatched elements: 1 /"):
        measure.check(case, "xla")


def test_a_result_that_moves_from_run_to_run_fails_the_check(monkeypatch):
    call_of, runs = measure._call, iter(range(99))

    def racing(*args):
        def call(*inputs):
            return call_of(*args)(*inputs).at[0, 0, 0].add(next(runs) > 2)

        return call

    monkeypatch.setattr(measure, "_call", racing)
    with pytest.raises(AssertionError, match="run again"):
        measure.check(SMALL[0], "xla")


def test_activations_rounded_by_more_than_one_fail_the_check(monkeypatch):
    def off_by_two(x):
        values, scale = quantize(x)
        return values.at[0, 0, 0].add(jnp.where(values[0, 0, 0] > 0, -2, 2)), scale

    quantize = measure.quantize
    monkeypatch.setattr(measure, "quantize", off_by_two)
    with pytest.raises(AssertionError, match="x < y"):
        measure.check(SMALL[2], "xla")


@most_cases
def test_what_is_timed_is_every_way_on_several_sets_of_inputs(case, monkeypatch):
    timed = []

    def seconds(call, sets):
        shapes = {jax.eval_shape(call, *args).shape for args in sets}
        timed.append((shapes, len(sets)))
        return [len(timed) * 1e-6, 9e-6, len(timed) * 1e-6]

    monkeypatch.setattr(device, "unsupported_reason", lambda: None)
    monkeypatch.setattr(device, "arch", lambda: "sm_90a")
    monkeypatch.setattr(measure, "CACHE_BYTES", 2e5)
    monkeypatch.setattr(measure, "seconds", seconds)
    told = measure.time(case)
    ways, left_out = ["kernel", "xla", "bfloat16"], set()
    if case.activations == "int8" or case.groups > 1:
        left_out.add("bfloat16")
    assert list(told["us"]) == [way for way in ways if way not in left_out]
    assert list(told["us"].values()) == list(range(1, len(told["us"]) + 1))
    assert timed[0][1] > 1
    # Blocks of a tile follow each other, so all are as many rows and outputs.
    assert all(shapes == {(3, 16, case.d_out)} for shapes, _ in timed)


def test_without_a_gpu_it_says_why_not(tmp_path):
    with pytest.raises(NotImplementedError, match=r"need a GPU\. This is cpu"):
        measure.main(tmp_path / "gpu.json")


def test_a_failed_check_is_named_counted_and_not_timed(tmp_path, monkeypatch):
    def check(case):
        if case is SMALL[1]:
            raise AssertionError("not equal")

    monkeypatch.setattr(measure, "unsupported_reason", lambda: None)
    monkeypatch.setattr(measure, "EDGES", SMALL[:1])
    monkeypatch.setattr(measure, "CASES", SMALL[1:3])
    monkeypatch.setattr(measure, "FFNS", SMALL[3:])
    monkeypatch.setattr(measure, "check", check)
    monkeypatch.setattr(measure, "ceilings", lambda: {"tflops": 1.0})
    monkeypatch.setattr(measure, "time", lambda case: {"name": case.name})
    output = tmp_path / "gpu.json"
    assert measure.main(output) == 1
    told = json.loads(output.read_text())
    assert told["failed"] == [SMALL[1].name]
    assert [kernel["name"] for kernel in told["kernels"]] == [
        case.name for case in SMALL[2:]
    ]
