"""Int8 activations: rounding, exact sums, the layers in training and frozen."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu
from optimized import jit

import trix_kernels
from trix_jax import SparseTriXFFN, TernaryConfig, TriXLinear, freeze, ops
from trix_kernels import block_ffn, block_matmul, device, ternary_matmul, tile_matmul
from trix_kernels.quantize import LONGEST, quantize
from trix_kernels.tile_matmul import hopper, reference
from trix_kernels.tile_matmul.api import mosaic_scale
from trix_kernels.weights import interleave, pack

INT8 = TernaryConfig(activations="int8")
relu = functools.partial(jnp.maximum, 0)


def weights(rng, tiles, rows, features, groups=1, layout="planar"):
    q = rng.integers(-1, 2, (tiles, rows, features)).astype(np.float32)
    scale = rng.lognormal(size=(tiles, groups, features)).astype(np.float32)
    return pack(jnp.asarray(q), jnp.asarray(scale), layout)


def tokens(rng, *shape, dtype=jnp.float32):
    """Real numbers of many magnitudes, and a zero token."""
    x = rng.normal(size=shape) * rng.lognormal(sigma=3, size=(*shape[:-1], 1))
    x[..., -1, :] = 0
    return jnp.asarray(x, dtype)


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(st.integers(0, 99), st.integers(1, 70), st.sampled_from(["float32", "bfloat16"]))
def test_rounding_equals_the_oracle_bit_for_bit(seed, width, dtype):
    x = tokens(np.random.default_rng(seed), 9, width, dtype=dtype)
    for function in (quantize, jit(quantize)):
        values, scale = function(x)
        expected, expected_scale = reference.quantize(x)
        np.testing.assert_array_equal(values, expected)
        np.testing.assert_array_equal(scale, expected_scale)
    restored = np.asarray(values * scale, np.float64)
    assert np.abs(restored - np.asarray(x, np.float64)).max() <= 0.51 * scale.max()


def test_the_largest_of_a_token_becomes_127_and_zero_tokens_stay_zero():
    x = jnp.asarray([[0.5, -2.0, 0.0], [0.0, 0.0, 0.0], [1e-40, -1e-40, 0], [3, 3, 3]])
    values, scale = quantize(x)
    expected = [[32, -127, 0], [0, 0, 0], [0, 0, 0], [127, 127, 127]]
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(scale[1:3], 1)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize(
    "poison",
    [np.nan, *(pytest.param(x, marks=pytest.mark.slow) for x in (np.inf, -np.inf))],
)
@pytest.mark.parametrize("name", ["xla", "reference"])
def test_a_token_that_is_not_finite_gives_nan_alone(name, poison):
    rng = np.random.default_rng(0)
    w = weights(rng, 2, 128, 64)
    x = tokens(rng, 2, 8, 128)
    y = block_matmul(
        x.at[1, 3, 5].set(poison),
        w,
        jnp.asarray([1, 0]),
        64,
        activations="int8",
        implementation=name,
    )
    clean = block_matmul(x, w, jnp.asarray([1, 0]), 64, activations="int8")
    assert np.isnan(np.asarray(y[1, 3])).all()
    np.testing.assert_array_equal(y.at[1, 3].set(0), clean.at[1, 3].set(0))


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(st.data())
def test_tile_matmul_equals_the_oracle_bit_for_bit(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    sizes = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=4))
    sizes[0] += not sum(sizes)
    groups, width = data.draw(st.sampled_from([(1, 128), (1, 256), (2, 256)]))
    layout = data.draw(st.sampled_from(["rows", "planar"]))
    w = weights(rng, len(sizes), width, 64, groups, layout)
    x = tokens(rng, sum(sizes), width, dtype=data.draw(st.sampled_from(["float32", "bfloat16"])))  # fmt: skip
    y = tile_matmul(x, w, jnp.asarray(sizes), 64, activations="int8")
    q, scale = trix_kernels.unpack(w, 64)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    expected = reference.tile_matmul_int8(
        np.asarray(x, np.float32)[:, None], np.asarray(q), np.asarray(scale), owner
    )[:, 0]
    np.testing.assert_array_equal(y, jnp.asarray(expected, x.dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["rows", "planar"])
def test_the_reference_and_xla_agree_bit_for_bit_on_every_op(layout, dtype):
    rng = np.random.default_rng(2)
    up = weights(rng, 3, 128, 128, layout=layout)
    down = weights(rng, 3, 128, 64, layout=layout)
    one = trix_kernels.Packed(up.bits[0], up.scale[0])
    x = tokens(rng, 4, 8, 128, dtype=dtype)
    tile = jnp.asarray([0, 2, 2, 1])
    calls = [
        lambda **how: ternary_matmul(x[0], one, 128, **how),
        lambda **how: block_matmul(x, up, tile, 128, **how),
        lambda **how: block_ffn(x, up, down, tile, (128, 64), relu, **how),
    ]
    for call in calls:
        got = call(implementation="xla", activations="int8")
        assert got.dtype == x.dtype
        expected = call(implementation="reference", activations="int8")
        np.testing.assert_array_equal(got, expected)
        np.testing.assert_array_equal(got, call(activations="int8"))
        assert (np.asarray(got) != np.asarray(call(implementation="xla"))).any()


@pytest.mark.slow
def test_the_longest_sum_is_exact_and_a_longer_one_refused():
    x = jnp.ones((1, 1, LONGEST))
    q, scale = jnp.ones((1, LONGEST, 4)), jnp.ones((1, 1, 4))
    w = pack(q, scale)
    y = block_matmul(x, w, jnp.zeros(1, jnp.int32), 4, activations="int8")
    factor = np.float32(1) * np.float32(1 / 127)  # the scale of a token of ones
    np.testing.assert_array_equal(y, np.float32(127 * LONGEST) * factor)
    with pytest.raises(ValueError, match=f"at most {LONGEST}. Got {LONGEST + 1}"):
        quantize(jnp.ones((1, LONGEST + 1)))


def layers(config, width=128):
    return [
        SparseTriXFFN(width, num_tiles=2, expansion=2, ternary=config),
        TriXLinear(64, num_tiles=2, ternary=config),
    ]


def output(result):
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize(
    ("which", "granularity", "dtype"),
    [
        (1, "channel", "bfloat16"),
        *[
            pytest.param(which, granularity, dtype, marks=pytest.mark.slow)
            for which in (0, 1)
            for granularity in ("tile", "group")
            for dtype in ("float32", "bfloat16")
        ],
    ],
)
def test_a_frozen_layer_equals_the_trained_one_bit_for_bit(which, granularity, dtype):
    layer = layers(dataclasses.replace(INT8, granularity=granularity), 256)[which]
    x = tokens(np.random.default_rng(3), 12, 256, dtype=dtype)  # two groups
    variables = jit(layer.init)(jax.random.key(1), x)
    frozen = freeze(layer, variables, x)
    run = jit(lambda v: output(layer.apply(v, x)))
    np.testing.assert_array_equal(run(frozen), run(variables))


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_a_float_model_serves_int8_by_its_config_alone(which):
    x = jax.random.normal(jax.random.key(0), (32, 128))
    trained, served = layers(TernaryConfig())[which], layers(INT8)[which]
    frozen = freeze(trained, trained.init(jax.random.key(1), x), x)
    y, y8 = (np.asarray(output(layer.apply(frozen, x))) for layer in (trained, served))
    error = np.sqrt(np.mean((y8 - y) ** 2) / np.mean(y**2))
    assert 0 < error < 0.03


@pytest.mark.slow
def test_gradients_pass_straight_through_the_rounding():
    rng = np.random.default_rng(4)
    layer = layers(INT8)[1]
    x = tokens(rng, 5, 128)
    variables = layer.init(jax.random.key(1), x)
    dy = jnp.asarray(rng.normal(size=(5, 64)), jnp.float32)

    def loss(params, x):
        return (layer.apply({"params": params}, x) * dy).sum()

    def expected(params, x):
        values, scale = jax.lax.stop_gradient(quantize(x))
        rounded = x + jax.lax.stop_gradient(values * scale - x)
        plain = layer.clone(ternary=TernaryConfig())
        return (plain.apply({"params": params}, rounded) * dy).sum()

    got = jax.grad(loss, (0, 1))(variables["params"], x)
    wanted = jax.grad(expected, (0, 1))(variables["params"], x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
    assert (np.asarray(got[1])[-1] != 0).any()  # the zero token has one too


@pytest.mark.slow
@pytest.mark.parametrize(
    ("which", "dtype"),
    [
        (1, "float32"),
        (1, "float16"),
        (0, "bfloat16"),
    ],
)
def test_the_gradient_to_the_input_of_a_frozen_layer_is_that_of_training(which, dtype):
    layer, x = layers(INT8)[which], tokens(np.random.default_rng(4), 5, 128)
    x = jnp.clip(x, -100, 100).astype(dtype)
    variables = jit(layer.init)(jax.random.key(1), x)
    dy = jax.random.normal(jax.random.key(2), (128 if which == 0 else 64,), x.dtype)

    def loss(x, v):
        return (output(layer.apply(v, x)) * dy[None]).sum().astype(jnp.float32)

    both = jit(jax.value_and_grad(loss))
    trained, frozen = both(x, variables), both(x, freeze(layer, variables, x))
    np.testing.assert_array_equal(frozen[0], trained[0])
    np.testing.assert_array_equal(frozen[1], trained[1])
    assert (np.asarray(trained[1])[:4] != 0).mean() > 0.9  # the last token is zero


def test_an_unknown_kind_of_activations_is_refused(no_type_hook):
    with pytest.raises(ValueError, match="activations must be one of float, int8"):
        TernaryConfig(activations="int4")


def test_mosaic_says_where_it_takes_no_int8(monkeypatch):
    rng = np.random.default_rng(2)
    w, narrow = weights(rng, 1, 256, 128), weights(rng, 1, 128, 128)
    x, tile = jnp.ones((1, 8, 256), jnp.bfloat16), jnp.zeros(1, jnp.int32)
    how = {"activations": "int8", "implementation": "mosaic_gpu"}
    monkeypatch.setattr(device, "unsupported_reason", lambda: None)
    monkeypatch.setattr(device, "arch", lambda: "sm_90a")
    with pytest.raises(NotImplementedError, match=r"multiple of 256 .* Got 128"):
        block_matmul(x[..., :128], narrow, tile, 128, **how)
    with pytest.raises(NotImplementedError, match=r"multiple of 256 .* Got 128"):
        block_ffn(x[..., :128], narrow, narrow, tile, (128, 128), relu, **how)
    assert ops.implementation({"packed": {}}, "int8").startswith("mosaic_gpu")
    monkeypatch.setattr(device, "arch", lambda: "sm_100a")
    told = ops.implementation({"packed": {}}, "int8")
    assert told.startswith("xla, packed, int8 activations. The int8 kernel is for")
    told = ops.implementation({"packed": {}})
    assert (
        told
        == "xla, packed. The GPU kernels of packed weights: not measured on a GPU yet."
    )
    by_name = ops.implementation({"packed": {}}, asked="mosaic_gpu")
    assert by_name == "mosaic_gpu where shapes allow, packed"
    with pytest.raises(
        NotImplementedError, match=r"Hopper \(sm_90a\)\. This is sm_100"
    ):
        block_matmul(x, w, tile, 128, **how)


def tiled(elements, layout):
    """The elements in the order of a layout's dimensions."""
    for tile in layout.tiling.tiles:
        lead = elements.shape[: elements.ndim - len(tile)]
        ends = elements.shape[elements.ndim - len(tile) :]
        cut = [n for end, t in zip(ends, tile, strict=True) for n in (end // t, t)]
        k = len(lead)
        order = [*range(k), *range(k, k + len(cut), 2), *range(k + 1, k + len(cut), 2)]
        elements = elements.reshape(*lead, *cut).transpose(order)
    return elements


def test_a_thread_holds_the_same_words_as_pairs_and_as_bytes():
    # What `decode_registers` relies on where no interpreter can follow.
    pairs, as_bytes = (
        fragmented_array.WGMMA_LAYOUT,
        fragmented_array.WGMMA_LAYOUT_8BIT,
    )
    words = np.arange(128 * 32).reshape(128, 32)
    held, held_bytes = (
        tiled(words, pairs),
        tiled(np.repeat(words, 2, axis=1), as_bytes),
    )
    np.testing.assert_array_equal(held, held_bytes[..., ::2])
    np.testing.assert_array_equal(held, held_bytes[..., 1::2])
    assert pairs.lane_dims == as_bytes.lane_dims
    assert pairs.warp_dims == as_bytes.warp_dims
    assert pairs.vector_dim == as_bytes.vector_dim


@pytest.mark.parametrize("mask", [0xC0C0, 0xC000])
def test_two_words_decode_in_one_as_apart(mask):
    words = np.random.default_rng(0).integers(0, 2**16, 512).astype(np.uint16)
    for plane in range(4 if mask == 0xC0C0 else 8):
        apart = (words << np.uint16(2 * plane)) & np.uint16(mask)
        joined = words.view(np.uint32) << np.uint32(2 * plane)
        joined &= np.uint32(mask << 16 | mask)
        np.testing.assert_array_equal(joined.view(np.uint16), apart)


def interpreted(x, w, tile, used):
    values, token_scale = quantize(x)
    scale = mosaic_scale(w.scale, w.bits.shape[1]) / 32
    args = interleave(values), w.bits, scale, jnp.asarray(tile, jnp.int32)
    used = jnp.asarray([used], jnp.int32)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        return hopper.tile_matmul(*args, used, token_scale[..., 0], interpreted=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("d_in", "d_out", "rows", "groups"), [(512, 128, 16, 1), (512, 64, 8, 2)]
)
def test_hopper_equals_the_oracle_bit_for_bit_on_real_numbers(
    d_in, d_out, rows, groups
):
    rng = np.random.default_rng(0)
    w = weights(rng, 3, d_in, d_out, groups)
    w = w._replace(scale=w.scale if groups == 1 else jnp.ones_like(w.scale))
    x = tokens(rng, 4, rows, d_in, dtype=jnp.bfloat16)
    tile = np.array([0, 2, 2, 1])
    y = interpreted(x, w, tile, 3)
    expected = block_matmul(
        x, w, jnp.asarray(tile), d_out, activations="int8", implementation="reference"
    )
    np.testing.assert_array_equal(y[:3], expected[:3])
    assert np.isnan(np.asarray(y[3], np.float32)).all()  # not used: never written


@pytest.mark.slow
def test_on_hopper_a_token_that_is_not_finite_gives_nan_alone():
    rng = np.random.default_rng(1)
    w, x = weights(rng, 1, 256, 64), tokens(rng, 1, 8, 256, dtype=jnp.bfloat16)
    y, clean = (interpreted(x, w, [0], 1) for x in (x.at[0, 3, 17].set(jnp.nan), x))
    assert np.isnan(np.asarray(y[0, 3], np.float32)).all()
    np.testing.assert_array_equal(y.at[0, 3].set(0), clean.at[0, 3].set(0))
