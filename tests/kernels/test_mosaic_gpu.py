"""The Mosaic GPU kernels in the GPU interpreter, with race detection.

Shipped and tested code differ in two places (`interpreted`): the interpreter has no
operation on 32 bits of two words, so planes are decoded word by word; and on Hopper it
cannot follow a wgmma whose left operand is in registers, so they go through shared
memory there. That the two decode the same is tested in `test_int8.py`.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu

from trix_jax import SparseTriXFFN, TernaryConfig, TriXLinear, freeze, ops
from trix_kernels import choice, device
from trix_kernels.blocks import make_blocks
from trix_kernels.tile_matmul import blackwell, hopper, reference
from trix_kernels.tile_matmul.api import join, mosaic_scale, splits_of
from trix_kernels.weights import pack

pytestmark = pytest.mark.slow  # the interpreter takes seconds a kernel

ARCHS = ("sm_90a", "sm_100a")
NAN = jnp.nan


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """One CPU device stands in for the GPU: what is asked of it is interpreted."""
    monkeypatch.setattr(device, "unsupported_reason", lambda: None)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield
    plgpu_reset()


def plgpu_reset():
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    gpu_callbacks.reset_gpu_interpret_mode_state()


def matmul(arch, x, weights, scale, tile, used, splits=1):
    words, scale = weights.bits, mosaic_scale(jnp.asarray(scale), weights.bits.shape[1])
    tile, used = jnp.asarray(tile, jnp.int32), jnp.asarray([used], jnp.int32)
    kernel = (hopper if arch == "sm_90a" else blackwell).tile_matmul
    how = {"splits": splits, "interpreted": True}
    y = kernel(x, words, scale, tile, used, **how)
    return join(y, scale, tile, None, x.dtype) if splits > 1 else y


def make(rng, tiles, rows, features, groups=1, scales=(0.25, 0.5, 1.0)):
    q = rng.integers(-1, 2, (tiles, rows, features)).astype(np.float32)
    scale = rng.choice(scales, (tiles, groups, features)).astype(np.float32)
    return q, scale, pack(jnp.asarray(q), jnp.asarray(scale), "planar")


def bfloat16(x):
    return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)


def rows_of(sizes, rows):
    """Tile of each block, and which rows of the blocks are real."""
    blocks = make_blocks(jnp.asarray(sizes), sum(sizes), rows)
    return np.asarray(blocks.tile), np.asarray(blocks.is_row), int(blocks.used[0])


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("d_in", "d_out", "rows", "groups"),
    [(512, 128, 16, 1), (384, 128, 8, 1), (512, 128, 32, 4), (256, 256, 64, 1)],
)
def test_matmul_is_exact_on_integers(arch, d_in, d_out, rows, groups):
    rng = np.random.default_rng(0)
    q, scale, weights = make(rng, 3, d_in, d_out, groups)
    x = rng.integers(-4, 5, (4, rows, d_in)).astype(np.float32)
    x[3] = np.nan  # not used: never read
    tile = np.array([0, 2, 2, 1])
    y = matmul(arch, jnp.asarray(x, jnp.bfloat16), weights, scale, tile, 3)
    expected = bfloat16(reference.tile_matmul(x, q, scale, tile))
    np.testing.assert_array_equal(np.asarray(y, np.float32)[:3], expected[:3])
    assert np.isnan(np.asarray(y, np.float32)[3]).all()  # not used: never written


@pytest.mark.parametrize("arch", ARCHS)
def test_every_pattern_of_empty_groups(arch):
    rng = np.random.default_rng(1)
    q, scale, weights = make(rng, 3, 128, 128)
    for full in itertools.product([False, True], repeat=3):
        sizes = [5 * is_full + 6 * is_full * n for n, is_full in enumerate(full)]
        if not sum(sizes):
            continue
        tile, is_row, used = rows_of(sizes, 8)
        x = rng.integers(-4, 5, (*is_row.shape, 128)).astype(np.float32)
        y = matmul(arch, jnp.asarray(x, jnp.bfloat16), weights, scale, tile, used)
        expected = bfloat16(reference.tile_matmul(x, q, scale, tile))
        np.testing.assert_array_equal(np.asarray(y, np.float32)[:used], expected[:used])


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("sizes", [[8, 16, 0], [7, 8, 9], [0, 0, 24], [24, 0, 0]])
def test_groups_that_end_at_or_beside_the_edge_of_a_block(arch, sizes):
    rng = np.random.default_rng(7)
    q, scale, weights = make(rng, 3, 128, 128)
    tile, is_row, used = rows_of(sizes, 8)
    assert used == sum(-(-size // 8) for size in sizes)
    x = np.where(is_row[..., None], rng.integers(-4, 5, (*is_row.shape, 128)), np.nan)
    y = matmul(arch, jnp.asarray(x, jnp.bfloat16), weights, scale, tile, used)
    expected = bfloat16(reference.tile_matmul(x, q, scale, tile))
    np.testing.assert_array_equal(np.asarray(y, np.float32)[:used], expected[:used])
    assert np.isfinite(expected[is_row]).all()


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("rows", [8, 64])
def test_a_split_contraction_is_exact_on_integers(arch, rows):
    rng = np.random.default_rng(8)
    q, scale, weights = make(rng, 2, 2048, 128)
    x = rng.integers(-4, 5, (2, rows, 2048)).astype(np.float32)
    splits = splits_of(32, 132, 2048, 1)
    assert splits == 4
    y = matmul(arch, jnp.asarray(x, jnp.bfloat16), weights, scale, [1, 0], 2, splits)
    expected = bfloat16(reference.tile_matmul(x, q, scale, [1, 0]))
    np.testing.assert_array_equal(np.asarray(y, np.float32), expected)


@pytest.mark.parametrize("arch", ARCHS)
@settings(max_examples=6, deadline=None)
@given(st.data())
def test_matmul_over_shapes_and_groups(arch, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    sizes = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=4))
    sizes[0] += not sum(sizes)
    rows = data.draw(st.sampled_from([8, 16]))
    d_in = 128 * data.draw(st.integers(1, 3))
    q, scale, weights = make(rng, len(sizes), d_in, 128)
    tile, is_row, used = rows_of(sizes, rows)
    x = rng.integers(-4, 5, (*is_row.shape, d_in)).astype(np.float32)
    y = matmul(arch, jnp.asarray(x, jnp.bfloat16), weights, scale, tile, used)
    expected = bfloat16(reference.tile_matmul(x, q, scale, tile))
    np.testing.assert_array_equal(np.asarray(y, np.float32)[:used], expected[:used])


@pytest.mark.parametrize("arch", ARCHS)
def test_error_on_real_numbers_is_that_of_bfloat16(arch):
    rng = np.random.default_rng(2)
    q, scale, weights = make(rng, 2, 512, 128, scales=(0.0173, 0.0312))
    scale = np.asarray(weights.scale, np.float32)
    x = bfloat16(rng.normal(size=(2, 16, 512)))
    exact = reference.tile_matmul(x, q, scale, [1, 0])
    y = matmul(arch, jnp.asarray(x, jnp.bfloat16), weights, scale, [1, 0], 2)
    error = np.abs(np.asarray(y, np.float64) - exact).max()
    assert 0 < error <= 1.5 * np.abs(bfloat16(exact) - exact).max()


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_poisoned_row_stays_alone(arch, poison):
    rng = np.random.default_rng(3)
    q, scale, weights = make(rng, 2, 128, 128)
    x = rng.integers(-4, 5, (2, 8, 128)).astype(np.float32)
    x[0, 3, 17] = poison
    y = matmul(arch, jnp.asarray(x, jnp.bfloat16), weights, scale, [1, 0], 2)
    y = np.asarray(y, np.float32)
    clean = np.ones((2, 8), bool)
    clean[0, 3] = False
    expected = bfloat16(
        reference.tile_matmul(np.nan_to_num(x, posinf=0), q, scale, [1, 0])
    )
    np.testing.assert_array_equal(y[clean], expected[clean])
    assert not np.isfinite(y[0, 3][q[1, 17] != 0]).any()


@pytest.fixture
def ran(monkeypatch):
    """What the ops call: the kernels, for the interpreter, each noting its splits."""
    calls = []

    def noting(kernel, *args, **how):
        calls.append((kernel.__module__.split(".")[-1], how.get("splits")))
        return kernel(*args, **how, interpreted=True)

    for module in (hopper, blackwell):
        note = functools.partial(noting, module.tile_matmul)
        monkeypatch.setattr(module, "tile_matmul", note)
    return calls


def test_a_frozen_layer_runs_the_packed_kernels(monkeypatch, ran):
    monkeypatch.setattr(device, "arch", lambda *_: "sm_100a")
    layer = SparseTriXFFN(128, num_tiles=4, expansion=4, dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (24, 128))
    variables = layer.init(jax.random.key(1), x)
    frozen = freeze(layer, variables, x)
    assert frozen["packed"]["tiles"]["up"]["bits"].dtype == jnp.uint16
    by_default = layer.apply(frozen, x)[0]
    assert ran == []  # no GPU has timed them
    y = layer.clone(implementation="mosaic_gpu").apply(frozen, x)[0]
    assert ran == 2 * [("blackwell", 1)]
    np.testing.assert_allclose(y, by_default, rtol=0.05, atol=0.05 * np.abs(y).max())
    trained = layer.apply(variables, x)[0]
    error = np.abs(np.asarray(y - trained, np.float64)).max()
    assert error <= 0.05 * np.abs(np.asarray(trained)).max()


@pytest.mark.parametrize(
    ("arch", "activations"),
    [("sm_90a", "float"), ("sm_90a", "int8"), ("sm_100a", "float")],
)
def test_a_frozen_linear_layer_runs_the_packed_kernel(
    monkeypatch, ran, arch, activations
):
    monkeypatch.setattr(device, "arch", lambda *_: arch)
    measured = choice.Choice("mosaic_gpu", "as if measured")
    monkeypatch.setattr(choice, "choose", lambda *_: measured)
    config = TernaryConfig(activations=activations)
    layer = TriXLinear(256, num_tiles=4, ternary=config, dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (5, 1024), jnp.bfloat16)
    variables = layer.init(jax.random.key(1), x)
    frozen = freeze(layer, variables, x)
    y, trained = (
        np.asarray(layer.apply(v, x), np.float32) for v in (frozen, variables)
    )
    assert ran == [("hopper" if arch == "sm_90a" else "blackwell", 2)]
    # The sums of integers are exact whatever their order, those of floats are not.
    tolerance = 0 if activations == "int8" else 2**-7
    np.testing.assert_allclose(y, trained, rtol=tolerance, atol=tolerance)
    assert ops.least_rows(ops.Packed(**frozen["packed"]["kernel"])) == 8
