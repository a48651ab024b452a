"""Planar words, blocks, and the ops' XLA implementations against their oracles."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import trix_kernels
from trix_kernels import device
from trix_kernels.blocks import make_blocks
from trix_kernels.tile_matmul import (
    block_matmul,
    tile_matmul,
    unsupported_reason,
    xla,
)
from trix_kernels.weights import layout_of, pack, unpack


def ternary(rng, *shape):
    return rng.integers(-1, 2, shape).astype(np.float32)


def packed(rng, tiles, rows, features, groups=1, layout="planar"):
    q = ternary(rng, tiles, rows, features)
    scale = rng.choice([0.25, 0.5, 1.0], (tiles, groups, features)).astype(np.float32)
    return q, scale, pack(jnp.asarray(q), jnp.asarray(scale), layout)


@pytest.mark.parametrize("layout", ["rows", "planar"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("shape", [(3, 512, 64), (2, 512, 128)])
def test_packing_into_a_layout_is_exact(shape, groups, layout):
    rng = np.random.default_rng(0)
    q, scale, weights = packed(rng, *shape, groups=groups, layout=layout)
    assert layout_of(weights) == layout
    assert weights.bits.nbytes * 16 == q.nbytes
    back, scale_back = jax.jit(unpack, static_argnums=1)(weights, shape[-1])
    np.testing.assert_array_equal(back, q)
    np.testing.assert_array_equal(scale_back, scale)


def test_planar_words_are_the_bits_of_bfloat16():
    q = jnp.asarray([-1, 0, 1, 1] * 32, jnp.float32)[:, None] * jnp.ones((1, 64))
    words = pack(q, jnp.ones((1, 1)), "planar").bits
    plane = (words << np.uint16(6)) & np.uint16(0xC000)  # weights 48 to 63 of 128
    decoded = jax.lax.bitcast_convert_type(plane, jnp.bfloat16)
    np.testing.assert_array_equal(decoded, 2 * q[48:64].T.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("shape", "groups", "message"),
    [
        ((96, 64), 1, "1 group.* of 96 weights, must be a multiple of 128"),
        ((256, 64), 4, "4 group.* of 64 weights"),
        ((256, 72), 1, "features=72 must be a multiple of 64"),
    ],
)
def test_a_shape_without_a_planar_layout_is_refused(shape, groups, message):
    with pytest.raises(ValueError, match=message):
        pack(jnp.zeros(shape), jnp.ones((groups, 1)), "planar")


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(st.data())
def test_blocks_hold_every_row_once_whatever_the_groups(data):
    sizes = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=6))
    rows = data.draw(st.sampled_from([8, 16]))
    total = max(sum(sizes), 1)
    sizes[-1] += total - sum(sizes)
    blocks = jax.tree.map(np.asarray, make_blocks(jnp.asarray(sizes), total, rows))
    owner = np.repeat(np.arange(len(sizes)), sizes)
    np.testing.assert_array_equal(np.sort(blocks.row[blocks.is_row]), np.arange(total))
    block = np.nonzero(blocks.is_row)[0]
    np.testing.assert_array_equal(blocks.tile[block], owner[blocks.row[blocks.is_row]])
    assert blocks.used[0] == sum(-(-size // rows) for size in sizes)
    assert not blocks.is_row[blocks.used[0] :].any()


jit_tile_matmul = jax.jit(tile_matmul, static_argnums=3)


@pytest.mark.parametrize("layout", ["rows", "planar"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("sizes", [[0, 40, 0], [13, 0, 27], [40, 0, 0], [1, 1, 38]])
def test_tile_matmul_is_exact_on_integers(sizes, groups, layout):
    rng = np.random.default_rng(1)
    q, scale, weights = packed(rng, 3, 256, 64, groups, layout)
    x = rng.integers(-4, 5, (40, 256)).astype(np.float32)
    y = jit_tile_matmul(jnp.asarray(x), weights, jnp.asarray(sizes), 64)
    owner = np.repeat(np.arange(3), sizes)
    expected = sum(
        np.einsum("ai,aio->ao", part, rows[owner]) * scale[owner, g]
        for g, (part, rows) in enumerate(
            zip(np.split(x, groups, 1), np.split(q, groups, 1), strict=True)
        )
    )
    np.testing.assert_array_equal(y, expected)


def test_group_sizes_do_not_recompile():
    rng = np.random.default_rng(1)
    _, _, weights = packed(rng, 3, 128, 64)
    traces = []

    @jax.jit
    def run(x, sizes):
        traces.append(1)
        return tile_matmul(x, weights, sizes, 64)

    for sizes in ([0, 24, 0], [8, 8, 8], [24, 0, 0]):
        run(jnp.ones((24, 128)), jnp.asarray(sizes))
    assert len(traces) == 1


@pytest.mark.parametrize(
    "layout", ["rows", pytest.param("planar", marks=pytest.mark.slow)]
)
def test_the_reference_and_xla_agree_on_every_op(layout):
    rng = np.random.default_rng(2)
    *_, up = packed(rng, 3, 128, 64, layout=layout)
    *_, down = packed(rng, 3, 128, 128, layout=layout)
    *_, wide = packed(rng, 3, 128, 128, layout=layout)
    one = trix_kernels.Packed(up.bits[0], up.scale[0])
    x = jnp.asarray(rng.integers(-1, 2, (4, 8, 128)), jnp.float32)
    tile = jnp.asarray([0, 2, 2, 1])
    relu = functools.partial(jnp.maximum, 0)
    calls = [
        lambda name: trix_kernels.ternary_matmul(x[0], one, 64, implementation=name),
        lambda name: block_matmul(x, up, tile, 64, implementation=name),
        lambda name: trix_kernels.block_ffn(
            x, wide, down, tile, (128, 128), relu, implementation=name
        ),
    ]
    for call in calls:
        np.testing.assert_array_equal(call("xla"), call("reference"))
        np.testing.assert_array_equal(call("xla"), call(None))


def test_mosaic_by_name_on_a_cpu_is_refused_with_the_reason():
    rng = np.random.default_rng(2)
    *_, planar = packed(rng, 2, 128, 128)
    *_, rows = packed(rng, 2, 128, 128, layout="rows")
    x = jnp.ones((2, 8, 128), jnp.bfloat16)
    tile = jnp.zeros(2, jnp.int32)
    with pytest.raises(NotImplementedError, match=r"need a GPU\. This is cpu"):
        block_matmul(x, planar, tile, 128, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match="planar weights"):
        block_matmul(x, rows, tile, 128, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match="need a GPU"):
        trix_kernels.block_ffn(
            x, planar, planar, tile, (128, 128), jnp.abs, implementation="mosaic_gpu"
        )


def test_reasons_are_sentences(monkeypatch):
    rng = np.random.default_rng(2)
    *_, weights = packed(rng, 2, 128, 64)
    x = jnp.ones((2, 8, 128), jnp.bfloat16)
    monkeypatch.setattr(device, "unsupported_reason", lambda: None)
    monkeypatch.setattr(device, "arch", lambda: "sm_90a")
    assert unsupported_reason(x, weights) is None
    assert "bfloat16 activations. Got float32" in unsupported_reason(
        x.astype(jnp.float32), weights
    )
    assert "8, 16, 32, 64, 128 rows. Got 4" in unsupported_reason(x[:, :4], weights)
    monkeypatch.setattr(device, "arch", lambda: "sm_100a")
    assert "multiple of 128. Got 64" in unsupported_reason(x, weights)


@pytest.mark.parametrize(
    ("capability", "reason"),
    [
        ("9.0", None),
        ("10.0", None),
        ("8.0", "older"),
        ("11.0", "cannot compile"),
        ("12.0", "cannot compile"),
        ("13.0", "no kernel"),
    ],
)
def test_a_gpu_runs_the_kernels_or_says_why_not(capability, reason):
    told = device.reason_for("gpu", "a GPU", capability)
    assert (capability in device.ARCHS) == (reason is None) == (told is None)
    assert reason is None or reason in told


@pytest.mark.parametrize("groups", [1, 2])
def test_bfloat16_gradients_are_computed_in_bfloat16_and_close_to_float32(groups):
    rng = np.random.default_rng(5)
    x = jnp.asarray(rng.normal(size=(3, 8, 256)), jnp.bfloat16)
    q = jnp.asarray(ternary(rng, 3, 256, 32))
    scale = jnp.asarray(rng.lognormal(size=(3, groups, 32)), jnp.float32)
    dy = jnp.asarray(rng.normal(size=(3, 8, 32)), jnp.bfloat16)

    def gradients(dtype):
        def loss(x, q):
            return (xla.matmul(x.astype(dtype), q, scale) * dy.astype(dtype)).sum()

        return jax.jit(jax.grad(loss, (0, 1)))

    narrow, wide = gradients(jnp.bfloat16), gradients(jnp.float32)
    for got, expected in zip(narrow(x, q), wide(x, q), strict=True):
        got, expected = (np.asarray(a, np.float64) for a in (got, expected))
        # Rounded: dy * scale, unless the compiler keeps more, and the result.
        assert np.linalg.norm(got - expected) < 2**-8 * np.linalg.norm(expected)
    dots = re.findall(r"dot_general.*: \((.*)\) ->", narrow.lower(x, q).as_text())
    assert len(dots) == 2 * groups  # the forward pass is not needed
    assert not any("f32" in re.sub("bf16", "", operands) for operands in dots)


@pytest.mark.parametrize(
    ("inputs", "features", "layout", "wide"),
    [(8, 4, "rows", 9), (8, 4, "rows", 7), (128, 64, "planar", 130)],
)
def test_other_channels_than_the_weights_contract_are_refused(
    inputs, features, layout, wide
):
    """XLA would cut `x`, or weights, to what fits."""
    weights = pack(jnp.ones((1, inputs, features)), jnp.ones((1, 1, 1)), layout)
    one = jax.tree.map(lambda leaf: leaf[0], weights)
    x, tile, shape = jnp.ones((4, wide)), jnp.zeros(1, int), (features, features)
    with pytest.raises(ValueError, match=rf"channels, as the weights\. Got {wide}"):
        tile_matmul(x, weights, jnp.asarray([4]), features)
    with pytest.raises(ValueError, match=rf"channels, as the weights\. Got {wide}"):
        trix_kernels.ternary_matmul(x, one, features)
    with pytest.raises(ValueError, match=rf"channels, as the weights\. Got {wide}"):
        trix_kernels.block_ffn(x[None], weights, weights, tile, shape, jnp.tanh)


def test_groups_that_do_not_divide_the_contraction_are_refused():
    with pytest.raises(ValueError, match="number of groups that divides 8"):
        pack(jnp.ones((1, 8, 4)), jnp.ones((1, 3, 1)))


def test_no_blocks_and_no_rows_give_none():
    weights = pack(jnp.ones((1, 8, 4)), jnp.ones((1, 1, 1)))
    back = pack(jnp.ones((1, 4, 6)), jnp.ones((1, 1, 1)))
    none, x = jnp.zeros(0, jnp.int32), jnp.zeros((0, 2, 8))

    def ffn(x):
        return trix_kernels.block_ffn(x, weights, back, none, (4, 6), jnp.tanh)

    assert ffn(x).shape == jax.jit(ffn)(x).shape == (0, 2, 6)
    assert jax.grad(lambda x: ffn(x).sum())(x).shape == x.shape
    product = functools.partial(
        trix_kernels.grouped_matmul, x, jnp.ones((1, 8, 4)), none
    )
    for how in ("xla", "reference"):
        assert product(implementation=how).shape == (0, 2, 4)
    planar = pack(jnp.ones((128, 64)), jnp.ones((1, 1)), "planar")
    y = trix_kernels.ternary_matmul(jnp.zeros((0, 128)), planar, 64)
    assert y.shape == (0, 64)


def test_planar_weights_are_exported_with_a_symbolic_batch():
    rng = np.random.default_rng(0)
    _, _, weights = packed(rng, 1, 128, 64)
    one = jax.tree.map(lambda leaf: leaf[0], weights)
    (batch,) = jax.export.symbolic_shape("batch")
    call = jax.jit(lambda x: trix_kernels.ternary_matmul(x, one, 64))
    exported = jax.export.export(call)(jax.ShapeDtypeStruct((batch, 128), jnp.float32))
    x = jnp.asarray(ternary(rng, 3, 128))
    np.testing.assert_array_equal(exported.call(x), call(x))


def test_a_symbolic_number_of_blocks_is_exported():
    rng = np.random.default_rng(0)
    (_, _, up), (_, _, down) = (
        packed(rng, 1, *s, layout="rows") for s in ((8, 4), (4, 6))
    )
    (blocks,) = jax.export.symbolic_shape("blocks")

    def ffn(x):
        tile = jnp.zeros(x.shape[0], jnp.int32)
        return trix_kernels.block_ffn(x, up, down, tile, (4, 6), jnp.tanh)

    exported = jax.export.export(jax.jit(ffn))(
        jax.ShapeDtypeStruct((blocks, 2, 8), jnp.float32)
    )
    x = jnp.asarray(ternary(rng, 3, 2, 8))
    np.testing.assert_allclose(exported.call(x), ffn(x), rtol=1e-6)
