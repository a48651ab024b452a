"""Hopper's products of rows read by number: in the GPU interpreter with race detection,
and where the copies of single threads put what they read.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec as P

from trix_jax import SparseTriXFFN
from trix_jax.dispatch import make_plan
from trix_kernels import device
from trix_kernels.gpu_specs import GPUS
from trix_kernels.grouped_matmul import copying, gathered, hopper, reference
from trix_kernels.grouped_matmul.numbered import knows

ROWS = hopper.ROWS
TOKENS, K = 90, 2
CHOSEN = {  # tiles of the tokens' first choice, and how many there are
    "skewed": (lambda rng: rng.integers(0, 2, TOKENS) * rng.integers(0, 2, TOKENS), 4),
    "empty tiles": (lambda rng: np.full(TOKENS, 1), 4),
    "one tile takes all": (lambda rng: np.full(TOKENS, 1), 2),
}


@pytest.mark.parametrize(("rows", "width"), [(64, 64), (32, 256), (32, 128)])
def test_threads_of_a_warpgroup_fill_shared_memory_as_a_wgmma_reads_it(rows, width):
    x = np.random.default_rng(0).integers(0, 2**16, (rows, width), np.uint16)
    # Tiles of 8 rows of 64 numbers one after the other; in the address of 16 bytes the
    # three bits above those of a line's pieces are added to these.
    tiles = x.reshape(rows // 8, 8, width // 64, 64).swapaxes(1, 2)
    address = np.arange(tiles.size * 2).reshape(-1, 16)[:, 0]
    swizzled = address ^ ((address >> 7 & 7) << 4)
    expected = np.zeros((tiles.size * 2 // 16, 8), np.uint16)
    expected[swizzled // 16] = tiles.reshape(-1, 8)
    found, written = np.zeros_like(expected), np.zeros(len(expected), int)
    for thread in range(copying.THREADS):
        for row, column, byte in copying.pieces_of(thread, rows, width):
            found[byte // 16] = x[row, column : column + 8]
            written[byte // 16] += 1
    assert (written == 1).all()
    np.testing.assert_array_equal(found, expected)


@pytest.fixture
def interpreter(monkeypatch):
    monkeypatch.setattr(hopper, "CORES", 2)  # several outputs a program
    monkeypatch.setattr(copying, "COPY", copying.INTERPRETED)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    gpu_callbacks.reset_gpu_interpret_mode_state()


class Arguments(NamedTuple):
    tile: Any
    rows: Any
    starts: Any
    counts: Any


class Case(NamedTuple):
    x: Any
    dy: Any
    w: Any
    filled: Any
    at: Arguments
    blocks: Callable


def case(loads, inputs, outputs):
    """A plan's arguments, and integers: by token, and in blocks with NaN where a row does
    not count.
    """
    rng, (choose, tiles) = np.random.default_rng(0), CHOSEN[loads]
    first = choose(rng)
    second = np.where(np.arange(TOKENS) < 70, (first + tiles // 2) % tiles, first)
    chosen = np.stack([first, first if tiles == 2 else second], 1)
    plan = make_plan(jnp.asarray(chosen), tiles, ROWS)
    source = np.asarray(plan.source)
    counted = source < chosen.size
    filled, tile = counted.sum(axis=1), np.asarray(plan.block_tile)
    rows = np.where(counted, source // K, -1).astype(np.int32)
    x, dy = (
        rng.integers(-3, 4, (TOKENS, n)).astype(np.float32) for n in (inputs, outputs)
    )

    def blocks(a, padding):
        return np.where(counted[..., None], a[rows], padding)

    of_tile = [np.flatnonzero((tile == n) & (filled > 0)) for n in range(tiles)]
    starts = np.asarray([at[0] if len(at) else 0 for at in of_tile], np.int32)
    counts = np.asarray([filled[at].sum() for at in of_tile], np.int32)
    w = rng.integers(-1, 2, (tiles, inputs, outputs)).astype(np.float32)
    at = Arguments(*map(jnp.asarray, (plan.block_tile, rows, starts, counts)))
    return Case(x, dy, w, filled, at, blocks)


def bfloat16(x):
    return jnp.asarray(x, jnp.bfloat16)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    ("loads", "transposed"),
    [*((loads, False) for loads in CHOSEN), ("skewed", True)],
)
def test_matmul_of_numbered_rows_is_exact_on_integers(loads, transposed):
    x, dy, w, filled, at, blocks = case(loads, 256, 128)
    given, oracle = x, reference.grouped_matmul
    if transposed:
        given, oracle = dy, reference.transposed_matmul
    used = jnp.asarray([(filled > 0).sum()], jnp.int32)
    args = bfloat16(given), bfloat16(w), at.tile, used, at.rows
    y = gathered.gathered_matmul(*args, transposed=transposed)
    expected = bfloat16(oracle(blocks(given, 0), w, np.asarray(at.tile)))
    expected = np.asarray(expected, np.float32)
    y, is_used = np.asarray(y, np.float32), filled > 0
    np.testing.assert_array_equal(
        y[is_used], expected[is_used]
    )  # zeros where no row is
    assert np.isnan(y[~is_used]).all()  # neither read nor written


@pytest.mark.slow
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("loads", CHOSEN)
@pytest.mark.parametrize("side", ["left", "right"])
def test_outer_product_of_numbered_rows_is_exact_on_integers(loads, side):
    x, dy, w, filled, at, blocks = case(loads, 128, 256)
    runs = at.starts, at.counts, at.rows
    if side == "left":
        given = bfloat16(x), bfloat16(blocks(dy, np.nan))
        dw = gathered.outer_of_left(*given, *runs)
    else:
        given = bfloat16(blocks(x, np.nan)), bfloat16(dy)
        dw = gathered.outer_of_right(*given, *runs)
    assert dw.dtype == jnp.float32
    args = blocks(x, 0), blocks(dy, 0), np.asarray(at.tile), filled, len(w)
    np.testing.assert_array_equal(dw, reference.grouped_outer(*args))


def squared_relu(x):
    return jnp.square(jax.nn.relu(x))


@pytest.mark.slow
@pytest.mark.usefixtures("interpreter")
def test_a_product_comes_with_its_activation():
    x, _, w, filled, at, blocks = case("empty tiles", 128, 128)
    used = jnp.asarray([(filled > 0).sum()], jnp.int32)
    args = bfloat16(x), bfloat16(w), at.tile, used, at.rows
    h, a = gathered.matmul_and_act(*args, squared_relu)
    oracle = reference.grouped_matmul(blocks(x, 0), w, np.asarray(at.tile))
    expected, is_used = bfloat16(oracle), filled > 0
    np.testing.assert_array_equal(h[is_used], expected[is_used])
    np.testing.assert_array_equal(a[is_used], squared_relu(expected)[is_used])


@pytest.mark.slow
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("width", [128, 512])  # a program's output has 256 at most
def test_the_hidden_layers_gradient_is_that_of_its_parts(width):
    _, dy, w, filled, at, blocks = case("empty tiles", width, 128)
    rng = np.random.default_rng(3)
    h = bfloat16(rng.integers(-3, 4, (*at.rows.shape, width)))
    gate = jnp.asarray(rng.integers(1, 5, at.rows.shape) / 4, jnp.float32)
    used = jnp.asarray([(filled > 0).sum()], jnp.int32)
    args = bfloat16(dy), bfloat16(w), at.tile, used, at.rows, h, gate, squared_relu
    dh, ga, dots = gathered.hidden_gradient(*args)
    assert dots.shape == (-(-width // 256), *at.rows.shape)
    p = bfloat16(reference.transposed_matmul(blocks(dy, 0), w, np.asarray(at.tile)))
    a, pull = jax.vjp(squared_relu, h)
    expected = (
        pull(bfloat16(gate[..., None] * p))[0],
        bfloat16(gate[..., None] * a),
        (p.astype(jnp.float32) * a.astype(jnp.float32)).sum(axis=-1),
    )
    is_used = filled > 0
    for found, exact in zip((dh, ga, dots.sum(axis=0)), expected, strict=True):
        assert found.dtype == exact.dtype
        np.testing.assert_array_equal(found[is_used], exact[is_used])


@pytest.mark.parametrize(
    ("act", "is_known"),
    [
        (squared_relu, True),
        (jax.nn.relu, True),
        (jax.nn.gelu, False),
        (jax.nn.silu, False),
    ],
)
def test_kernels_know_activations_by_what_they_compute(act, is_known):
    assert knows(act) is is_known


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["relu2", "relu"])
def test_the_layers_gradient_is_traced_in_a_shard_map_that_checks_what_varies(
    activation,
):
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("d",))
    layer = SparseTriXFFN(
        128,
        num_tiles=4,
        expansion=4,
        tiles_per_token=2,
        dtype=jnp.bfloat16,
        activation=activation,
        implementation="mosaic_gpu",
    )
    x = jax.ShapeDtypeStruct((512, 128), jnp.bfloat16)
    plain = layer.clone(implementation="xla")
    variables = plain.init(jax.random.key(0), jnp.zeros((4, 128), jnp.bfloat16))

    def loss(params, x):
        y = layer.apply(variables | {"params": params}, x)[0]
        return jax.lax.psum(y.astype(jnp.float32).sum(), "d")

    spread = jax.shard_map(
        jax.grad(loss), mesh=mesh, in_specs=(P(), P("d")), out_specs=P()
    )
    with device.assumed(GPUS["h100"]):
        made = jax.make_jaxpr(spread)(variables["params"], x)
    shapes = [leaf.shape for leaf in jax.tree.leaves(variables["params"])]
    assert [leaf.shape for leaf in made.out_avals] == shapes
    assert "wgmma" in str(made)
