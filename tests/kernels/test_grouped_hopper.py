"""Hopper's grouped products in the GPU interpreter, with race detection.

The interpreter runs a wgmma at once; that nothing else overwrites what one reads is held
by the waits, which it does follow. That all six products of a training step compile
without spills is in `test_aot.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from trix_jax.dispatch import make_plan
from trix_jax.grouped_ffn import Inputs, grouped_ffn
from trix_kernels import (
    choice,
    device,
    grouped_matmul,
    grouped_outer,
    transposed_matmul,
)
from trix_kernels.grouped_matmul import copying, hopper, reference

pytestmark = pytest.mark.slow  # the interpreter takes seconds a kernel

ROWS = hopper.ROWS
LOADS = {  # rows of each tile; all need a mask in some step but the first
    "full blocks": [128, 256],
    "skewed": [1, 200, 65],
    "empty tiles": [0, 130, 0, 64],
    "one tile takes all": [0, 0, 301],
}


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """One CPU device stands in for a GPU of few cores: what is asked of it is
    interpreted.
    """
    monkeypatch.setattr(device, "unsupported_reason", lambda: None)
    monkeypatch.setattr(device, "arch", lambda: "sm_90a")
    measured = choice.Choice("mosaic_gpu", "")
    monkeypatch.setattr(choice, "choose_whole", lambda arch: measured)
    monkeypatch.setattr(hopper, "CORES", 2)  # several outputs a program
    monkeypatch.setattr(copying, "COPY", copying.INTERPRETED)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    gpu_callbacks.reset_gpu_interpret_mode_state()


def blocks_of(counts):
    """Blocks of a plan whose tiles get `counts` rows: tile and filled rows of each."""
    tiles = np.random.default_rng(0).permutation(np.repeat(range(len(counts)), counts))
    plan = make_plan(jnp.asarray(tiles[:, None]), len(counts), ROWS)
    filled = (np.asarray(plan.source) < tiles.size).sum(axis=1)
    return np.asarray(plan.block_tile), filled


def integers(rng, filled, width, padding=np.nan):
    x = rng.integers(-3, 4, (len(filled), ROWS, width)).astype(np.float32)
    return np.where(counted(filled)[..., None], x, padding)


def counted(filled):
    return np.arange(ROWS)[None] < filled[:, None]


def bfloat16(x):
    return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)


def case(counts, inputs, outputs, padding=np.nan):
    rng = np.random.default_rng(1)
    tile, filled = blocks_of(counts)
    x, dy = (integers(rng, filled, width, padding) for width in (inputs, outputs))
    w = rng.integers(-1, 2, (len(counts), inputs, outputs)).astype(np.float32)
    return x, dy, w, tile, filled


@pytest.mark.parametrize("loads", LOADS)
@pytest.mark.parametrize("transposed", [False, True])
def test_matmul_is_exact_on_integers(loads, transposed):
    x, dy, w, tile, filled = case(LOADS[loads], 128, 128)
    call, oracle, left = grouped_matmul, reference.grouped_matmul, x
    if transposed:
        call, oracle, left = transposed_matmul, reference.transposed_matmul, dy
    args = jnp.asarray(left, jnp.bfloat16), jnp.asarray(w), jnp.asarray(tile)
    y = np.asarray(call(*args, jnp.asarray(filled)), np.float32)
    rows = counted(filled)
    np.testing.assert_array_equal(y[rows], bfloat16(oracle(left, w, tile))[rows])
    assert np.isnan(y[filled == 0]).all()  # neither read nor written


@pytest.mark.parametrize("loads", LOADS)
def test_outer_product_is_exact_on_integers(loads):
    x, dy, _, tile, filled = case(LOADS[loads], 128, 128)
    tiles = len(LOADS[loads])
    args = jnp.asarray(x, jnp.bfloat16), jnp.asarray(dy, jnp.bfloat16)
    dw = grouped_outer(*args, jnp.asarray(tile), tiles, jnp.asarray(filled))
    assert dw.dtype == jnp.float32
    expected = reference.grouped_outer(x, dy, tile, filled, tiles)
    np.testing.assert_array_equal(dw, expected)


@pytest.mark.parametrize(("inputs", "outputs"), [(512, 384), (256, 512)])
def test_wide_matrices_of_several_outputs_and_more_steps_than_stages(inputs, outputs):
    x, dy, w, tile, filled = case([70, 0, 130], inputs, outputs)
    blocks = [jnp.asarray(a, jnp.bfloat16) for a in (x, dy)]
    at, rows = (jnp.asarray(tile), jnp.asarray(filled)), counted(filled)
    y, dx = (
        np.asarray(call(a, jnp.asarray(w), *at), np.float32)[rows]
        for call, a in zip((grouped_matmul, transposed_matmul), blocks, strict=True)
    )
    dw = grouped_outer(*blocks, at[0], 3, at[1])
    expected = reference.grouped_matmul(x, w, tile)[rows]
    np.testing.assert_array_equal(y, bfloat16(expected))
    expected = reference.transposed_matmul(dy, w, tile)[rows]
    np.testing.assert_array_equal(dx, bfloat16(expected))
    np.testing.assert_array_equal(dw, reference.grouped_outer(x, dy, tile, filled, 3))


def test_error_on_real_numbers_is_that_of_bfloat16():
    rng = np.random.default_rng(3)
    x, w = (
        bfloat16(rng.normal(size=(1, ROWS, 512))),
        bfloat16(rng.normal(size=(1, 512, 128))),
    )
    zero = jnp.zeros(1, jnp.int32)
    y = grouped_matmul(jnp.asarray(x, jnp.bfloat16), jnp.asarray(w), zero)
    exact = reference.grouped_matmul(x, w, [0])
    error = np.abs(np.asarray(y, np.float64) - exact).max()
    assert 0 < error <= 1.5 * np.abs(bfloat16(exact) - exact).max()


def test_gradients_and_tangents_are_those_of_the_xla_path():
    x, dy, w, tile, filled = case([130, 0, 20], 128, 128, padding=0)
    x, dy = jnp.asarray(x, jnp.bfloat16), jnp.asarray(dy, jnp.bfloat16)
    at, w = (jnp.asarray(tile), jnp.asarray(filled)), jnp.asarray(w)

    def derivatives(x, w, dy, implementation):
        call = functools.partial(grouped_matmul, implementation=implementation)
        y, pull = jax.vjp(lambda x, w: call(x, w, *at), x, w)
        _, tangent = jax.jvp(lambda w: call(x, w, *at), (w,), (w + 1,))
        return y, tangent, *pull(dy)

    rows = counted(filled)
    ours, theirs = (derivatives(x, w, dy, how) for how in ("mosaic_gpu", "xla"))
    assert [a.dtype for a in ours] == [a.dtype for a in theirs]
    *blocks, dw = zip(ours, theirs, strict=True)
    for found, expected in blocks:
        np.testing.assert_array_equal(
            np.asarray(found, np.float32)[rows], np.asarray(expected, np.float32)[rows]
        )
    np.testing.assert_array_equal(*dw)


def test_an_ffn_and_its_backward_pass_err_no_more_than_by_xla():
    rng = np.random.default_rng(4)
    tiles = jnp.asarray(rng.integers(0, 2, 40)[:, None] * [1, 2] + [0, 1])  # 0 to 3
    mask = jnp.arange(40) < 36

    def drawn(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    inputs = Inputs(
        drawn(40, 128).astype(jnp.bfloat16),
        drawn(40, 2),
        drawn(4, 128, 128) / 11,
        drawn(4, 128, 128) / 11,
    )
    dy = drawn(40, 128)
    plan = make_plan(tiles, 4, ROWS, mask)

    def pulled(inputs, implementation):
        act = jax.nn.silu
        y, pull = jax.vjp(
            lambda inputs: grouped_ffn(inputs, plan, act, implementation, mask), inputs
        )
        return y, *pull(dy.astype(y.dtype))[0]

    exact = pulled(inputs._replace(x=inputs.x.astype(jnp.float32)), "xla")
    found, expected = pulled(inputs, "mosaic_gpu"), pulled(inputs, "xla")
    for ours, theirs, true in zip(found, expected, exact, strict=True):
        assert ours.dtype == theirs.dtype
        error, bound = (
            np.abs(np.asarray(a, np.float32) - np.asarray(true, np.float32)).max()
            for a in (ours, theirs)
        )
        assert 0 < error <= 1.5 * bound
